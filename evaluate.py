"""Trains language models on what each selection policy keeps of a corpus, and compares them.

  python evaluate.py --workdir=runs/eval --rater=runs/demo --discard=0.5
  python evaluate.py --workdir=runs/eval --rater=runs/demo --sweep_discard=0.1,0.25,0.5,0.75,0.9
  python evaluate.py --workdir=runs/paper --rater=runs/paper-rater --models=50m,150m,400m --dry_run

Data, tokenizer and splits are the rater's, so nothing that is reported has been seen by the rater
or its inner models. Like for like: all policies start from the same parameters, see as many tokens
and follow the same schedule. Started again, it goes on where it stopped; with the same --jobs and
--mesh to the same bytes (otherwise rounding differs). The workdir gets runs/ (a folder for each
model trained: curve.jsonl, checkpoints/), scores/, and at the end table.md, results.json and
figures.

The validation split is halved by a hash of the documents' texts: `selection` chooses rho, and
`validation` is what is reported. Where noise levels are known (the demo), both hold clean documents
only and the others are reported as `validation_noisy`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

import cli
import compare
import cpu
import data
import documents
import hosts
import kernels
import mesh
import multiple_choice
import pretrain
import report
import selection
import train
import transformer
from cli import check, option
from workdir import open_workdir
from workers import Workers


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines the results. Every field is a flag."""

  rater: str = option("", "workdir of the trained rater, whose data and tokenizer are used")
  # Another corpus than the rater's own.
  data: tuple[str, ...] = option((), "as in train.py; default what the rater was trained on")
  outer_data: tuple[str, ...] = option((), "as in train.py")
  text_field: str | None = option(None, "as in train.py; default the rater's, as the next three")
  source_field: str | None = option(None, "as in train.py")
  noise_field: str | None = option(None, "as in train.py")
  max_documents: int | None = option(None, "as in train.py")
  # What is compared.
  models: tuple[str, ...] = option(("tiny",), "sizes to train: names in transformer.PRESETS")
  policies: tuple[str, ...] = option(selection.POLICIES, "names in selection.POLICIES")
  discard: float = option(0.5, "rho, the share of a pool that each policy but none discards")
  sweep_discard: tuple[float, ...] = option(
    (), "values of rho to try with the smallest model; the best on `selection` replaces --discard"
  )
  seeds: tuple[int, ...] = option((0, 1, 2), "of parameters and order; each policy with each")
  scorer: str | None = option(None, "size of the perplexity scorer; default the smallest of models")
  # How they are trained; the defaults depend on the size (pretrain.RECIPES).
  batch: int | None = option(None, "N, sequences of a batch")
  steps: int | None = option(None, "updates; rounded up to a multiple of --evaluations")
  learning_rate: float | None = option(None, "peak of the cosine schedule")
  dtype: str = option("float32", "of activations and matmul inputs: float32 or bfloat16")
  loss_backend: str = option("xla", "of the fused loss: a name in kernels.loss.BACKENDS")
  attention_backend: str = option("xla", "a name in transformer.ATTENTION")
  # What they are measured on.
  evaluations: int = option(20, "points of a learning curve")
  eval_sequences: int = option(256, "sequences of each evaluation set, at most, evenly spaced")
  eval_data: tuple[str, ...] = option((), "more texts for NLL, each name a set (as --data)")
  benchmarks: tuple[str, ...] = option(
    (), "a folder with multiple-choice tasks, or TASK=FILE, TASK=hf:NAME (multiple_choice.TASKS)"
  )
  benchmark_questions: int = option(500, "questions of each task, at most, evenly spaced")

  def __post_init__(self):
    names = [Path(name).name for name in self.eval_data]
    check(len(set(names)) == len(names), f"--eval_data has two sets of one name: {names}")
    check(bool(self.rater), "name the folder of a trained rater with --rater")
    for name, choices in (("models", transformer.PRESETS), ("policies", selection.POLICIES)):
      values = getattr(self, name)
      wrong = [v for v in values if v not in choices]
      check(
        bool(values) and not wrong,
        f"--{name}={','.join(values)}: choose among {', '.join(choices)}",
      )
    check("none" in self.policies, "--policies lacks none, the baseline of every comparison")
    for rho in (self.discard, *self.sweep_discard):
      check(0 < rho < 1, f"a discard fraction of {rho:g} must lie between 0 and 1")
    check(len(self.seeds) > 0, "--seeds is empty")
    for name in ("evaluations", "eval_sequences", "benchmark_questions"):
      check(getattr(self, name) >= 1, f"--{name}={getattr(self, name)} must be at least 1")
    for name, choices in (
      ("scorer", (None, *transformer.PRESETS)),
      ("dtype", ("float32", "bfloat16")),
      ("loss_backend", kernels.loss.BACKENDS),
      ("attention_backend", transformer.ATTENTION),
    ):
      value = getattr(self, name)
      check(value in choices, f"--{name}={value} is unknown: choose one of {choices}")


