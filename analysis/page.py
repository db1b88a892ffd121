"""The report of analyse.py as one HTML page: no scripts, no requests, light and dark.

page.html is the template; each function below fills some of its fields. All text from outside
passes `printable`, which names characters that are invisible or change the text's direction, and
then `html.escape`.
"""

import html
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from analysis import figures, training_report
from analysis.heuristics import MEANING
from analysis.units import Units
from runtime.figures import short

PAPER_LASSO = {
  "num_articles": 0.42,
  "c4_curly_brace": 0.27,
  "text_length_cutoff": 0.19,
  "word_count": 0.13,
  "non_alphanumeric_fraction": -0.33,
}
MAX_SOURCES = 20  # groups in figures and tables; the smallest sources share one
MAX_ROWS = 100  # noise table
EXTREMES, MEDIANS, PER_SOURCE = 6, 4, 2  # documents shown
SHOWN_CHARS, SHOWN_LINES = 600, 12  # of a document before it is unfolded
MAX_CHARS = 6000  # of a document that is unfolded
_PAGE = Path(__file__).with_name("page.html").read_text("utf-8")


def render(units: Units, header: dict[str, str], results: dict) -> str:
  """The page as a pure function of units.Units, the header and the results of explain.analyse."""
  group, order = _grouped(units.source)
  page = _PAGE
  if results["noise"] is None:
    page = re.sub('<section class="noise">.*?</section>', "", page, flags=re.DOTALL)
  fields = {name: _text(value) for name, value in header.items()}
  fields |= {"kind": units.kind, "kinds": f"{units.kind.capitalize()}s"}
  fields |= {"folded": _folded(order, units.source)}
  fields |= _distributions(units, group) | _mixture(results, order) | _noise(units, results)
  fields |= _explained(results) | _documents(units, group, order)
  return string.Template(page).substitute(fields)


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


def _text(text: str) -> str:
  return html.escape(printable(str(text)))


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


def _folded(order: list[str], source: np.ndarray) -> str:
  """A sentence about the sources that share a group, if any do."""
  count = len(set(source.tolist()))
  if count == len(order):
    return ""
  named = f" The {len(order) - 1} most frequent of {count} sources are shown by name"
  return f"{named}, all others as one group; analysis.json lists each."


def _distributions(units: Units, group: np.ndarray) -> dict[str, str]:
  ranked = training_report.rank_sources(units.scores.astype(float), units.noise, group, np.median)
  scores = {}
  for source in reversed(ranked):
    scores[_name(source.name) + ("" if len(source.clean) else " (corrupted)")] = source.ranked
  return {
    "ranking": training_report.ranking_documents(units.noise, units.kind),
    "distributions": _figure("scores by source", "scores", figures.distributions, scores),
  }


def _mixture(results: dict, order: list[str]) -> dict[str, str]:
  discards, mixture = results["discards"], results["mixture"]
  shares = {name: np.array(mixture[name]) for name in order if name in mixture}
  for name in order:
    if name not in shares:  # the small ones together
      shares[name] = 1 - np.sum(list(shares.values()), axis=0)
  color = dict(zip(shares, figures.PALETTE, strict=False))
  bands = {_name(name): share for name, share in shares.items()}
  rows = [
    [f'<span class="swatch" style="background:{color[name]}"></span>{_text(_name(name))}']
    + [f"{100 * share:.1f}" for share in shares[name]]
    for name in reversed(shares)
  ]
  return {
    "included": "; corrupted ones count" if results["noise"] else "",
    "mixture": _figure("implied mixture", "mixture", figures.mixture, discards, bands),
    "mixture_table": _table(["discarded", *(f"{discard:.1f}" for discard in discards)], rows),
  }


def _noise(units: Units, results: dict) -> dict[str, str]:
  table = results["noise"]
  if table is None:
    return {}
  auroc = {name: f"{value:.3f}" for name, value in table["auroc"].items()}
  ranked = sorted(table["spearman"].items(), key=lambda item: item[1])
  rows = [[_text(_name(name)), f"{rho:+.3f}", auroc.get(name, "")] for name, rho in ranked]
  notes = ""
  if len(rows) > MAX_ROWS:
    notes = f"<p>The first {MAX_ROWS} of {len(rows)} sources; analysis.json lists each.</p>"
  if few := table["too_few_documents"]:
    more = f" and {len(few) - 40} more" if len(few) > 40 else ""
    notes += f"<p>Too few to judge: {_text(', '.join(map(_name, few[:40])))}{more}.</p>"
  centered = units.scores.astype(float)
  for source in training_report.rank_sources(centered.copy(), units.noise, units.source):
    centered[units.source == source.name] -= source.ranked.mean()
  title = "score against noise level"
  return {
    "noise": _figure(title, "noise", figures.noise, units.noise, centered),
    "noise_table": _table(["source", "Spearman", "AUROC"], rows[:MAX_ROWS]),
    "noise_notes": notes,
  }


