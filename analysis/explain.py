"""Explains the scores: by source, by the mixture left after discarding, by simple heuristics.

Axes: U units, F heuristics.
"""

import numpy as np
import scipy.stats
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.model_selection import RepeatedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.heuristics import NAMES
from analysis.training_report import noise_table, rank_sources
from analysis.units import Units
from runtime.cli import check
from selection import top_k_mask

DISCARDS = tuple(i / 10 for i in range(10))
ALPHA, FOLDS, REPEATS = 0.03, 10, 5  # the paper's Lasso, on z-scores


def analyse(units: Units, seed: int = 0) -> dict:
  """All numbers of the report, as plain lists and dictionaries."""
  noise = units.noise[np.isfinite(units.noise)]
  known = len(set(noise)) > 1
  return {
    "kind": units.kind,
    "by_source": by_source(units.scores, units.noise, units.source),
    "discards": DISCARDS,
    "mixture": implied_mixture(units.scores, units.source, DISCARDS),
    "noise": noise_table(units.scores, units.noise, units.source) if known else None,
    **explain(units.features, units.scores, seed),
  }


def by_source(
  scores: np.ndarray, noise: np.ndarray, source: np.ndarray
) -> dict[str, dict[str, float]]:
  """Count, mean and quantiles of each source's clean units, the best mean first.

  Sources without clean units come last, with the numbers of their `corrupted` units.
  """
  table = {}
  for ranked in rank_sources(scores.astype(float), noise, source):
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
  """Each source's share of the remaining units, at each discarded fraction (Fig. 7b)."""
  kept = [np.asarray(top_k_mask(scores, discard)) for discard in discards]
  return {
    name: [float(np.mean(source[mask] == name)) for mask in kept]
    for name in sorted(set(source.tolist()))
  }


def explain(features: np.ndarray, scores: np.ndarray, seed: int = 0) -> dict:
  """Pearson r of each heuristic, OLS on all, cross-validated Lasso, on z-scores (Figs. 14, 15).

  Heuristics that are equal for every unit are listed in `constant` and left out. Where some are
  linear combinations of others (`rank` below `heuristics`), OLS takes the least-norm solution.
  """
  varies = np.ptp(features, axis=0) > 0
  names = [name for name, v in zip(NAMES, varies, strict=True) if v]
  check(len(names) > 0, "every heuristic is equal for every unit: give more varied text")
  x = StandardScaler().fit_transform(features[:, varies])
  y = (scores.astype(float) - scores.mean(dtype=float)) / scores.std(dtype=float)
  pearson = {}
  for name, column in zip(names, x.T, strict=True):
    result = scipy.stats.pearsonr(column, y)
    low, high = result.confidence_interval(0.95)
    pearson[name] = {"r": float(result.statistic), "ci95": [float(low), float(high)]}
  ols = LinearRegression().fit(x, y)
  lasso = zip(names, Lasso(ALPHA).fit(x, y).coef_.tolist(), strict=True)
  largest_first = sorted(lasso, key=lambda item: -abs(item[1]))
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
      "coefficients": {name: value for name, value in largest_first if value},
    },
  }
