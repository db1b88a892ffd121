"""What a trained rater likes: its scores by source and against simple heuristics, as one HTML page.

  python analyse.py --rater=runs/demo --output=runs/demo/analysis              # validation split
  python analyse.py --rater=runs/demo --output=runs/other --data='texts/*.jsonl'

Score distributions and the mixture implied by discarding the lowest (the paper's Fig. 7), documents
rated lowest and highest (Fig. 8), and how far the heuristics of Table 1 explain the scores: Pearson
correlations, OLS and Lasso (Figs. 14, 15).

The unit is what the rater was trained to rate. A run of --packing=document: a document, its score
the mean over its pieces. A run of --packing=pack: a packed sequence of the validation split, the
text of its documents joined by newlines. With --data always a document.

Writes report.html, analysis.json (all numbers) and scores.jsonl (a line per unit). Axes: U units,
F heuristics.
"""

import dataclasses
import heapq
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
from absl import flags
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.model_selection import RepeatedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import analysis_page
import cli
import data
import datarater
import report
import train
from cli import check, option
from heuristics import NAMES, heuristics
from transformer import Batch

DISCARDS = tuple(i / 10 for i in range(10))
ALPHA, FOLDS, REPEATS = 0.03, 10, 5  # of the paper's Lasso, on z-scores
MIN_UNITS = 2 * FOLDS  # R^2 of a fold needs two


@dataclasses.dataclass(frozen=True)
class Config:
  data: tuple[str, ...] = option(
    (), "files, globs, folders or hf:NAME[:CONFIG[:SPLIT]]; default the run's validation split"
  )
  documents: int = option(5000, "documents (or packed sequences) to rate, at most")
  text_field: str | None = option(None, "of --data; default as in the rater's run")
  source_field: str | None = option(None, "of --data; default as in the rater's run")
  noise_field: str | None = option(None, "of --data; default as in the rater's run")
  seed: int = option(0, "of the cross-validation's folds")

  def __post_init__(self):
    check(self.documents >= MIN_UNITS, f"--documents={self.documents} is below {MIN_UNITS}")


class Units(NamedTuple):
  """What is rated, with the ratings."""

  kind: str  # "document" or "packed sequence"
  texts: list[str]
  ids: list[str]
  source: np.ndarray  # [U] str
  noise: np.ndarray  # [U] float; nan: unknown
  scores: np.ndarray  # [U] float32
  features: np.ndarray  # [U, F] float64, columns as in heuristics.NAMES


def main():
  FLAGS = flags.FLAGS
  check(FLAGS.rater is not None, "name the folder of a trained rater with --rater")
  check(FLAGS.output is not None, "name a folder for the report with --output")
  config = cli.config_from_flags(Config)
  output = Path(FLAGS.output)
  check(not output.exists() or output.is_dir(), f"--output={output} is a file: name a folder")
  rater = train.open_rater(FLAGS.rater)
  units = read_units(config, rater, Path(FLAGS.cache_dir))
  results = analyse(units, config.seed)
  header = {
    "rater": str(FLAGS.rater),
    "fingerprint": rater.fingerprint,
    "size": f"{rater.config.rater}, {rater.parameters:,} parameters",
    "data": ", ".join(config.data) or f"validation split of {', '.join(rater.config.data)}",
    "units": f"{len(units.texts):,} {units.kind}s of {len(set(units.source))} sources",
    "command": shlex.join(["python", *sys.argv]),
  }
  write(output, units, header | results, analysis_page.render(units, header, results))
  fit = results["lasso"]
  print(
    f"{header['units']}: OLS R^2 {results['ols']['r2']:.3f}, Lasso R^2 {fit['r2_mean']:.3f} with "
    f"{len(fit['coefficients'])} non-zero coefficients\n{output / 'report.html'}"
  )


def read_units(config: Config, rater: train.TrainedRater, cache_dir: Path) -> Units:
  """Text to rate, rated.

  Raises:
    UserError: too little text, or scores that are all equal or not finite.
  """
  data_config = train.data_config(rater.config)
  if config.data:
    names = ("text_field", "source_field", "noise_field")
    given = {name: getattr(config, name) for name in names if getattr(config, name)}
    documents = sample(dataclasses.replace(data_config, data=config.data, **given), config)
  else:
    corpus = data.load_corpus(data_config, cache_dir)
    if data_config.packing == "pack":
      return _checked(_packed_units(corpus, rater, config.documents))
    documents = corpus.validation_documents(config.documents)
  return _checked(_document_units(documents, rater))


