"""The units of a rater's report: documents or packed sequences, their scores and heuristics.

Axes: U units, F heuristics.
"""

import dataclasses
import heapq
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.heuristics import NAMES, heuristics
from corpus.batches import Corpus, load_corpus
from corpus.documents import DataConfig, Document, read_documents, split_of
from rating import TrainedRater, make_rows, score_rows, score_sequences
from runtime.cli import check, check_fields, option

MIN_UNITS = 20  # R^2 of each of 10 folds needs two
_FIELD = "as in train.py, for --data; default the rater's"


@dataclasses.dataclass(frozen=True)
class Config:
  """The text to analyze."""

  data: tuple[str, ...] = option(
    (), "as in train.py; default the validation split of the rater's run", section="Text"
  )
  documents: int = option(5000, "documents or packed sequences to rate at most", at_least=MIN_UNITS)
  text_field: str | None = option(None, _FIELD)
  source_field: str | None = option(None, _FIELD)
  noise_field: str | None = option(None, _FIELD)
  seed: int = option(0, "seed of the folds of the cross-validation")
  __post_init__ = check_fields


class Units(NamedTuple):
  """Rated text and its heuristics."""

  kind: str  # "document" or "packed sequence"
  texts: list[str]
  ids: list[str]
  source: np.ndarray  # [U] str
  noise: np.ndarray  # [U] float; nan: unknown
  scores: np.ndarray  # [U] float32
  features: np.ndarray  # [U, F] float64, columns as in heuristics.NAMES


def read_units(config: Config, rater: TrainedRater, cache_dir: Path) -> Units:
  """Reads text and scores it.

  Raises:
    UserError: too little text, or scores that are all equal or not finite.
  """
  if config.data:
    names = ("text_field", "source_field", "noise_field")
    fields = {name: getattr(config, name) for name in names if getattr(config, name)}
    other = dataclasses.replace(rater.config, data=config.data, **fields)
    units = _document_units(sample(other, config.documents), rater)
  else:
    corpus = load_corpus(rater.config, cache_dir)
    if rater.config.packing == "pack":
      units = _packed_units(corpus, rater, config.documents)
    else:
      units = _document_units(corpus.validation_documents(config.documents), rater)
  n, kind = len(units.texts), units.kind
  enough = f"{MIN_UNITS} are needed: give more text with --data"
  check(n >= MIN_UNITS, f"there are {n} {kind}s to rate, {enough}")
  check(np.isfinite(units.scores).all(), "the rater gives scores that are not finite: train again")
  equal = f"the rater gives every {kind} the same score: train it for more meta-steps"
  check(np.ptp(units.scores) > 0, equal)
  return units


def sample(config: DataConfig, count: int) -> list[Document]:
  """`count` of the first 100 x `count` documents of the data, drawn by a hash of their text."""
  limited = dataclasses.replace(config, outer_data=(), max_documents=100 * count)
  key = lambda document: split_of(document.text, limited)[1]
  return heapq.nsmallest(count, read_documents(limited), key)


def _document_units(documents: list[Document], rater: TrainedRater) -> Units:
  texts, S = [d.text for d in documents], rater.config.sequence_length
  tokens, pieces = np.zeros((2, len(texts)))

  def count(part):
    real = part.index >= 0
    np.add.at(tokens, part.index[real], part.tokens[real])
    np.add.at(pieces, part.index[real], 1)

  scores = score_rows(rater.score, make_rows(texts, rater.tokenizer, S), len(texts), count)
  density = tokens / np.maximum(pieces * S, 1)
  return Units(
    kind="document",
    texts=texts,
    ids=[d.id for d in documents],
    source=np.array([d.source for d in documents]),
    noise=np.array([d.noise for d in documents], float),
    scores=scores,
    features=_features(texts, density, np.ones(len(texts), int)),
  )


def _packed_units(corpus: Corpus, rater: TrainedRater, limit: int) -> Units:
  split = corpus.splits["validation"]
  rows = np.unique(np.linspace(0, len(split.tokens) - 1, limit).astype(int))
  tokens, segments = (np.asarray(a[rows], np.int32) for a in (split.tokens, split.segments))
  decode = corpus.tokenizer.decode
  texts = [
    "\n".join(decode(row[segment == i]) for i in range(1, segment.max(initial=0) + 1))
    for row, segment in zip(tokens, segments, strict=True)
  ]
  return Units(
    kind="packed sequence",
    texts=texts,
    ids=[f"validation row {row}" for row in rows],
    source=np.array(corpus.sources)[split.source[rows]],
    noise=np.asarray(split.noise[rows], float),
    scores=score_sequences(rater.score, split, rows),
    features=_features(texts, (segments > 0).mean(axis=1), segments.max(axis=1)),
  )


def _features(texts: list[str], density: np.ndarray, articles: np.ndarray) -> np.ndarray:
  units = zip(texts, density.tolist(), articles.tolist(), strict=True)
  values = [list(heuristics(*unit).values()) for unit in units]
  return np.array(values, float).reshape(len(texts), len(NAMES))
