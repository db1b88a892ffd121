"""The steps of evaluate.py: opens its inputs, rates sequences, trains a model on a policy's choice.

Axes: R rows of the training split, N sequences of a batch, S tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import selection
from corpus.batches import Corpus, drawn_rows, load_corpus, row_batches
from corpus.documents import Document, read_documents, split_of
from corpus.packing import cut
from corpus.tokenizer import Tokenizer
from evaluation import multiple_choice, plan, pretrain
from evaluation.plan import Config, Run, costs, language_model
from rating import TrainedRater, open_rater, pad_pieces, score_sequences
from runtime import hosts, sharding
from runtime.cli import check
from runtime.files import write_atomically
from transformer import Batch


class Inputs(NamedTuple):
  corpus: Corpus
  rater: TrainedRater
  eval_sets: dict[str, Batch]  # name -> rows [R, S]
  questions: dict[str, list[multiple_choice.Question]]  # by task


@functools.lru_cache(maxsize=1)
def open_inputs(config: Config, cache_dir: Path) -> Inputs:
  settings = plan.rater_settings(config)
  corpus = load_corpus(settings, cache_dir)
  texts = {name: [] for name in plan.VALIDATION}
  for document in corpus.validation_documents():
    half = "validation" if split_of(document.text, corpus.config)[1] & 1 else "selection"
    name = f"{half}_noisy" if document.noise > 0 else half
    if name in texts:
      texts[name].append(document)
  whole = dataclasses.replace(corpus.config, outer_data=(), max_documents=None)
  for name in config.eval_data:
    texts[Path(name).name] = read_documents(dataclasses.replace(whole, data=(name,)))
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
) -> Batch | None:
  """At most `limit` pieces of the documents, as a Batch [R, S]; None without any."""
  texts = [document.text for document in documents]
  pieces = [piece for tokens in tokenizer.encode(texts) for piece in cut(tokens, S)]
  if not pieces:
    return None
  chosen = np.unique(np.linspace(0, len(pieces) - 1, min(limit, len(pieces))).astype(int))
  pieces = [(i, pieces[i]) for i in chosen]
  return pad_pieces(pieces, len(pieces), S, tokenizer.pad).batch


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
  split, score = inputs.corpus.splits["train"], inputs.rater.score
  if kind == "perplexity":
    run = plan.scorer_run(config)
    model = language_model(config, run.model, inputs.corpus.tokenizer.vocab_size)
    params = pretrain.trained(workdir / "runs" / run.name, model, costs(config).recipes[run.model])
    score = pretrain.sequence_nll(model, params)
  rows = _rows_drawn(config, len(split.tokens), kind)
  values = np.full(len(split.tokens), np.nan, np.float32)
  shown = f"{kind} scores" if progress and hosts.is_leader() else None
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
  corpus, progress = inputs.corpus, progress and hosts.is_leader()
  model = language_model(config, run.model, corpus.tokenizer.vocab_size)

  def measure(params):
    nll = functools.partial(pretrain.mean_nll, model, params)
    row = {"nll": {name: nll(rows) for name, rows in inputs.eval_sets.items()}}
    if inputs.questions:
      logprob = functools.partial(multiple_choice.sequence_logprob, model, params)
      score = lambda *rows: logprob(*sharding.shard(rows, "data"))
      how = corpus.tokenizer, corpus.config.sequence_length
      row["accuracy"] = {
        task: multiple_choice.accuracy(score, questions, *how)["accuracy"]
        for task, questions in inputs.questions.items()
      }
    return row

  batches = functools.partial(selected_batches, run, recipe, workdir, corpus)
  folder = workdir / "runs" / run.name
  pretrain.pretrain(folder, model, recipe, run.seed, batches, measure, progress)
  hosts.wait_for_all(run.name)


def selected_batches(
  run: Run, recipe: pretrain.Recipe, workdir: Path, corpus: Corpus, start_call: int
) -> Iterator[Batch]:
  """Batches [steps_per_call, N, S]: the N sequences of each pool that the policy keeps, a function
  of (run, step) alone."""
  policy, split = run.policy, corpus.splits["train"]
  if policy == "scorer":
    policy, split = "none", corpus.splits["outer"]
  rows, per_call = len(split.tokens), recipe.steps_per_call
  values = np.zeros(rows, np.float32)
  if policy not in ("none", "random"):
    kind = "perplexity" if policy in selection.PERPLEXITY else policy
    values = np.load(workdir / "scores" / f"{kind}.npy")
  pool = selection.pool_size(policy, recipe.batch, run.discard)
  check(rows >= pool, f"the split has {rows} sequences, a pool takes {pool}: use more data")

  def rows_of_step(step):
    drawn = drawn_rows(rows, run.seed, step * pool, pool)
    rng = np.random.default_rng([run.seed, step])
    return drawn[selection.select(policy, values[drawn], recipe.batch, rng)]

  def rows_of_call(call):
    return np.stack([rows_of_step(call * per_call + i) for i in range(per_call)])

  return row_batches(split, rows_of_call, start_call)
