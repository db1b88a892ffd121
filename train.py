"""Meta-trains a DataRater for a corpus: Algorithm 1 of the paper, from text to a rater.

  python train.py --workdir=runs/demo                                    # minutes on 2 cores
  python train.py --workdir=runs/mine --data=my.jsonl --meta_steps=200   # your own text
  python train.py --workdir=runs/mine --data=crawl.jsonl --outer_data=trusted.jsonl
  python train.py --workdir=runs/paper --preset=paper --data=hf:allenai/c4:en --mesh=population=8

Started again with the same workdir, a run resumes from its last checkpoint; the result is
bit-identical to an uninterrupted run. The workdir holds config.json, checkpoints/, metrics.jsonl (a
line per meta-step), scores/ (validation documents at some meta-steps), and at the end summary.txt,
results.json and figures.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

import config as settings
import meta_step
from config import Config
from corpus.batches import Split, batch_iterator, load_corpus
from rating import score_texts
from runtime import cli, cpu, hosts, programs, sharding
from runtime.cli import check, option
from runtime.files import write_atomically
from runtime.workdir import Checkpoints, Metrics, StopSignal, open_workdir
from transformer import Batch, parameter_count

SNAPSHOTS = (0, 10, 30, 70)  # meta-steps of the paper's Fig. 3 (where a call ends); and the last


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run takes place, and the preset of its settings."""

  workdir: str | None = option(
    None, "folder of the run; an existing one is resumed", section="Where"
  )
  preset: str = option(
    "demo", "defaults of the flags below; demo's are shown", choices=settings.PRESETS
  )
  cache_dir: str = option(".cache", "folder of tokenized corpora and compiled programs")
  mesh: str | None = option(
    None, "population=N,data=M: how devices share the work; default all devices"
  )


def main() -> None:
  place = cli.read(Place)
  config = cli.read(Config, settings.PRESETS[place.preset])
  check(place.workdir is not None, "name a folder for the run with --workdir")
  cpu.keep_freed_memory()
  programs.keep(place.cache_dir)
  hosts.start(cli.read(hosts.Hosts))
  mesh = settings.make_mesh(config, place.mesh)
  with hosts.stop_together(), sharding.use_mesh(mesh):
    train(config, Path(place.workdir), Path(place.cache_dir), mesh)


