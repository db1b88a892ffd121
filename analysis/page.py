"""The report of analyse.py as one HTML page: no scripts, no requests, light and dark.

page.html is the template. All text from outside passes `printable`, which names characters that are
invisible or change the text's direction, and then `html.escape`.
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

PAPER = {
  "data": "25,600 packed sequences of the Pile, rater of 50M with inner models of 150M",
  "c4_r": 0.22,
  "ols_r2": 0.766,
  "lasso_r2": 0.753,
  "lasso_count": 11,
  "lasso": {
    "num_articles": 0.42,
    "c4_curly_brace": 0.27,
    "text_length_cutoff": 0.19,
    "word_count": 0.13,
    "non_alphanumeric_fraction": -0.33,
  },
}
MAX_SOURCES = 20  # groups in figures and tables; the smallest sources share one
MAX_ROWS = 100  # noise table
EXTREMES, MEDIANS, PER_SOURCE = 6, 4, 2  # documents shown
SHOWN_CHARS, SHOWN_LINES = 600, 12  # of a document before it is unfolded
MAX_CHARS = 6000  # of a document that is unfolded
_PAGE = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))


def render(units: Units, header: dict[str, str], results: dict) -> str:
  """The page as a pure function of units.Units, the header and the results of explain.analyse."""
  group, order = _grouped(units.source)
  sections = [
    _head(header),
    _numbers(results),
    _distributions(units, group, order),
    _mixture(units, results, order),
    _noise(units, results),
    _explained(results),
    _documents(units, group, order),
  ]
  title = f"What the rater likes: {_text(header['rater'])}"
  return _PAGE.substitute(title=title, body="\n".join(sections))


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
  name = printable(" ".join(source.split()))
  return name if len(name) <= 60 else f"{name[:40]}\u2026{name[-19:]}"


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
  return (
    f" The {len(order) - 1} most frequent of {count} sources are shown by name, all others as one "
    f"group; analysis.json lists each."
  )


def _head(header: dict[str, str]) -> str:
  rows = (
    ("rater", f"{_text(header['rater'])} ({_text(header['size'])})"),
    ("fingerprint", f"<code>{_text(header['fingerprint'])}</code>"),
    ("text", _text(header["data"])),
    ("rated", _text(header["units"])),
    ("command", f"<code>{_text(header['command'])}</code>"),
  )
  terms = "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in rows)
  return f"<h1>What the rater likes</h1>\n<dl>{terms}</dl>"


def _numbers(results: dict) -> str:
  ols, lasso, pearson = results["ols"], results["lasso"], results["pearson"]
  held_out = max(lasso["r2_mean"], 0)

  def strongest(sign: int) -> str:
    r = sorted((sign * value["r"], name) for name, value in pearson.items())[::-1][:3]
    named = [f"<code>{name}</code> ({sign * x:+.2f})" for x, name in r if x > 0]
    return ", ".join(named) or "none"

  return (
    f"<p>Simple heuristics explain {100 * held_out:.0f}% of the variance of the scores (Lasso, "
    f"cross-validated), {100 * ols['r2']:.0f}% with all {ols['heuristics']} in ordinary least "
    f"squares. The score rises most with {strongest(1)} and falls most with {strongest(-1)}.</p>"
  )


def _distributions(units: Units, group: np.ndarray, order: list[str]) -> str:
  ranked = training_report.rank_sources(units.scores.astype(float), units.noise, group, np.median)
  scores = {
    _name(s.name) + ("" if len(s.clean) else " (corrupted)"): s.ranked for s in reversed(ranked)
  }
  return (
    "<h2>Scores by source</h2>\n<p>Density, quartiles (bar) and median (dot) of the scores of each "
    f"source's {training_report.ranking_documents(units.noise, units.kind)}, the best median on "
    f"top; their number in brackets.{_folded(order, units.source)} As the paper's Fig. 7a.</p>"
    + _figure("scores by source", "scores", figures.distributions, scores)
  )


def _mixture(units: Units, results: dict, order: list[str]) -> str:
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
  return (
    f"<h2>Implied mixture</h2>\n<p>Each source's share of the {results['kind']}s that remain when "
    "the lowest-rated are discarded; corrupted ones count."
    f"{_folded(order, units.source)} As the paper's Fig. 7b.</p>"
    + _figure("implied mixture", "mixture", figures.mixture, discards, bands)
    + "<p>In percent, in the order of the bands:</p>"
    + _table(["discarded", *(f"{discard:.1f}" for discard in discards)], rows)
  )


def _noise(units: Units, results: dict) -> str:
  table = results["noise"]
  if table is None:
    return ""
  rows = [
    [
      _text(_name(name)),
      f"{rho:+.3f}",
      f"{table['auroc'][name]:.3f}" if name in table["auroc"] else "",
    ]
    for name, rho in sorted(table["spearman"].items(), key=lambda item: item[1])
  ]
  note = ""
  if len(rows) > MAX_ROWS:
    note = f"<p>The first {MAX_ROWS} of {len(rows)} sources; analysis.json lists each.</p>"
  if few := table["too_few_documents"]:
    more = f" and {len(few) - 40} more" if len(few) > 40 else ""
    note += f"<p>Too few to judge: {_text(', '.join(map(_name, few[:40])))}{more}.</p>"
  centered = units.scores.astype(float)
  for source in training_report.rank_sources(centered.copy(), units.noise, units.source):
    centered[units.source == source.name] -= source.ranked.mean()
  return (
    "<h2>Score against noise</h2>\n<p>Part of this text has a known share of its characters "
    "corrupted; the rater was never told. The figure shows scores minus the mean score of the "
    "source's clean text (of all its text where none is clean). The table shows for each source "
    "the Spearman correlation of noise level and score among its corrupted text (-1: noisier text "
    "always scores lower) and how well the score tells clean text from text with a level of 0.2 or "
    "more (AUROC; 1: perfectly).</p>"
    + _figure("score against noise level", "noise", figures.noise, units.noise, centered)
    + _table(["source", "Spearman", "AUROC"], rows[:MAX_ROWS])
    + note
  )


def _explained(results: dict) -> str:
  pearson, ols, lasso = results["pearson"], results["ols"], results["lasso"]
  r = {name: value["r"] for name, value in pearson.items()}
  intervals = [value["ci95"] for value in pearson.values()]
  coefficients = dict(sorted(lasso["coefficients"].items(), key=lambda item: -item[1]))
  fits = [
    ["OLS on all, R<sup>2</sup>", f"{ols['r2']:.3f}", f"{PAPER['ols_r2']:.3f}"],
    [
      f"Lasso, alpha {lasso['alpha']}, cross-validated R<sup>2</sup>",
      f"{lasso['r2_mean']:.3f} ± {lasso['r2_std']:.3f}",
      f"{PAPER['lasso_r2']:.3f}",
    ],
    ["Lasso, non-zero coefficients", str(len(coefficients)), str(PAPER["lasso_count"])],
    [
      "Pearson r of <code>passes_all_c4_filters</code>",
      _signed(r.get("passes_all_c4_filters")),
      _signed(PAPER["c4_r"]),
    ],
  ]
  rows = [
    [
      f"<code>{name}</code>",
      f"{value['r']:+.3f}",
      f"{value['ci95'][0]:+.2f} to {value['ci95'][1]:+.2f}",
      _signed(coefficients.get(name)),
      _signed(PAPER["lasso"].get(name)),
      MEANING[name],
    ]
    for name, value in pearson.items()
  ]
  constant = ", ".join(f"<code>{name}</code>" for name in results["constant"])
  notes = f"<p>Left out, equal for every {results['kind']}: {constant}.</p>" if constant else ""
  if ols["rank"] < ols["heuristics"]:
    notes += (
      f"<p>Some heuristics are linear combinations of others here (rank {ols['rank']} of "
      f"{ols['heuristics']}): least squares takes the solution of least norm.</p>"
    )
  if results["noise"] is not None:
    notes += "<p>Corruption changes the heuristics too, so they partly measure it here.</p>"
  names = ["heuristic", "r", "95%", "Lasso", "paper's Lasso", "meaning"]
  return (
    "<h2>What simple heuristics explain</h2>\n<p>Pearson correlation of each heuristic of the "
    "paper's Table 1 with the score, and linear fits of the score on all of them, z-scored. "
    "Cross-validated: mean and standard deviation over 5 times 10 folds. The paper's values come "
    f"from other text and another rater: {PAPER['data']}.</p>"
    + _table(["fit", "here", "paper (Pile)"], fits)
    + notes
    + "<h3>Correlation with the score</h3>"
    + _figure("correlations", "pearson", figures.bars, r, "Pearson r, 95% interval", intervals)
    + "<h3>Lasso coefficients that are not zero</h3>"
    + (
      _figure("Lasso coefficients", "lasso", figures.bars, coefficients, "coefficient of z-scores")
      if coefficients
      else "<p>All are zero.</p>"
    )
    + "<h3>All heuristics</h3>"
    + _table(names, rows, left=len(names) - 1)
  )


def _documents(units: Units, group: np.ndarray, order: list[str]) -> str:
  ranked = np.argsort(units.scores, kind="stable")
  rank = np.empty(len(ranked), int)
  rank[ranked] = np.arange(len(ranked))

  def show(picked: Iterable[int]) -> str:
    return "\n".join(_document(units, i, rank[i] / max(len(ranked) - 1, 1)) for i in picked)

  middle = max((len(ranked) - MEDIANS) // 2, 0)
  parts = [
    f"<h2>{units.kind.capitalize()}s</h2>\n<p>As the paper's Fig. 8. Invisible characters are "
    f"named: &lt;U+0000&gt;.{_folded(order, units.source)}</p>",
    f"<h3>Lowest scores</h3>\n{show(ranked[:EXTREMES])}",
    f"<h3>At the median</h3>\n{show(ranked[middle : middle + MEDIANS])}",
    f"<h3>Highest scores</h3>\n{show(ranked[::-1][:EXTREMES])}",
    "<h3>Lowest and highest of each source</h3>",
  ]
  for name in sorted(order):
    members = ranked[group[ranked] == name]
    picked = show(dict.fromkeys([*members[:PER_SOURCE], *members[-PER_SOURCE:]]))
    title = f"{_text(_name(name))} ({len(members)})"
    parts.append(f"<details><summary>{title}</summary>\n{picked}\n</details>")
  return "\n".join(parts)


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
