"""The plots of analyse.py's report, as SVG elements in the colors of the page.

Text stays text (searchable, in the browser's fonts). Text and lines are `currentColor`, so they
show on light and dark pages. The caller makes names from outside printable.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from runtime.figures import short

PALETTE = [matplotlib.colors.to_hex(matplotlib.colormaps["tab20"](i)) for i in range(20)]
BLUE, RED = "#4a8fd8", "#d9694f"
WIDTH = 5.6  # inches; narrow, so that text stays legible on a phone
INK = "#010203"  # placeholder that becomes currentColor
STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "datarater",  # the same plot gives the same bytes
  "font.family": ["DejaVu Sans"],
  "font.size": 8,
  "text.parse_math": False,  # a source may be called $x$
  "figure.constrained_layout.use": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
}
_INKED = "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"
STYLE |= dict.fromkeys(_INKED, INK)


def svg(title: str, key: str, draw: Callable[..., Figure], *args) -> str:
  """`draw(*args)` as one <svg> element; `key` makes its ids unique in the page."""
  with plt.rc_context(STYLE), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has other fonts
    figure, file = draw(*args), io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
  text = file.getvalue()
  start, body = text[text.index("<svg") :].strip().replace(INK, "currentColor").split(">", 1)
  start = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", start)
  start = start.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
  return start + ">" + re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", body)


def distributions(scores: dict[str, np.ndarray]) -> Figure:
  """Density, quartiles and median of each named group, the first at the bottom (Fig. 7a)."""
  figure, axis = plt.subplots(figsize=(WIDTH, 0.28 * len(scores) + 0.6))
  for y, values in enumerate(scores.values()):
    if len(values) > 4 and np.ptp(values) > 0:
      parts = axis.violinplot(values, [y], orientation="horizontal", widths=0.85, showextrema=False)
      plt.setp(parts["bodies"], facecolor=BLUE, alpha=0.55, edgecolor="none")
    else:
      axis.plot(values, [y] * len(values), "|", color=BLUE, markersize=9)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    axis.plot([low, high], [y, y], color=INK, linewidth=2, solid_capstyle="butt")
    axis.plot([middle], [y], "o", color=INK, markersize=4)
  axis.set_yticks(range(len(scores)), [f"{short(n)} ({len(v)})" for n, v in scores.items()])
  axis.set(ylim=(-0.7, len(scores) - 0.3), xlabel="score of the rater")
  return figure


def mixture(discards: Sequence[float], shares: dict[str, np.ndarray]) -> Figure:
  """Stacked shares at each discard, in PALETTE's order (Fig. 7b); wide bands are labeled."""
  figure, axis = plt.subplots(figsize=(WIDTH, 3.6))
  axis.stackplot(discards, list(shares.values()), colors=PALETTE, linewidth=0)
  bottom = 0.0
  for name, share in shares.items():
    if share[-1] >= 0.04:
      axis.text(discards[-1] + 0.01, bottom + share[-1] / 2, short(name), va="center", fontsize=7)
    bottom += share[-1]
  axis.set(xlim=(0, discards[-1]), xlabel="fraction discarded, the lowest scores first")
  axis.set(ylim=(0, 1), ylabel="share of the remaining units")
  return figure


def noise(levels: np.ndarray, scores: np.ndarray) -> Figure:
  """A box of scores at each known noise level, rounded to tenths."""
  tenths = np.round(levels, 1)
  known = sorted(set(tenths[np.isfinite(tenths)].tolist()))
  figure, axis = plt.subplots(figsize=(WIDTH, 2.8))
  boxes = [scores[tenths == level] for level in known]
  style = {key: dict(color=INK) for key in ("whiskerprops", "capprops", "medianprops")}
  style["flierprops"] = dict(marker=".", markersize=3, markeredgecolor=INK)
  style["boxprops"] = dict(facecolor=BLUE, edgecolor=INK)
  axis.boxplot(boxes, positions=known, widths=0.05, manage_ticks=False, patch_artist=True, **style)
  axis.set_xticks(known, [f"{level:g}" for level in known])
  axis.set(xlim=(min(known) - 0.06, max(known) + 0.06), xlabel="noise level, rounded to tenths")
  axis.set_ylabel("score minus the mean\nof the source's clean text")
  return figure


def bars(values: dict[str, float], label: str, intervals: Sequence | None = None) -> Figure:
  """A bar for each name, the first on top, with intervals [n, 2] as lines."""
  figure, axis = plt.subplots(figsize=(WIDTH, 0.2 * len(values) + 0.6))
  x, y = np.array(list(values.values())), np.arange(len(values))[::-1]
  axis.barh(y, x, color=np.where(x < 0, RED, BLUE), height=0.7)
  if intervals is not None:
    axis.hlines(y, *np.transpose(intervals), color=INK, linewidth=1)
  axis.axvline(0, color=INK, linewidth=0.8)
  axis.set_yticks(y, list(values))
  axis.set(ylim=(-0.6, len(values) - 0.4), xlabel=label)
  return figure
