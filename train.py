"""Meta-trains a DataRater for a corpus: Algorithm 1 of the paper, from text to a rater.

  python train.py --workdir=runs/demo                                   # minutes on 2 cores
  python train.py --workdir=runs/mine --data=my.jsonl --meta_steps=200   # one's own text
  python train.py --workdir=runs/mine --data=crawl.jsonl --outer_data=trusted.jsonl
  python train.py --workdir=runs/paper --preset=paper --data=hf:allenai/c4:en --mesh=population=8

Started again with the same workdir it goes on where it stopped, to the same bytes. The workdir
gets config.json, checkpoints/, metrics.jsonl (a line per meta-step), scores/ (of the validation
documents at some meta-steps), and at the end summary.txt, results.json and figures.

Devices share the work as --mesh says (mesh.py); several hosts run the same command (hosts.py).
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import flags

import cli
import cpu
import data
import datarater
import hosts
import inner_loop
import kernels
import mesh
import meta_step
import report
import transformer
from cli import check, option
from kernels import attention
from workdir import Checkpoints, Metrics, StopSignal, open_workdir


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines a run's result. Every field is a flag; a preset changes some defaults."""

  # Data (documents.py says what may be named).
  data: tuple[str, ...] = option(
    ("demo",), "files, globs, folders, hf:NAME[:CONFIG[:SPLIT]] or demo"
  )
  outer_data: tuple[str, ...] = option(
    (), "the same, of text to do well on: the held-out loss; default a share of --data"
  )
  text_field: str = option("text", "field of a record that holds its text")
  source_field: str = option("source", "field that names a record's source, for reports")
  noise_field: str = option("noise", "field with a known noise level in [0, 1], for reports")
  tokenizer: str = option("bytes", "bytes, or a path or hub name of a tokenizer.json")
  sequence_length: int = option(128, "S, tokens a sequence")
  packing: str = option("document", "pack: fill sequences; document: a piece of one document each")
  outer_fraction: float = option(0.2, "share of the documents held out for the outer loss")
  validation_fraction: float = option(0.1, "share of the documents held out for the report")
  max_documents: int | None = option(None, "read so many documents at most")
  max_bad_fraction: float = option(0.1, "share of unreadable records beyond which the run stops")
  # Models: names in transformer.PRESETS.
  model: str = option("tiny", "size of the inner models theta")
  rater: str = option("tiny", "size of the rater eta")
  dtype: str = option("float32", "of activations and matmul inputs: float32 or bfloat16")
  loss_backend: str = option("xla", "of the fused loss: a name in kernels.loss.BACKENDS")
  attention_backend: str = option("xla", "a name in transformer.ATTENTION")
  # Algorithm 1.
  meta_steps: int = option(80, "K, updates of the rater")
  n_models: int = option(4, "N_models, inner models")
  inner_steps: int = option(2, "T, inner updates a meta-step, all differentiated through")
  inner_batch: int = option(16, "N_inner, sequences of an inner batch")
  outer_batch: int = option(32, "N_outer, sequences of an outer batch")
  lifetime: int = option(200, "inner updates between re-initialisations of an inner model")
  members_per_step: int | None = option(None, "inner models drawn for a meta-step; default all")
  mode: str = option(
    "mixed_save",
    "mixed (little memory), mixed_offload (less: what is saved waits in the host's), mixed_save "
    "(fast on CPUs), reverse, first_order (ablation)",
  )
  remat: str | None = option(
    None,
    "formed again in the backward pass: none; block (keeps a block's input); products (keeps its "
    "matrix products too); default block from 50m on, none below",
  )
  microbatches: int = option(
    1, "parts of an inner and of an outer batch, formed in turn: less memory, the same result"
  )
  inner_learning_rate: float = option(3e-3, "of the inner AdamW")
  inner_warmup: int = option(0, "inner updates of linear warm-up after each re-initialisation")
  inner_weight_decay: float = option(0.0, "decoupled, of the inner AdamW")
  meta_learning_rate: float = option(2e-3, "of the meta-AdamW H")
  meta_warmup: int = option(10, "meta-steps of linear warm-up")
  meta_weight_decay: float = option(0.1, "decoupled, of the meta-AdamW")
  meta_clip: float = option(0.01, "global norm to which a member's meta-gradient is clipped")
  seed: int = option(0, "of everything that is random")
  # The run.
  steps_per_call: int = option(10, "meta-steps in one compiled call; also the logging grain")
  checkpoint_every: int = option(20, "meta-steps between checkpoints")
  report_documents: int = option(1000, "validation documents scored for the report, at most")

  def __post_init__(self):
    for name in ("meta_steps", "n_models", "inner_steps", "inner_batch", "outer_batch", "lifetime"):
      check(getattr(self, name) >= 1, f"--{name}={getattr(self, name)} must be at least 1")
    for name in ("inner_batch", "outer_batch"):
      check(
        self.microbatches >= 1 and getattr(self, name) % self.microbatches == 0,
        f"--{name}={getattr(self, name)} must be a multiple of --microbatches={self.microbatches}",
      )
    m, n = self.members_per_step, self.n_models
    check(m is None or 1 <= m <= n, f"--members_per_step={m} must lie in 1..--n_models={n}")
    for name in ("meta_steps", "checkpoint_every"):
      value, grain = getattr(self, name), self.steps_per_call
      check(
        grain >= 1 and value >= 1 and value % grain == 0,
        f"--{name}={value} must be a positive multiple of --steps_per_call={grain}",
      )
    check(
      self.lifetime >= self.inner_steps,
      f"--lifetime={self.lifetime} is shorter than one window of --inner_steps={self.inner_steps}",
    )
    for name, choices in (
      ("mode", inner_loop.MODES),
      ("model", transformer.PRESETS),
      ("rater", transformer.PRESETS),
      ("remat", (None, *transformer.REMAT)),
      ("dtype", ("float32", "bfloat16")),
      ("loss_backend", kernels.loss.BACKENDS),
      ("attention_backend", transformer.ATTENTION),
    ):
      value = getattr(self, name)
      check(
        value in choices,
        f"--{name}={value} is unknown: choose one of {', '.join(filter(None, choices))}",
      )
    for name in ("loss_backend", "attention_backend"):
      value = getattr(self, name)
      check(
        self.mode != "reverse" or not value.startswith("pallas"),
        f"--{name}={value} has no reverse mode twice, as --mode=reverse asks: use --{name}=xla",
      )