class Run(NamedTuple):
  """One language model to train."""

  model: str
  policy: str  # "scorer": the perplexity scorer, unselected batches of the outer split
  discard: float
  seed: int

  @property
  def name(self) -> str:
    return f"{self.model}-{self.policy}-{self.discard:g}-seed{self.seed}"


def main():
  FLAGS = flags.FLAGS
  config = cli.config_from_flags(Config)
  check(FLAGS.workdir is not None or FLAGS.dry_run, "name a folder for the run with --workdir")
  check(FLAGS.jobs >= 1, f"--jobs={FLAGS.jobs} must be at least 1")
  if FLAGS.keep_freed_memory:
    cpu.keep_freed_memory()
  if FLAGS.dry_run:
    print(plan_text(config))
    return
  hosts.start_by_flags()
  devices = make_mesh(config, FLAGS.mesh, FLAGS.jobs)
  with hosts.stop_together(), mesh.use(devices):
    evaluate(config, Path(FLAGS.workdir), Path(FLAGS.cache_dir), FLAGS.jobs)


def make_mesh(config: Config, spec: str | None, jobs: int) -> jax.sharding.Mesh:
  """All devices share each batch; with several jobs each has one device of its own."""
  if jobs > 1:
    check(spec is None, f"--mesh={spec} shares a model among devices, --jobs={jobs} does not")
    return mesh.make_data_mesh(None, jax.devices()[:1])
  devices = mesh.make_data_mesh(spec)
  for size, recipe in costs(config).recipes.items():
    check(
      recipe.batch % devices.shape["data"] == 0,
      f"a batch of {recipe.batch} sequences ({size}) is not a multiple of the "
      f"{devices.shape['data']} devices: give another --batch or --mesh=data=...",
    )
  return devices


def evaluate(config: Config, workdir: Path, cache_dir: Path, jobs: int = 1) -> None:
  """Trains all models of the plan that are not trained yet, and writes the comparison."""
  inputs = open_inputs(config, cache_dir)
  fingerprint = f"{inputs.corpus.fingerprint} {inputs.rater.fingerprint}"
  hosts.leader_first(lambda: open_workdir(workdir, config, fingerprint))
  hosts.say(inputs.corpus.summary())
  hosts.say(plan_text(config))
  workers = Workers((config, workdir, cache_dir), jobs)
  if "datarater" in config.policies or config.sweep_discard:
    workers.do("rating the sequences to be drawn", rate, ["datarater"])
  discard = config.discard
  if config.sweep_discard:
    sweep = sweep_runs(config)
    workers.do("sweeping the discard fraction", train_run, sweep)
    discard = compare.best_discard(workdir, sweep)
    hosts.say(f"discard fraction with the lowest NLL on `selection`: {discard:g}")
  if set(config.policies) & set(selection.PERPLEXITY):
    workers.do("training the perplexity scorer", train_run, [scorer_run(config)])
    workers.do("its perplexities", rate, ["perplexity"])
  workers.do("training", train_run, main_runs(config, discard))
  workers.close()
  if hosts.leader():
    print(compare.write(workdir, main_runs(config, discard), sweep_runs(config), costs(config)))


def sweep_runs(config: Config) -> list[Run]:
  """The smallest model without and with each discard fraction, with the first seed."""
  smallest = min(config.models, key=lambda name: costs(config).parameters[name])
  rhos = [("none", 0.0), *(("datarater", rho) for rho in config.sweep_discard)]
  return [Run(smallest, *rho, config.seeds[0]) for rho in rhos if config.sweep_discard]