def sample(data_config: data.DataConfig, config: Config) -> list[data.Document]:
  """Documents drawn by a hash of their text, of the first 100 x --documents of the data."""
  limited = dataclasses.replace(data_config, outer_data=(), max_documents=100 * config.documents)
  return heapq.nsmallest(
    config.documents,
    data.read_documents(limited),
    key=lambda document: data.split_of(document.text, limited)[1],
  )


def analyse(units: Units, seed: int = 0) -> dict:
  """All numbers of the report, as plain lists and dictionaries."""
  noise = units.noise[np.isfinite(units.noise)]
  known = len(set(noise)) > 1
  return {
    "kind": units.kind,
    "by_source": by_source(units.scores, units.noise, units.source),
    "discards": DISCARDS,
    "mixture": implied_mixture(units.scores, units.source, DISCARDS),
    "noise": report.noise_table(units.scores, units.noise, units.source) if known else None,
    **explain(units.features, units.scores, seed),
  }


def by_source(
  scores: np.ndarray, noise: np.ndarray, source: np.ndarray
) -> dict[str, dict[str, float]]:
  """Count, mean and quantiles of each source's clean units, the best mean first.

  A source without clean units comes last, with the numbers of its `corrupted` units.
  """
  table = {}
  for ranked in report.rank_sources(scores.astype(float), noise, source):
    x = ranked.ranked
    quantiles = np.quantile(x, (0, 0.25, 0.5, 0.75, 1)).tolist()
    names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
    table[ranked.name] = {"units": len(x), "corrupted": len(ranked.corrupted)}
    table[ranked.name] |= {"mean": float(x.mean()), "std": float(x.std())}
    table[ranked.name] |= dict(zip(names, quantiles, strict=True))
  return table


def implied_mixture(
  scores: np.ndarray, source: np.ndarray, discards: tuple[float, ...]
) -> dict[str, list[float]]:
  """Each source's share of the units that are left, at each discarded fraction (Fig. 7b)."""
  kept = [np.asarray(datarater.top_k_mask(scores, discard)) for discard in discards]
  return {
    name: [float(np.mean(source[mask] == name)) for mask in kept]
    for name in sorted(set(source.tolist()))
  }


def explain(features: np.ndarray, scores: np.ndarray, seed: int = 0) -> dict:
  """Pearson r of each heuristic, OLS on all, cross-validated Lasso: of z-scores (Figs. 14, 15).

  A heuristic that is the same for every unit is named in `constant` and takes no part. Where some
  follow exactly from others (`rank` below their number), OLS takes the solution of least norm.
  """
  varies = np.ptp(features, axis=0) > 0
  names = [name for name, v in zip(NAMES, varies, strict=True) if v]
  check(len(names) > 0, "every heuristic is the same for every unit: give more varied text")
  x = StandardScaler().fit_transform(features[:, varies])
  y = (scores.astype(float) - scores.mean(dtype=float)) / scores.std(dtype=float)
  pearson = {}
  for name, column in zip(names, x.T, strict=True):
    result = scipy.stats.pearsonr(column, y)
    low, high = result.confidence_interval(0.95)
    pearson[name] = {"r": float(result.statistic), "ci95": [float(low), float(high)]}
  ols = LinearRegression().fit(x, y)
  lasso = Lasso(ALPHA).fit(x, y)
  folds = RepeatedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=seed)
  scaled = make_pipeline(StandardScaler(), Lasso(ALPHA))  # z-scores of the other folds
  held_out = cross_val_score(scaled, features[:, varies], y, cv=folds)
  return {
    "constant": [name for name in NAMES if name not in names],
    "pearson": dict(sorted(pearson.items(), key=lambda item: -item[1]["r"])),
    "ols": {
      "r2": float(ols.score(x, y)),
      "heuristics": len(names),
      "rank": int(ols.rank_),
      "coefficients": dict(zip(names, ols.coef_.tolist(), strict=True)),
    },
    "lasso": {
      "alpha": ALPHA,
      "r2_mean": float(held_out.mean()),
      "r2_std": float(held_out.std()),
      "coefficients": {
        name: value
        for name, value in sorted(
          zip(names, lasso.coef_.tolist(), strict=True), key=lambda item: -abs(item[1])
        )
        if value
      },
    },
  }