PAPER = dict(
  data=("hf:allenai/c4:en",),
  tokenizer="google-t5/t5-base",
  sequence_length=2048,
  packing="pack",
  outer_fraction=0.1,
  validation_fraction=0.0005,
  rater="50m",
  dtype="bfloat16",
  mode="mixed",
  meta_steps=8000,
  n_models=8,
  inner_batch=128,
  outer_batch=128,
  lifetime=2000,
  inner_learning_rate=1e-3,
  inner_warmup=100,
  inner_weight_decay=0.1,
  meta_learning_rate=1e-4,
  meta_warmup=100,
  checkpoint_every=100,
)
PRESETS = {
  "demo": {},
  "50m": PAPER | dict(model="50m"),
  "150m": PAPER | dict(model="150m"),
  "paper": PAPER | dict(model="400m"),
}

SNAPSHOTS = (0, 10, 30, 70)  # meta-steps of the paper's Fig. 3; the last one is added


def main():
  FLAGS, config = flags.FLAGS, config_of_flags()
  if FLAGS.plan:
    import plan

    return plan.plan(config, FLAGS.plan, FLAGS.mesh)
  check(FLAGS.workdir is not None, "name a folder for the run with --workdir")
  if FLAGS.keep_freed_memory:
    cpu.keep_freed_memory()
  hosts.start_by_flags()
  devices = make_mesh(config, FLAGS.mesh)
  with hosts.stop_together(), mesh.use(devices):
    train(config, Path(FLAGS.workdir), Path(FLAGS.cache_dir), devices)