def main_runs(config: Config, discard: float) -> list[Run]:
  return [
    Run(model, policy, 0.0 if policy == "none" else discard, seed)
    for model in config.models
    for policy in config.policies
    for seed in config.seeds
  ]


def scorer_run(config: Config) -> Run:
  return Run(costs(config).scorer, "scorer", 0.0, config.seeds[0])


@functools.cache
def costs(config: Config) -> compare.Costs:
  """Parameters, updates and batch of each size."""
  settings = rater_settings(config)
  vocab_size = data.load_tokenizer(settings.tokenizer).vocab_size

  def parameters(init):
    return transformer.parameter_count(jax.eval_shape(init, jax.random.PRNGKey(0)))

  count = {
    size: parameters(language_model(config, size, vocab_size).init)
    for size in {*config.models, config.scorer} - {None}
  }
  recipes = {
    size: pretrain.RECIPES[size].scaled(
      parameters,
      settings.sequence_length,
      **{k: getattr(config, k) for k in pretrain.Recipe._fields},
    )
    for size, parameters in count.items()
  }
  rater = parameters(train.make_rater(settings, vocab_size).init)
  scorer = config.scorer or min(config.models, key=count.get)
  return compare.Costs(count, rater, scorer, recipes, settings.sequence_length)


def rater_settings(config: Config) -> train.Config:
  """The rater's own configuration, with the corpus of --data if one is named."""
  settings = train.rater_config(config.rater)
  names = ("data", "outer_data", "text_field", "source_field", "noise_field", "max_documents")
  given = {name: getattr(config, name) for name in names}
  given = {name: value for name, value in given.items() if value not in (None, ())}
  if "data" in given:
    given = {"outer_data": (), "max_documents": None} | given
  return dataclasses.replace(settings, **given)


def plan_text(config: Config) -> str:
  """What will be trained, with its FLOPs: 6 N D of a model and 2 N a token rated."""
  c = costs(config)
  lines = [f"rater: {c.rater:,} parameters; perplexity scorer {c.scorer}"]
  lines.append(f"{'model':6} {'policy':12} {'rho':>5} {'runs':>4} {'steps':>7} {'TFLOP each':>11}")
  runs = [*sweep_runs(config), *main_runs(config, config.discard)]
  if set(config.policies) & set(selection.PERPLEXITY):
    runs.append(scorer_run(config))
  kinds = {}
  for run in dict.fromkeys(runs):
    kinds.setdefault(run[:3], []).append(run)
  total = 0
  for (model, policy, rho), members in kinds.items():
    flops = c.flops(model, policy, rho)
    total += flops * len(members)
    recipe = c.recipes[model]
    lines.append(
      f"{model:6} {policy:12} {rho:5.2f} {len(members):4} {recipe.steps:7,} {flops / 1e12:11.4g}"
    )
  tokens = {m: r.steps * r.batch * c.sequence_length for m, r in c.recipes.items()}
  seen = ", ".join(f"{m} {t:,} ({t / c.parameters[m]:.1f} a parameter)" for m, t in tokens.items())
  lines.append(f"tokens seen by each model: {seen}")
  also = "; if the sweep picks another rho, as many again for it" if config.sweep_discard else ""
  return "\n".join([*lines, f"in all {total / 1e12:.4g} TFLOP{also}"])


class Inputs(NamedTuple):
  corpus: data.Corpus
  rater: train.TrainedRater
  eval_sets: dict[str, transformer.Batch]  # name -> rows [blocks, rows, S]
  questions: dict[str, list[multiple_choice.Question]]  # by task