def train(config: Config, workdir: Path, cache_dir: Path, mesh: jax.sharding.Mesh) -> None:
  """Trains to config.meta_steps, from the workdir's last checkpoint if it has one, and reports."""
  corpus = load_corpus(config, cache_dir, progress=hosts.is_leader())
  hosts.leader_first(lambda: open_workdir(workdir, config, corpus.fingerprint))
  program = settings.build(config, corpus.tokenizer.vocab_size)
  documents = corpus.validation_documents(config.report_documents)
  probe = next(draw(config, mesh, "probe", corpus.splits["outer"], config.seed + 2))

  key = jax.random.PRNGKey(config.seed)
  shardings = sharding.state_shardings(mesh, jax.eval_shape(program.init, key, probe))
  state = jax.jit(program.init, out_shardings=shardings)(key, probe)
  checkpoints = Checkpoints(workdir)
  state = checkpoints.restore_latest(state)
  start, per_call = int(state.step), config.steps_per_call
  metrics_file = Metrics(workdir / "metrics.jsonl" if hosts.is_leader() else None, start)
  hosts.say(corpus.summary())
  hosts.say(describe(config, state, mesh, corpus.tokenizer.vocab_size))
  if start:
    hosts.say(f"resuming after meta-step {start} of {config.meta_steps}")

  score = jax.jit(program.rater.score, out_shardings=sharding.named(mesh))

  def snapshot(state, step):
    """Scores the validation documents."""
    path = workdir / "scores" / f"{step}.npy"
    if hosts.as_leader(not path.exists()):
      texts, S = [document.text for document in documents], config.sequence_length
      scores = np.zeros(len(texts), np.float32)
      if np.any(program.rater.head(state.eta)):
        # One length: to compile a program for each would take longer than to score its padding.
        scores, _ = score_texts(partial(score, state.eta), texts, corpus.tokenizer, S, [S])
      if hosts.is_leader():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: np.save(file, scores))

  if start == 0:
    snapshot(state, 0)
  # B_t ~ D_train and B_k ~ D_test of Algorithm 1, functions of (seed, step).
  inner = draw(config, mesh, "inner", corpus.splits["train"], config.seed, start // per_call)
  outer = draw(config, mesh, "outer", corpus.splits["outer"], config.seed + 1, start // per_call)
  step = None
  pending = None  # metrics of the last call, read while the device computes the next
  stop = StopSignal()
  began = time.monotonic()
  shown = dict(total=config.meta_steps, unit="meta-step", smoothing=0.1)
  bar = hosts.progress("meta-training", start, **shown)
  for k in range(start + per_call, config.meta_steps + 1, per_call):
    inputs = (state, next(inner), next(outer), probe)
    if step is None:
      bar.set_description("compiling")
      jitted = program.jit_meta_steps((shardings, sharding.named(mesh)))
      step = jitted.lower(*sharding.shapes(inputs)).compile()
      bar.set_description("meta-training")
      began = time.monotonic()
    state, metrics = step(*inputs)
    if pending:
      write_metrics(metrics_file, *pending, bar)
    pending = (k, metrics)
    if k in SNAPSHOTS:
      snapshot(state, k)
    stopping = hosts.any_host(stop.requested)
    if k % config.checkpoint_every == 0 or k == config.meta_steps or stopping:
      jax.block_until_ready(state)
      write_metrics(metrics_file, *pending, bar)
      pending = None
      checkpoints.save(k, state)
    bar.update(per_call)
    if stopping and k < config.meta_steps:
      bar.close()
      hosts.say(f"stopped: checkpoint written after meta-step {k}; start again to resume")
      checkpoints.close()
      return
  jax.block_until_ready(state)
  bar.close()
  if config.meta_steps > start:
    seconds = time.monotonic() - began
    hosts.say(f"meta-training: {config.meta_steps - start} meta-steps in {seconds:.0f} s")
  checkpoints.close()
  snapshot(state, config.meta_steps)
  if hosts.is_leader():
    from analysis import training_report  # with SciPy and Matplotlib

    print(training_report.write(workdir, documents, dataclasses.asdict(config)))


def draw(
  config: Config, mesh: jax.sharding.Mesh, name: str, split: Split, seed: int, call: int = 0
) -> Iterator[Batch]:
  """Endless "inner", "outer" or "probe" batches, one for each compiled call from number `call` on,
  laid out on the mesh. Each host reads the sequences of its own devices."""
  shape, axes = settings.batch_shapes(config)[name]
  where = sharding.named(mesh, *axes)
  part = sharding.host_slice(where, shape)[:-1]
  batches = batch_iterator(split, seed, shape[:-1], call, part)
  return (sharding.from_host_slices(batch, where, shape) for batch in batches)


def write_metrics(file: Metrics, last_step: int, metrics: dict[str, Any], bar: tqdm.tqdm) -> None:
  """A line for each of the C meta-steps of a call of meta_step.meta_steps. The last line also has
  score_autocorrelation, unless the earlier scores were all equal (an untrained rater)."""
  if not hosts.is_leader():
    return
  metrics = dict(jax.device_get(metrics))
  correlation = float(metrics.pop("score_autocorrelation"))
  comparable = metrics["score_std"][0].max() > 0
  C = len(metrics["outer_loss"])
  for i in range(C):
    row = {"step": last_step - C + 1 + i} | {name: x[i].tolist() for name, x in metrics.items()}
    if i == C - 1 and comparable:
      row["score_autocorrelation"] = correlation
    file.append(row)
  skipped = int(metrics["skipped"].sum())
  bar.set_postfix_str(
    f"outer loss {metrics['outer_loss'][-1].mean():.3f}, "
    f"score spread {metrics['score_std'][-1].mean():.2f}, "
    f"effective batch {metrics['effective_sample_size'][-1].mean():.1f}"
    + (f", skipped {skipped}" if skipped else "")
  )


def describe(
  config: Config, state: meta_step.MetaState, mesh: jax.sharding.Mesh, vocab_size: int
) -> str:
  device, (of_loss, of_attention) = jax.devices()[0], config.backends_here(vocab_size)
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  spread = f" ({axes}; {jax.process_count()} hosts)" if mesh.size > 1 else ""
  inner = parameter_count(state.members.inner.params) // config.n_models
  tokens = config.inner_steps * config.inner_batch * config.sequence_length
  return (
    f"device {device.platform} ({device.device_kind}) x {mesh.size}{spread}, {config.dtype}, "
    f"loss {of_loss}, attention {of_attention}, mode {config.mode}\n"
    f"rater {config.rater}: {parameter_count(state.eta):,} parameters; inner models "
    f"{config.n_models} x {config.model}: {inner:,} each; {tokens:,} inner tokens per member and "
    f"meta-step"
  )


if __name__ == "__main__":
  cli.run(main, Place, Config, hosts.Hosts)