def make_mesh(
  config: Config, spec: str | None, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """The mesh that --mesh names, or the default, if the configuration can be spread over it."""
  m = config.members_per_step or config.n_models
  if m < config.n_models:  # any of them may be drawn, wherever they lie
    spec = spec or "population=1"
  devices = mesh.make_mesh(spec, config.n_models, devices)
  check(
    m == config.n_models or devices.shape["population"] == 1,
    f"--members_per_step={m} draws from all inner models: use --mesh=population=1",
  )
  for name in ("inner_batch", "outer_batch"):
    value, size, parts = getattr(config, name), devices.shape["data"], config.microbatches
    check(
      value % (size * parts) == 0,
      f"--{name}={value} is not a multiple of the {size} devices of the mesh's data axis, times "
      f"--microbatches={parts}: change it, or give another --mesh=population=...,data=...",
    )
  return devices


def train(config: Config, workdir: Path, cache_dir: Path, devices: jax.sharding.Mesh) -> None:
  """Trains to config.meta_steps, from the workdir's last checkpoint if it has one, and reports."""
  corpus = data.load_corpus(data_config(config), cache_dir, progress=hosts.leader())
  hosts.leader_first(lambda: open_workdir(workdir, config, corpus.fingerprint))
  grain = config.steps_per_call
  program = build(config, corpus.vocab_size)
  everywhere = mesh.sharding(devices)
  rater_score = jax.jit(program.problem.probe, out_shardings=everywhere)

  def batches(name, split, seed, start=0) -> Iterator[transformer.Batch]:
    shape, axes = batch_shapes(config)[name]
    where = mesh.sharding(devices, *axes)
    part = mesh.part_of_host(where, shape)[:-1]
    drawn = data.batch_iterator(corpus.splits[split], seed, shape[:-1], start, part)
    return (mesh.place(batch, where, shape) for batch in drawn)

  documents = corpus.validation_documents(config.report_documents)
  probe = next(batches("probe", "outer", config.seed + 2))
  key = jax.random.PRNGKey(config.seed)
  shardings = mesh.state_shardings(devices, jax.eval_shape(program.init, key, probe))
  state = jax.jit(program.init, out_shardings=shardings)(key, probe)
  checkpoints = Checkpoints(workdir)
  state = checkpoints.restore_latest(state)
  start = int(state.step)
  metrics_file = Metrics(workdir / "metrics.jsonl" if hosts.leader() else None, start)
  hosts.say(corpus.summary())
  hosts.say(describe(config, state, devices))
  if start:
    hosts.say(f"resuming after meta-step {start} of {config.meta_steps}")

  def snapshot(state, step):
    path = workdir / "scores" / f"{step}.npy"
    if hosts.as_leader(not path.exists()):
      scores = score_documents(rater_score, state.eta, documents, corpus.tokenizer, config)
      if hosts.leader():
        path.parent.mkdir(exist_ok=True)
        report.write_atomically(path, lambda file: np.save(file, scores))

  inner_batches = batches("inner", "train", config.seed, start // grain)
  outer_batches = batches("outer", "outer", config.seed + 1, start // grain)
  if start == 0:
    snapshot(state, 0)

  step = None
  pending = None  # metrics are read one call late, so that the device never waits for this loop
  stop = StopSignal()
  began, steps_here = time.monotonic(), 0
  bar = tqdm.tqdm(
    total=config.meta_steps,
    initial=start,
    unit="meta-step",
    smoothing=0.1,
    disable=not hosts.leader(),
  )
  for k in range(start + grain, config.meta_steps + 1, grain):
    inputs = (state, next(inner_batches), next(outer_batches), probe)
    if step is None:
      bar.set_description("compiling")
      step = jit_meta_steps(program, (shardings, everywhere)).lower(*inputs).compile()
      bar.set_description("meta-training")
      began = time.monotonic()
    state, metrics = step(*inputs)
    if pending:
      metrics_file.write(*pending, bar)
    pending = (k, metrics)
    steps_here += grain
    if k in SNAPSHOTS:
      snapshot(state, k)
    stopping = hosts.any_host(stop.requested)
    if k % config.checkpoint_every == 0 or k == config.meta_steps or stopping:
      jax.block_until_ready(state)
      metrics_file.write(*pending, bar)
      pending = None
      checkpoints.save(k, state)
    bar.update(grain)
    if stopping and k < config.meta_steps:
      bar.close()
      hosts.say(f"stopped: checkpoint written after meta-step {k}; start again to go on")
      checkpoints.close()
      return
  jax.block_until_ready(state)
  bar.close()
  if steps_here:
    seconds = time.monotonic() - began
    hosts.say(f"meta-training: {steps_here} meta-steps in {seconds:.0f} s")
  checkpoints.close()
  snapshot(state, config.meta_steps)
  if hosts.leader():
    print(report.write(workdir, documents, dataclasses.asdict(config)))


def data_config(config: Config) -> data.DataConfig:
  names = {f.name for f in dataclasses.fields(data.DataConfig)}
  return data.DataConfig(**{k: v for k, v in vars(config).items() if k in names})


def make_rater(config: Config, vocab_size: int) -> datarater.Rater:
  return datarater.rater(shape(config, config.rater, vocab_size))


def shape(config: Config, size: str, vocab_size: int) -> transformer.TransformerConfig:
  how = {"dtype": config.dtype, "attention_backend": config.attention_backend}
  how |= {"remat": config.remat} if config.remat else {}
  return transformer.preset(size, vocab_size, **how)


class Program(NamedTuple):
  """What a configuration means, in functions: (init, meta_steps) of the state of Algorithm 1."""

  problem: meta_step.Problem
  init: Callable[[jax.Array, transformer.Batch], meta_step.MetaState]  # (key, probe) -> state
  meta_steps: Callable[..., tuple[meta_step.MetaState, dict]]  # see meta_step.meta_steps


def build(config: Config, vocab_size: int) -> Program:
  rater = make_rater(config, vocab_size)
  model_config = shape(config, config.model, vocab_size)
  problem = meta_step.datarater_problem(
    transformer.language_model(model_config, config.loss_backend, config.microbatches),
    rater,
    model_config.remat != "none",
    config.microbatches,
  )
  parts = dict(
    problem=problem,
    inner_optimizer=meta_step.inner_adamw(
      config.inner_learning_rate, config.inner_warmup, config.inner_weight_decay
    ),
    meta_optimizer=meta_step.paper_meta_optimizer(
      config.meta_learning_rate, config.meta_warmup, config.meta_weight_decay, config.meta_clip
    ),
    config=meta_step.MetaConfig(
      config.n_models, config.lifetime, config.mode, config.members_per_step
    ),
  )

  def init(key, probe):
    eta_key, key = jax.random.split(key)
    return meta_step.init(key, rater.init(eta_key), probe=probe, **parts)

  return Program(problem, init, functools.partial(meta_step.meta_steps, **parts))


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
  """Of the batches of one compiled call: shape, and the axes of the mesh that it lies over."""
  M, T, S = config.steps_per_call, config.inner_steps, config.sequence_length
  m = config.members_per_step or config.n_models
  return {
    "inner": ((M, m, T, config.inner_batch, S), (None, "population", None, "data")),
    "outer": ((M, m, config.outer_batch, S), (None, "population", "data")),
    "probe": ((config.outer_batch, S), ("data",)),
  }


def jit_meta_steps(program: Program, out_shardings: Any = None):
  """The one compiled program of a run: steps_per_call meta-steps, the state updated in place."""
  return jax.jit(program.meta_steps, donate_argnums=0, out_shardings=out_shardings)


def describe(config: Config, state: meta_step.MetaState, devices: jax.sharding.Mesh) -> str:
  device = jax.devices()[0]
  axes = ", ".join(f"{name} {size}" for name, size in devices.shape.items())
  spread = f" ({axes}; {jax.process_count()} hosts)" if devices.size > 1 else ""
  inner = transformer.parameter_count(state.inner.params) // config.n_models
  tokens = config.inner_steps * config.inner_batch * config.sequence_length
  return (
    f"device {device.platform} ({device.device_kind}) x {devices.size}{spread}, {config.dtype}, "
    f"loss {config.loss_backend}, attention {config.attention_backend}, mode {config.mode}\n"
    f"rater {config.rater}: {transformer.parameter_count(state.eta):,} parameters; inner models "
    f"{config.n_models} x {config.model}: {inner:,} each; {tokens:,} inner tokens a member and "
    f"meta-step"
  )


def score_documents(rater_score, eta, documents, tokenizer, config: Config) -> np.ndarray:
  """phi_eta of each document [n] float32: the mean over its pieces, weighted by their tokens."""
  total, count = np.zeros((2, len(documents)))
  batches = data.document_batches(documents, tokenizer, config.sequence_length, 64)
  for batch, index, tokens in batches:
    scores = np.asarray(rater_score(eta, batch))
    real = index >= 0
    np.add.at(total, index[real], (scores * tokens)[real])
    np.add.at(count, index[real], tokens[real])
  return (total / np.maximum(count, 1)).astype(np.float32)


class TrainedRater(NamedTuple):
  """The rater of a workdir, with what it takes to rate text as it was trained to."""

  config: Config  # of the run that trained it
  tokenizer: data.Tokenizer
  eta: Any
  score: Callable[[Any, transformer.Batch], jax.Array]  # jitted: (eta, [B, S]) -> [B] float32
  parameters: int
  fingerprint: str  # of eta, its architecture and its tokenizer


def open_rater(workdir: str | os.PathLike) -> TrainedRater:
  """The rater of a finished or running workdir, of its last checkpoint; on every device in use.

  Raises:
    UserError: the folder holds no run, or no checkpoint yet.
  """
  workdir, config = Path(workdir), rater_config(workdir)
  tokenizer = data.load_tokenizer(config.tokenizer)
  if not attention.runs_here(config.attention_backend):  # trained on another kind of device
    config = dataclasses.replace(config, attention_backend="xla")
  rater = make_rater(config, tokenizer.vocab_size)
  eta = Checkpoints(workdir).restore_eta(jax.eval_shape(rater.init, jax.random.PRNGKey(0)))
  digest = hashlib.blake2b(f"{config.rater} {config.dtype} {tokenizer.fingerprint}".encode())
  for leaf in jax.tree.leaves(jax.device_get(eta)):
    digest.update(np.ascontiguousarray(leaf))
  parameters = transformer.parameter_count(eta)
  score = jax.jit(lambda eta, batch: mesh.whole(rater.score(eta, batch)))
  return TrainedRater(config, tokenizer, mesh.put(eta), score, parameters, digest.hexdigest()[:16])


def rater_config(workdir: str | os.PathLike) -> Config:
  """The configuration of the run in a workdir."""
  path = Path(workdir) / "config.json"
  check(path.exists(), f"{workdir} holds no run of train.py: no config.json in it")
  return cli.make_config(Config, json.loads(path.read_text())["config"])


def load_rater(workdir: str | os.PathLike) -> Callable[[Iterable[str]], np.ndarray]:
  """The rater of a workdir as a function from texts to scores [n] float32."""
  rater = open_rater(workdir)

  def score(texts: Iterable[str]) -> np.ndarray:
    documents = [data.Document(text, "", str(i)) for i, text in enumerate(texts)]
    return score_documents(rater.score, rater.eta, documents, rater.tokenizer, rater.config)

  return score


def config_of_flags() -> Config:
  return cli.config_from_flags(Config, PRESETS[flags.FLAGS.preset])


def define_run_flags(preset: str) -> None:
  """A flag for each field of Config, and those that say where the run takes place."""
  flags.DEFINE_enum(
    "preset", preset, list(PRESETS), "defaults of the flags below; demo's are shown"
  )
  flags.DEFINE_string("mesh", None, "population=N,data=M: how devices share the work; default all")
  cli.define_flags(Config)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "folder of the run; an existing one is resumed")
  flags.DEFINE_string("cache_dir", ".cache", "folder of the tokenised corpora")
  flags.DEFINE_string("plan", None, "train nothing; say what the run needs of v5p:4x4x4, h100, ...")
  hosts.define_flags()
  flags.DEFINE_boolean("keep_freed_memory", True, "glibc keeps XLA's buffers between calls (CPU)")
  define_run_flags(preset="demo")
  cli.run(main)