def write(output: Path, units: Units, results: dict, page: str) -> None:
  """The three files of the report; each appears whole or not at all."""
  output.mkdir(parents=True, exist_ok=True)
  rows = []
  for i, (id, source) in enumerate(zip(units.ids, units.source.tolist(), strict=True)):
    noise = float(units.noise[i])
    row = {"id": id, "source": source, "noise": None if np.isnan(noise) else noise}
    row["score"] = float(units.scores[i])
    rows.append(row | dict(zip(NAMES, units.features[i].tolist(), strict=True)))
  for name, text in (
    ("scores.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)),
    ("analysis.json", json.dumps(results, indent=1, allow_nan=False) + "\n"),
    ("report.html", page),
  ):
    report.write_atomically(output / name, lambda f, text=text: f.write(text.encode()))


def _document_units(documents: list[data.Document], rater: train.TrainedRater) -> Units:
  length = rater.config.sequence_length
  tokens, rows = np.zeros((2, len(documents)))
  for _, index, count in data.document_batches(documents, rater.tokenizer, length, 64):
    np.add.at(tokens, index[index >= 0], count[index >= 0])
    np.add.at(rows, index[index >= 0], 1)
  texts = [document.text for document in documents]
  density = tokens / np.maximum(rows * length, 1)
  return Units(
    kind="document",
    texts=texts,
    ids=[document.id for document in documents],
    source=np.array([document.source for document in documents]),
    noise=np.array([document.noise for document in documents], float),
    scores=train.score_documents(rater.score, rater.eta, documents, rater.tokenizer, rater.config),
    features=_features(texts, density, np.ones(len(texts), int)),
  )


def _packed_units(corpus: data.Corpus, rater: train.TrainedRater, limit: int) -> Units:
  split = corpus.splits["validation"]
  rows = np.unique(np.linspace(0, len(split.tokens) - 1, limit).astype(int))
  tokens, segments = (np.asarray(a[rows], np.int32) for a in (split.tokens, split.segments))
  texts = [
    "\n".join(
      corpus.tokenizer.decode(row[segment == i]) for i in range(1, segment.max(initial=0) + 1)
    )
    for row, segment in zip(tokens, segments, strict=True)
  ]
  return Units(
    kind="packed sequence",
    texts=texts,
    ids=[f"validation row {row}" for row in rows],
    source=np.array(corpus.sources)[split.source[rows]],
    noise=np.asarray(split.noise[rows], float),
    scores=score_rows(rater, tokens, segments),
    features=_features(texts, (segments > 0).mean(axis=1), segments.max(axis=1)),
  )


def score_rows(
  rater: train.TrainedRater, tokens: np.ndarray, segments: np.ndarray, batch: int = 64
) -> np.ndarray:
  """phi_eta of packed rows [U, S] -> [U] float32, in batches of one shape."""
  scores = []
  for start in range(0, len(tokens), batch):
    part = np.arange(start, start + batch) % len(tokens)  # the last batch is filled from the front
    scores.append(np.asarray(rater.score(rater.eta, Batch(tokens[part], segments[part]))))
  return np.concatenate(scores)[: len(tokens)] if scores else np.zeros(0, np.float32)


def _features(texts: list[str], density: np.ndarray, articles: np.ndarray) -> np.ndarray:
  values = [
    list(heuristics(text, d, n).values())
    for text, d, n in zip(texts, density.tolist(), articles.tolist(), strict=True)
  ]
  return np.array(values, float).reshape(len(texts), len(NAMES))


def _checked(units: Units) -> Units:
  count = len(units.texts)
  check(
    count >= MIN_UNITS,
    f"there are {count} {units.kind}s to rate, {MIN_UNITS} are needed: give more text with --data",
  )
  check(np.isfinite(units.scores).all(), "the rater gives scores that are not finite: train anew")
  check(
    np.ptp(units.scores) > 0,
    f"the rater gives every {units.kind} the same score: train it for more meta-steps",
  )
  return units


if __name__ == "__main__":
  flags.DEFINE_string("rater", None, "workdir of the run that trained the rater")
  flags.DEFINE_string("output", None, "folder of the report")
  flags.DEFINE_string("cache_dir", ".cache", "folder of the tokenised corpora")
  cli.define_flags(Config)
  cli.run(main)