@functools.lru_cache(maxsize=1)
def open_inputs(config: Config, cache_dir: Path) -> Inputs:
  settings = rater_settings(config)
  corpus = data.load_corpus(train.data_config(settings), cache_dir)
  texts = {"selection": [], "validation": [], "validation_noisy": []}
  for document in corpus.validation_documents():
    second_half = documents.split_of(document.text, corpus.config)[1] & 1
    noisy = "_noisy" if second_half and document.noise > 0 else ""
    if noisy or not document.noise > 0:
      texts["validation" + noisy if second_half else "selection"].append(document)
  for name in config.eval_data:
    texts[Path(name).name] = documents.read_documents(
      dataclasses.replace(corpus.config, data=(name,), outer_data=(), max_documents=None)
    )
  sets = {}
  for name, members in texts.items():
    rows = _evenly(members, corpus.tokenizer, settings.sequence_length, config.eval_sequences)
    if rows is not None:
      sets[name] = rows
  for name in ("selection", "validation"):
    check(name in sets, f"no clean document falls in the half `{name}` of the validation split")
  questions = {}
  for item in config.benchmarks:
    task, given, source = item.partition("=")
    if given:
      questions[task] = multiple_choice.load_questions(task, source, config.benchmark_questions)
    else:
      questions |= multiple_choice.load_all(item, config.benchmark_questions)
  return Inputs(corpus, train.open_rater(config.rater), sets, questions)


def _evenly(members: Iterable[data.Document], tokenizer, sequence_length: int, limit: int):
  """At most `limit` pieces of the documents, as a Batch [blocks, rows, S]; None without any."""
  tokens, segments = [], []
  for batch, index, _ in data.document_batches(members, tokenizer, sequence_length, 64):
    tokens.append(batch.tokens[index >= 0].astype(np.int32))
    segments.append(batch.segments[index >= 0].astype(np.uint8))
  if not tokens:
    return None
  tokens, segments = np.concatenate(tokens), np.concatenate(segments)
  chosen = np.unique(np.linspace(0, len(tokens) - 1, min(limit, len(tokens))).astype(int))
  rows = min(64, len(chosen))
  pad = -len(chosen) % rows

  def blocks(x):
    x = np.pad(x[chosen], [(0, pad), (0, 0)])  # segment 0: padding, nothing is counted
    return x.reshape(-1, rows, sequence_length).astype(np.int32)

  return transformer.Batch(blocks(tokens), blocks(segments))


def rate(kind: str, config: Config, workdir: Path, cache_dir: Path, progress: bool = True) -> None:
  """Writes scores/`kind`.npy [R] float32: of every training sequence that some run will draw, its
  score phi_eta ("datarater") or its mean NLL under the scorer ("perplexity"); nan elsewhere.

  Both scorers are frozen, so this equals scoring each pool when it is drawn, but happens once.
  """
  path = workdir / "scores" / f"{kind}.npy"
  if hosts.as_leader(path.exists()):
    return
  path.parent.mkdir(exist_ok=True)
  inputs = open_inputs(config, cache_dir)
  split = inputs.corpus.splits["train"]
  if kind == "datarater":
    score = functools.partial(inputs.rater.score, inputs.rater.eta)
  else:
    run = scorer_run(config)
    model = language_model(config, run.model, inputs.corpus.vocab_size)
    params = pretrain.trained(workdir / "runs" / run.name, model, costs(config).recipes[run.model])
    nll = lambda params, batch: mesh.whole(
      model.loss(params, jnp.zeros(len(batch.tokens)), batch)[1]
    )
    score = functools.partial(jax.jit(nll), params)
  rows = _rows_drawn(config, len(split.tokens), kind)
  values = np.full(len(split.tokens), np.nan, np.float32)
  chunks = [rows[i : i + 128] for i in range(0, len(rows), 128)]
  for chunk in tqdm.tqdm(chunks, kind, unit=" batches", disable=not (progress and hosts.leader())):
    padded = np.resize(chunk, 128)  # one shape, one program
    batch = [x[padded].astype(np.int32) for x in (split.tokens, split.segments)]
    batch = mesh.put(transformer.Batch(*batch), "data")
    values[chunk] = np.asarray(score(batch))[: len(chunk)]
  check(np.isfinite(values[rows]).all(), f"some {kind} scores are not finite: train it again")
  if hosts.leader():
    report.write_atomically(path, lambda file: np.save(file, values))
  hosts.wait_for_all(kind)


def _rows_drawn(config: Config, rows: int, kind: str) -> np.ndarray:
  """The training sequences, sorted, that stand in some pool of a run that needs these values."""
  rhos = [config.discard, *(config.sweep_discard)]
  drawn = np.zeros(rows, bool)
  for model in config.models:
    recipe = costs(config).recipes[model]
    draws = recipe.steps * max(selection.pool_size(kind, recipe.batch, rho) for rho in rhos)
    if draws >= rows:
      return np.arange(rows)
    for seed in config.seeds:
      drawn[data.drawn_rows(rows, seed, 0, draws)] = True
  return np.flatnonzero(drawn)


