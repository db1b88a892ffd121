"""The report of analyse.py as one HTML page: no scripts, no requests, light and dark.

page.html is the template, in Jinja. All that it inserts, but figures, passes `printable`, which
names characters that are invisible or change the text's direction, and is then escaped.
"""

import re
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np

from analysis import figures, training_report
from analysis.heuristics import MEANING
from analysis.units import Units
from runtime.figures import short

MAX_SOURCES = 20  # groups in figures and tables; the smallest sources share one
MAX_ROWS = 100  # noise table
EXTREMES, MEDIANS, PER_SOURCE = 6, 4, 2  # documents shown
SHOWN_CHARS, SHOWN_LINES = 600, 12  # of a document before it is unfolded
MAX_CHARS = 6000  # of a document that is unfolded


def render(units: Units, header: dict[str, str], results: dict) -> str:
  """The page as a pure function of units.Units, the header and the results of explain.analyse."""
  group, order = _grouped(units.source)
  shares = _shares(results["mixture"], order)
  r = {name: value["r"] for name, value in results["pearson"].items()}  # the largest first
  coefficients = results["lasso"]["coefficients"]
  return _PAGE.render(
    header | results,
    order=order,
    count=len(set(units.source.tolist())),
    ranking=training_report.ranking_documents(units.noise, units.kind),
    scores=_scores(units, group),
    shares=shares,
    bands={_name(name): share for name, share in shares.items()},
    levels=units.noise,
    centered=_centered(units),
    r=r,
    intervals=[value["ci95"] for value in results["pearson"].values()],
    rises=[item for item in r.items() if item[1] > 0][:3],
    falls=[item for item in reversed(r.items()) if item[1] < 0][:3],
    coefficients=dict(sorted(coefficients.items(), key=lambda item: -item[1])),
    max_rows=MAX_ROWS,
    **_documents(units, group, order),
  )


def printable(text: str) -> str:
  """The text with <U+XXXX> for controls (except newline and tab), zero-width characters, changes of
  text direction, halves of surrogate pairs and noncharacters."""
  return re.sub(f"[{_HIDDEN}]", lambda match: f"<U+{ord(match[0]):04X}>", text)


_HIDDEN = (
  r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
  r"\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff"
)


def _name(source: str) -> str:
  """The name of a source or document on one line, shortened to 60 characters."""
  return short(printable(" ".join(source.split())), 60)


def _signed(value: float | None) -> str:
  return "" if value is None else f"{value:+.2f}"


_ENVIRONMENT = jinja2.Environment(
  autoescape=True,
  finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"name": _name, "signed": _signed}
_ENVIRONMENT.globals |= {"figures": figures, "meaning": MEANING}
_PAGE = _ENVIRONMENT.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))


def _grouped(source: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """(the group [U] of each unit: its source, or one group for all small sources; the groups' names,
  the most frequent source first)."""
  counts = Counter(source.tolist())
  names = [name for name, _ in counts.most_common()]
  if len(names) <= MAX_SOURCES:
    return source, names
  rest = f"{len(names) - MAX_SOURCES + 1} other sources"
  names = names[: MAX_SOURCES - 1]
  return np.where(np.isin(source, names), source, rest), [*names, rest]


def _scores(units: Units, group: np.ndarray) -> dict[str, np.ndarray]:
  """Label -> the scores that rank a group, the best median last."""
  ranked = training_report.rank_sources(units.scores.astype(float), units.noise, group, np.median)
  label = lambda s: _name(s.name) + ("" if len(s.clean) else " (corrupted)")
  return {label(source): source.ranked for source in reversed(ranked)}


def _shares(mixture: dict[str, list[float]], order: list[str]) -> dict[str, np.ndarray]:
  """Group -> its share of the units that remain at each discard."""
  shares = {name: np.array(mixture[name]) for name in order if name in mixture}
  for name in order:
    if name not in shares:  # the small ones together
      shares[name] = 1 - np.sum(list(shares.values()), axis=0)
  return shares


def _centered(units: Units) -> np.ndarray:
  """Scores minus the mean score of the source's clean text (of all its text where none is)."""
  centered = units.scores.astype(float)
  for source in training_report.rank_sources(centered.copy(), units.noise, units.source):
    centered[units.source == source.name] -= source.ranked.mean()
  return centered


def _documents(units: Units, group: np.ndarray, order: list[str]) -> dict:
  ranked = np.argsort(units.scores, kind="stable")
  last, middle = max(len(ranked) - 1, 1), max((len(ranked) - MEDIANS) // 2, 0)
  documents = [_document(units, i, rank / last) for rank, i in enumerate(ranked)]
  of_groups = {}
  for name in sorted(order):
    ranks = np.flatnonzero(group[ranked] == name)
    picked = dict.fromkeys([*ranks[:PER_SOURCE], *ranks[-PER_SOURCE:]])
    of_groups[name] = len(ranks), [documents[rank] for rank in picked]
  return {
    "lowest": documents[:EXTREMES],
    "middle": documents[middle : middle + MEDIANS],
    "highest": documents[::-1][:EXTREMES],
    "of_groups": of_groups,
  }


def _document(units: Units, i: int, quantile: float) -> dict:
  text, noise = units.texts[i], units.noise[i]
  shown = "".join(text[:SHOWN_CHARS].splitlines(keepends=True)[:SHOWN_LINES])
  return {
    "score": f"{units.scores[i]:+.3f}",
    "quantile": f"{quantile:.3f}",
    "source": units.source[i],
    "noise": f", noise {noise:.2g}" if np.isfinite(noise) else "",
    "id": units.ids[i],
    "characters": len(text),
    "shown": shown,
    "rest": text[len(shown) : MAX_CHARS],
  }
