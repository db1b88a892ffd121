"""The steps of evaluate.py: opens its inputs, rates sequences, trains a model on a policy's choice.

Axes: R rows of the training split, N sequences of a batch, S tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import selection
import transformer
from config import data_config
from corpus.batches import Corpus, cut, drawn_rows, load_corpus, row_batches
from corpus.documents import Document, read_documents, split_of
from corpus.tokenizer import Tokenizer
from evaluation import multiple_choice, pretrain
from evaluation.plan import (
  Config,
  Run,
  costs,
  language_model,
  model_config,
  rater_settings,
  scorer_run,
)
from rating import TrainedRater, open_rater, score_sequences
from runtime import hosts, sharding
from runtime.cli import check
from runtime.files import write_atomically


class Inputs(NamedTuple):
  corpus: Corpus
  rater: TrainedRater
  eval_sets: dict[str, transformer.Batch]  # name -> rows [blocks, rows, S]
  questions: dict[str, list[multiple_choice.Question]]  # by task


@functools.lru_cache(maxsize=1)
def open_inputs(config: Config, cache_dir: Path) -> Inputs:
  settings = rater_settings(config)
  corpus = load_corpus(data_config(settings), cache_dir)
  texts = {"selection": [], "validation": [], "validation_noisy": []}
  for document in corpus.validation_documents():
    second_half = split_of(document.text, corpus.config)[1] & 1
    noisy = "_noisy" if second_half and document.noise > 0 else ""
    if noisy or not document.noise > 0:
      texts["validation" + noisy if second_half else "selection"].append(document)
  for name in config.eval_data:
    texts[Path(name).name] = read_documents(
      dataclasses.replace(corpus.config, data=(name,), outer_data=(), max_documents=None)
    )
  S, limit = settings.sequence_length, config.eval_sequences
  sets = {name: _evenly(docs, corpus.tokenizer, S, limit) for name, docs in texts.items()}
  sets = {name: rows for name, rows in sets.items() if rows is not None}
  for name in ("selection", "validation"):
    check(name in sets, f"no clean document falls in the half `{name}` of the validation split")
  questions = {}
  for item in config.benchmarks:
    task, equals, source = item.partition("=")
    if equals:
      questions[task] = multiple_choice.load_questions(task, source, config.benchmark_questions)
    else:
      questions |= multiple_choice.load_all(item, config.benchmark_questions)
  return Inputs(corpus, open_rater(config.rater), sets, questions)


def _evenly(
  documents: Iterable[Document], tokenizer: Tokenizer, S: int, limit: int
) -> transformer.Batch | None:
  """At most `limit` pieces of the documents, as a Batch [blocks, rows, S]; None without any."""
  texts = [document.text for document in documents]
  pieces = [piece for tokens in tokenizer.encode(texts) for piece in cut(tokens, S)]
  if not pieces:
    return None
  chosen = np.unique(np.linspace(0, len(pieces) - 1, min(limit, len(pieces))).astype(int))
  rows = min(64, len(chosen))
  blocks = -(-len(chosen) // rows)
  tokens = np.full((blocks * rows, S), tokenizer.pad, np.int32)
  segments = np.zeros_like(tokens)  # 0: padding, not counted
  for row, i in enumerate(chosen):
    tokens[row, : len(pieces[i])], segments[row, : len(pieces[i])] = pieces[i], 1
  return transformer.Batch(*(x.reshape(blocks, rows, S) for x in (tokens, segments)))


def rate(kind: str, config: Config, workdir: Path, cache_dir: Path, progress: bool = True) -> None:
  """Writes scores/`kind`.npy [R] float32: phi_eta ("datarater") or the mean NLL under the scorer
  ("perplexity") of every training sequence that a run will draw; nan elsewhere.

  Both scorers are frozen, so this equals scoring each pool when it is drawn.
  """
  path = workdir / "scores" / f"{kind}.npy"
  if hosts.as_leader(path.exists()):
    return
  path.parent.mkdir(exist_ok=True)
  inputs = open_inputs(config, cache_dir)
  split = inputs.corpus.splits["train"]
  if kind == "datarater":
    score = inputs.rater.score
  else:
    run = scorer_run(config)
    model = language_model(config, run.model, inputs.corpus.vocab_size)
    params = pretrain.trained(workdir / "runs" / run.name, model, costs(config).recipes[run.model])
    nll = jax.jit(
      lambda params, batch: sharding.replicate(
        model.loss(params, jnp.zeros(len(batch.tokens)), batch)[1]
      )
    )
    score = lambda batch: nll(params, sharding.shard(batch, "data"))
  rows = _rows_drawn(config, len(split.tokens), kind)
  values = np.full(len(split.tokens), np.nan, np.float32)
  shown = kind if progress and hosts.is_leader() else None
  values[rows] = score_sequences(score, split, rows, progress=shown)
  check(np.isfinite(values[rows]).all(), f"some {kind} scores are not finite: train it again")
  if hosts.is_leader():
    write_atomically(path, lambda file: np.save(file, values))
  hosts.wait_for_all(kind)


def _rows_drawn(config: Config, rows: int, kind: str) -> np.ndarray:
  """The rows, sorted, that fall into a pool of some run with this kind of scores."""
  rhos = [config.discard, *config.sweep_discard]
  drawn = np.zeros(rows, bool)
  for model in config.models:
    recipe = costs(config).recipes[model]
    draws = recipe.steps * max(selection.pool_size(kind, recipe.batch, rho) for rho in rhos)
    if draws >= rows:
      return np.arange(rows)
    for seed in config.seeds:
      drawn[drawn_rows(rows, seed, 0, draws)] = True
  return np.flatnonzero(drawn)


def train_run(
  run: Run, config: Config, workdir: Path, cache_dir: Path, progress: bool = True
) -> None:
  """Trains one language model in its folder of the workdir, unless it is finished."""
  inputs, recipe = open_inputs(config, cache_dir), costs(config).recipes[run.model]
  model = language_model(config, run.model, inputs.corpus.vocab_size)
  sets = {name: sharding.shard(rows, None, "data") for name, rows in inputs.eval_sets.items()}

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
  progress &= hosts.is_leader()
  pretrain.pretrain(folder, model, recipe, run.seed, batches, measure, progress)
  hosts.wait_for_all(run.name)


@functools.cache
def logprob(config: Config, size: str, vocab_size: int):
  shape = model_config(config, size, vocab_size)
  of_rows = jax.jit(multiple_choice.sequence_logprob(shape, config.loss_backend))
  return lambda params, *rows: of_rows(params, *sharding.shard(rows, "data"))


def selected_batches(
  run: Run, recipe: pretrain.Recipe, workdir: Path, corpus: Corpus, start_call: int
) -> Iterator[transformer.Batch]:
  """Batches [steps_per_call, N, S]: the N sequences of each pool that the policy keeps, a function
  of (run, step) alone."""
  batch, per_call = recipe.batch, recipe.steps_per_call
  split = corpus.splits["outer" if run.policy == "scorer" else "train"]
  rows = len(split.tokens)
  kinds = {"datarater": "datarater"} | dict.fromkeys(selection.PERPLEXITY, "perplexity")
  values = np.zeros(rows, np.float32)
  if run.policy in kinds:
    values = np.load(workdir / "scores" / f"{kinds[run.policy]}.npy")
  policy = "none" if run.policy == "scorer" else run.policy
  pool = selection.pool_size(policy, batch, run.discard)
  check(rows >= pool, f"the split has {rows} sequences, a pool takes {pool}: use more data")

  def rows_of_step(step):
    drawn = drawn_rows(rows, run.seed, step * pool, pool)
    rng = np.random.default_rng([run.seed, step])
    return drawn[selection.select(policy, values[drawn], batch, rng)]

  def rows_of_call(call):
    return np.stack([rows_of_step(call * per_call + i) for i in range(per_call)])

  return row_batches(split, rows_of_call, start_call)