def train_run(
  run: Run, config: Config, workdir: Path, cache_dir: Path, progress: bool = True
) -> None:
  """Trains one language model in its folder of the workdir, unless it is there."""
  inputs, recipe = open_inputs(config, cache_dir), costs(config).recipes[run.model]
  model = language_model(config, run.model, inputs.corpus.vocab_size)

  sets = {name: mesh.put(rows, None, "data") for name, rows in inputs.eval_sets.items()}

  def measure(params):
    nll = functools.partial(pretrain.mean_nll, model, params)
    row = {"nll": {name: float(nll(rows)) for name, rows in sets.items()}}
    if inputs.questions:
      row["accuracy"] = {
        task: multiple_choice.accuracy(
          functools.partial(logprob(config, run.model, inputs.corpus.vocab_size), params),
          questions,
          inputs.corpus.tokenizer,
          inputs.corpus.config.sequence_length,
        )["accuracy"]
        for task, questions in inputs.questions.items()
      }
    return row

  batches = functools.partial(selected_batches, run, recipe, workdir, inputs.corpus)
  folder = workdir / "runs" / run.name
  progress &= hosts.leader()
  pretrain.pretrain(folder, model, recipe, run.seed, batches, measure, progress)
  hosts.wait_for_all(run.name)


def model_config(config: Config, size: str, vocab_size: int) -> transformer.TransformerConfig:
  how = dict(dtype=config.dtype, attention_backend=config.attention_backend)
  return transformer.preset(size, vocab_size, **how)


@functools.cache  # equal models share their compiled programs
def language_model(config: Config, size: str, vocab_size: int) -> transformer.LanguageModel:
  return transformer.language_model(model_config(config, size, vocab_size), config.loss_backend)


@functools.cache
def logprob(config: Config, size: str, vocab_size: int):
  shape = model_config(config, size, vocab_size)
  of_rows = jax.jit(multiple_choice.sequence_logprob(shape, config.loss_backend))
  return lambda params, *rows: of_rows(params, *mesh.put(rows, "data"))


def selected_batches(
  run: Run, recipe: pretrain.Recipe, workdir: Path, corpus: data.Corpus, start_call: int
) -> Iterator[transformer.Batch]:
  """Batches [steps_per_call, N, S] of what the policy keeps of each pool: of (run, step) alone."""
  batch, per_call = recipe.batch, recipe.steps_per_call
  split = corpus.splits["outer" if run.policy == "scorer" else "train"]
  rows = len(split.tokens)
  kind = {"datarater": "datarater"} | dict.fromkeys(selection.PERPLEXITY, "perplexity")
  values = np.zeros(rows, np.float32)
  if run.policy in kind:
    values = np.load(workdir / "scores" / f"{kind[run.policy]}.npy")
  policy = "none" if run.policy == "scorer" else run.policy
  pool = selection.pool_size(policy, batch, run.discard)
  check(
    rows >= pool, f"the training split has {rows} sequences, a pool takes {pool}: use more data"
  )

  def kept(step):
    drawn = data.drawn_rows(rows, run.seed, step * pool, pool)
    rng = np.random.default_rng([run.seed, step])
    return drawn[selection.select(policy, values[drawn], batch, rng)]

  def rows_of_call(call):
    return np.stack([kept(call * per_call + i) for i in range(per_call)])

  return data.row_batches(split, rows_of_call, start_call)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "folder of the evaluation; an existing one is resumed")
  flags.DEFINE_string("cache_dir", ".cache", "folder of the tokenised corpora")
  flags.DEFINE_integer("jobs", 1, "models trained at a time, each on a core of its own (CPUs only)")
  flags.DEFINE_string("mesh", None, "data=N: devices that share each batch; default all")
  hosts.define_flags()
  flags.DEFINE_boolean("dry_run", False, "print what would be trained, with its FLOPs")
  flags.DEFINE_boolean("keep_freed_memory", True, "glibc keeps XLA's buffers between calls (CPU)")
  cli.define_flags(Config)
  cli.run(main)