def _explained(results: dict) -> dict[str, str]:
  pearson, ols, lasso = results["pearson"], results["ols"], results["lasso"]
  r = {name: value["r"] for name, value in pearson.items()}
  intervals = [value["ci95"] for value in pearson.values()]
  coefficients = dict(sorted(lasso["coefficients"].items(), key=lambda item: -item[1]))

  def strongest(sign: int) -> str:
    largest = sorted(r.items(), key=lambda item: -sign * item[1])[:3]
    named = [f"<code>{name}</code> ({x:+.2f})" for name, x in largest if sign * x > 0]
    return ", ".join(named) or "none"

  rows = []
  for name, (low, high) in zip(r, intervals, strict=True):
    fitted = [_signed(fit.get(name)) for fit in (coefficients, PAPER_LASSO)]
    correlation = [f"{r[name]:+.3f}", f"{low:+.2f} to {high:+.2f}"]
    rows.append([f"<code>{name}</code>", *correlation, *fitted, MEANING[name]])
  constant = ", ".join(f"<code>{name}</code>" for name in results["constant"])
  notes = f"<p>Left out, equal for every {results['kind']}: {constant}.</p>" if constant else ""
  if ols["rank"] < ols["heuristics"]:
    rank = f"rank {ols['rank']} of {ols['heuristics']}"
    notes += f"<p>Some heuristics are linear combinations of others here ({rank}): "
    notes += "least squares takes the solution of least norm.</p>"
  if results["noise"] is not None:
    notes += "<p>Corruption changes the heuristics too, so they partly measure it here.</p>"
  names = ["heuristic", "r", "95%", "Lasso", "paper's Lasso", "meaning"]
  interval = "Pearson r, 95% interval"
  bars, axis = "<p>All are zero.</p>", "coefficient of z-scores"
  if coefficients:
    bars = _figure("Lasso coefficients", "lasso", figures.bars, coefficients, axis)
  return {
    "explained": f"{100 * max(lasso['r2_mean'], 0):.0f}",
    "in_sample": f"{100 * ols['r2']:.0f}",
    "heuristics": str(ols["heuristics"]),
    "rises": strongest(1),
    "falls": strongest(-1),
    "ols_r2": f"{ols['r2']:.3f}",
    "alpha": str(lasso["alpha"]),
    "lasso_r2": f"{lasso['r2_mean']:.3f} ± {lasso['r2_std']:.3f}",
    "lasso_count": str(len(coefficients)),
    "c4_r": _signed(r.get("passes_all_c4_filters")),
    "notes": notes,
    "pearson": _figure("correlations", "pearson", figures.bars, r, interval, intervals),
    "lasso": bars,
    "heuristics_table": _table(names, rows, left=len(names) - 1),
  }


def _documents(units: Units, group: np.ndarray, order: list[str]) -> dict[str, str]:
  ranked = np.argsort(units.scores, kind="stable")
  rank = np.empty(len(ranked), int)
  rank[ranked] = np.arange(len(ranked))

  def show(picked: Iterable[int]) -> str:
    return "\n".join(_document(units, i, rank[i] / max(len(ranked) - 1, 1)) for i in picked)

  middle, folded = max((len(ranked) - MEDIANS) // 2, 0), []
  for name in sorted(order):
    members = ranked[group[ranked] == name]
    picked = show(dict.fromkeys([*members[:PER_SOURCE], *members[-PER_SOURCE:]]))
    title = f"{_text(_name(name))} ({len(members)})"
    folded.append(f"<details><summary>{title}</summary>\n{picked}\n</details>")
  return {
    "lowest": show(ranked[:EXTREMES]),
    "median": show(ranked[middle : middle + MEDIANS]),
    "highest": show(ranked[::-1][:EXTREMES]),
    "by_source": "\n".join(folded),
  }


def _document(units: Units, i: int, quantile: float) -> str:
  text = units.texts[i]
  noise = f", noise {units.noise[i]:.2g}" if np.isfinite(units.noise[i]) else ""
  shown = "".join(text[:SHOWN_CHARS].splitlines(keepends=True)[:SHOWN_LINES])
  rest, cut = text[len(shown) : MAX_CHARS], len(text) - MAX_CHARS
  more = ""
  if rest.strip():
    tail = f"\n<p class=faint>{cut:,} more characters are not shown.</p>" if cut > 0 else ""
    more = (
      f"<details><summary>{len(rest):,} more characters</summary>\n"
      f'<pre dir="auto">\n{_text(rest)}</pre>{tail}</details>'
    )
  return (
    f"<article><header><b>{units.scores[i]:+.3f}</b> (quantile {quantile:.3f}), "
    f"<bdi>{_text(_name(units.source[i]))}</bdi>{noise}, {len(text):,} characters "
    f'<span class="faint"><bdi>{_text(_name(units.ids[i]))}</bdi></span></header>\n'
    f'<pre dir="auto">\n{_text(shown)}</pre>{more}</article>'
  )


def _figure(*args) -> str:  # of figures.svg
  return f'\n<div class="wide">{figures.svg(*args)}</div>\n'


def _table(names: list[str], rows: list[list[str]], left: int | None = None) -> str:
  def line(cells, tag):
    kinds = [' class="left"' if i == left else "" for i in range(len(cells))]
    return "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True))

  body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
  head = f"<thead><tr>{line(names, 'th')}</tr></thead>"
  return f'\n<div class="wide" tabindex="0"><table>{head}\n<tbody>{body}</tbody></table></div>\n'


def _signed(value: float | None) -> str:
  return "" if value is None else f"{value:+.2f}"
