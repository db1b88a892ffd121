"""The report of a training run: summary.txt, results.json, validation_scores.jsonl and figures.

Scores validation documents, which neither loop has seen. Where documents have a known noise level
(the demo, or a `noise` field in your data), noise and score are compared within each source, and
sources are ranked by their clean documents: a mean over all documents would depend on how many of
them are corrupted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from runtime.figures import BLUE, RED, STYLE, save_figure, short
from runtime.files import write_text

PAPER_R2 = {0: 0.163, 10: 0.561, 30: 0.693, 70: 0.813}  # Fig. 3 of the paper
MIN_DOCUMENTS = 8  # corrupted (and clean) documents of a source for which a statistic is reported
MAX_SOURCES = 40  # scores_by_source.png
MAX_MEMBERS = 10  # inner models in losses.png and in the legend of meta_gradients.png


class SourceScores(NamedTuple):
  """The scores of one source's documents."""

  name: str
  clean: np.ndarray  # [n]: documents not known to be corrupted
  corrupted: np.ndarray  # [m]

  @property
  def ranked(self) -> np.ndarray:
    """The scores that rank the source: its clean documents', if it has any."""
    return self.clean if len(self.clean) else self.corrupted


@plt.rc_context(STYLE | {"axes.titlesize": 9, "legend.fontsize": 8})
def write(workdir: Path, documents: list, config: dict) -> str:
  """Writes the summary, results.json, validation_scores.jsonl and figures; returns the summary."""
  scores = {int(p.stem): np.load(p) for p in (workdir / "scores").glob("*.npy")}
  scores = dict(sorted(scores.items()))  # by meta-step
  metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  last = scores[max(scores)]
  noise = np.array([d.noise for d in documents], float)
  source = np.array([d.source for d in documents])

  results = {"meta_steps": max(scores), "documents": len(documents)}
  lines = [f"DataRater after {max(scores)} meta-steps, on {len(documents)} held-out documents"]
  if metrics:
    loss, skipped = np.mean(metrics[-1]["outer_loss"]), sum(np.sum(m["skipped"]) for m in metrics)
    results |= {"outer_loss": float(loss), "skipped_meta_gradients": int(skipped)}
    compared = "no earlier scores to compare with"
    if "score_autocorrelation" in metrics[-1]:
      results["score_autocorrelation"] = r = metrics[-1]["score_autocorrelation"]
      earlier = f"the scores {config['steps_per_call']} meta-steps earlier"
      compared = f"scores correlate {r:.3f} with {earlier}"
    skips = f"{skipped} meta-gradients skipped"
    lines.append(f"  outer loss {loss:.3f} nats per token; {compared}; {skips}")
  if len(set(noise[np.isfinite(noise)])) > 1:
    results["noise"] = noise_table(last, noise, source)
    fits = {step: weight_fit(s, noise) for step, s in scores.items()}
    for name in ("r2", "spearman"):
      results[f"weight_fit_{name}"] = {step: fit[name] for step, fit in fits.items()}
    lines += _noise_lines(results)
    save_figure(workdir / "noise_vs_weight.png", _plot_noise(fits))
  else:
    lines.append("  no known noise levels in these documents: scores are reported by source only")
  ranked = rank_sources(last, noise, source)
  lines.append(f"  sources, best first by the mean score of their {ranking_documents(noise)}:")
  lines += map(_source_line, ranked)
  results["score_by_source"] = {s.name: float(s.ranked.mean()) for s in ranked}
  results["score_by_source_of"] = ranking_documents(noise)
  save_figure(workdir / "scores_by_source.png", _plot_sources(ranked, noise))
  if metrics:
    save_figure(workdir / "losses.png", _plot_losses(metrics))
    save_figure(workdir / "meta_gradients.png", _plot_meta(metrics))
  lines.append(f"  figures, results.json and validation_scores.jsonl: {workdir}")
  summary = "\n".join(lines)

  rows = [
    {"id": d.id, "source": d.source, "noise": None if np.isnan(d.noise) else d.noise, "score": s}
    for d, s in zip(documents, last.tolist(), strict=True)
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  write_text(workdir / "validation_scores.jsonl", lines)
  write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
  write_text(workdir / "summary.txt", summary + "\n")
  return summary


def rank_sources(
  scores: np.ndarray, noise: np.ndarray, source: np.ndarray, statistic: Callable = np.mean
) -> list[SourceScores]:
  """The source with the best `statistic` of its clean documents first; all-corrupted ones last."""
  corrupted = noise > 0
  sources = [
    SourceScores(name, scores[(source == name) & ~corrupted], scores[(source == name) & corrupted])
    for name in sorted(set(source.tolist()))
  ]
  return sorted(sources, key=lambda s: (len(s.clean) == 0, -statistic(s.ranked)))


def ranking_documents(noise: np.ndarray, kind: str = "document") -> str:
  """Names the documents that `rank_sources` uses."""
  if not (noise > 0).any():
    return f"{kind}s"
  return f"{kind}s not known to be corrupted" if np.isnan(noise).any() else f"clean {kind}s"


def noise_table(scores: np.ndarray, noise: np.ndarray, source: np.ndarray) -> dict:
  """Per source: Spearman correlation of level and score among the corrupted documents, and AUROC
  of clean against corrupted at levels >= 0.2. Sources with too few documents are only listed."""
  spearman, auroc, too_few = {}, {}, []
  for name in sorted(set(source)):
    levels, values = noise[source == name], scores[source == name]
    corrupted, clean, noisy = levels > 0, values[levels == 0], values[levels >= 0.2]
    if corrupted.sum() < MIN_DOCUMENTS or len(set(levels[corrupted])) < 2:
      too_few.append(name)
      continue
    correlation = scipy.stats.spearmanr(levels[corrupted], values[corrupted]).statistic
    spearman[name] = float(correlation)
    if min(len(clean), len(noisy)) >= MIN_DOCUMENTS:
      u = scipy.stats.mannwhitneyu(clean, noisy).statistic
      auroc[name] = float(u / (len(clean) * len(noisy)))
  table = {}
  for statistic, values in (("spearman", spearman), ("auroc", auroc)):
    mean = float(np.mean(list(values.values()))) if values else None
    table |= {statistic: values, f"{statistic}_mean": mean}
  return table | {"too_few_documents": too_few}


def weight_fit(scores: np.ndarray, noise: np.ndarray, batch: int = 128) -> dict:
  """Linear fit of softmax weight on noise level over the corrupted documents (the paper's Fig. 3).

  The softmax runs over random batches of documents of all sources. `spearman` is None where all
  weights are equal.
  """
  order = np.random.default_rng(0).permutation(np.flatnonzero(noise > 0))
  weights = np.full(len(scores), np.nan)
  for start in range(0, len(order), batch):
    chunk = order[start : start + batch]
    exp = np.exp(scores[chunk] - scores[chunk].max())
    weights[chunk] = exp / exp.sum() * (len(chunk) / batch)
  x, y = noise[order], weights[order]
  fit = {"x": x, "y": y, "r2": 0.0, "spearman": None, "slope": 0.0, "intercept": float(y.mean())}
  if np.ptp(y) == 0 or np.ptp(x) == 0:
    return fit
  line = scipy.stats.linregress(x, y)
  fit |= {"r2": float(line.rvalue**2), "slope": line.slope, "intercept": line.intercept}
  return fit | {"spearman": float(scipy.stats.spearmanr(x, y).statistic)}


def fitted_line(fit: dict) -> tuple[np.ndarray, np.ndarray]:
  """The ends (x [2], y [2]) of a fit's line, cut where the weight reaches zero."""
  x = np.array([fit["x"].min(), fit["x"].max()])
  y = fit["intercept"] + fit["slope"] * x
  if (y < 0).any():
    x = np.where(y < 0, -fit["intercept"] / fit["slope"], x)
  return x, np.maximum(y, 0)


def by_member(metrics: list[dict], name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """Inner model -> (meta-steps [n] for which it was drawn, values [n] of a metric)."""
  points = {}
  for row in metrics:
    for member, value in zip(row["member"], row[name], strict=True):
      points.setdefault(member, []).append((row["step"], value))
  return {member: tuple(np.array(points[member]).T) for member in sorted(points)}


def restarts(metrics: list[dict]) -> dict[int, np.ndarray]:
  """Inner model -> bool [n]: re-initialized before that meta-step of `by_member`."""
  ages = by_member(metrics, "age")
  return {member: np.diff(age, prepend=0) <= 0 for member, (_, age) in ages.items()}


def _noise_lines(results: dict) -> list[str]:
  table, lines = results["noise"], []
  if table["spearman"]:
    mean, n = f"{table['spearman_mean']:+.3f}", len(table["spearman"])
    note = f"(mean of {n} sources; -1: noisier documents always score lower)"
    lines.append(f"  noise level against score, within a source: Spearman {mean} {note}")
  if table["auroc"]:
    mean = f"{table['auroc_mean']:.3f} (mean of {len(table['auroc'])} sources; 1 = perfect)"
    lines.append(f"  clean against corrupted (levels >= 0.2), within a source: AUROC {mean}")
  if table["too_few_documents"]:
    lines.append(f"  too few documents to judge: {', '.join(table['too_few_documents'])}")
  paper = {step: f" (paper {r2})" for step, r2 in PAPER_R2.items()}
  r2 = results["weight_fit_r2"].items()
  fits = ", ".join(f"{step}: {value:.3f}{paper.get(step, '')}" for step, value in r2)
  lines.append(f"  R^2 of weight on noise level at meta-step {fits}")
  ranks = ", ".join(f"{s}: {_signed(rho)}" for s, rho in results["weight_fit_spearman"].items())
  lines.append(f"  Spearman of weight and noise level at meta-step {ranks}")
  return lines


def _signed(correlation: float | None) -> str:
  return "undefined" if correlation is None else f"{correlation:+.3f}"


def _source_line(source: SourceScores) -> str:
  x, corrupted, more = source.ranked, source.corrupted, ""
  if len(corrupted):
    more = f"; {len(corrupted)} corrupted: {corrupted.mean():+.3f}"
  if not len(source.clean):
    more = ", all corrupted"
  return f"    {source.name:24s} {x.mean():+.3f}  (spread {x.std():.3f}, {len(x)}{more})"


def _plot_noise(fits: dict[int, dict]) -> Figure:
  size = 3.2 * len(fits), 3.2
  figure, (axes,) = plt.subplots(1, len(fits), figsize=size, sharey=True, squeeze=False)
  axes[0].set_ylabel("weight in a batch of 128")
  for axis, (step, fit) in zip(axes, fits.items(), strict=True):
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(fit["x"]))
    axis.scatter(fit["x"] + jitter, fit["y"], s=6, alpha=0.5, linewidths=0, color=BLUE)
    axis.plot(*fitted_line(fit), color="black", linewidth=1)
    quality = f"R² {fit['r2']:.3f}, Spearman {_signed(fit['spearman'])}"
    axis.set(title=f"meta-step {step}\n{quality}", xlabel="noise level of the document")
  return figure


def _plot_sources(ranked: list[SourceScores], noise: np.ndarray) -> Figure:
  """A box each for the clean and the corrupted documents of each source, the best on top."""
  title = f"Sources, best first by the mean score of their {ranking_documents(noise)}"
  shown, half = ranked, MAX_SOURCES // 2
  if len(ranked) > MAX_SOURCES:
    shown = ranked[:half] + ranked[-half:]
    left_out = f"{len(ranked) - len(shown)} of {len(ranked)} sources, in the middle,"
    title += f"\n{left_out} are not shown: summary.txt lists all"
  figure, axis = plt.subplots(figsize=(7, 0.3 * len(shown) + 1.3))
  rows = list(enumerate(reversed(shown)))
  style = dict(orientation="horizontal", widths=0.28, patch_artist=True, medianprops={"color": "k"})
  style |= dict(manage_ticks=False, showfliers=False)
  for field, offset, color in (("clean", 0.17, BLUE), ("corrupted", -0.17, RED)):
    boxes = [(y, s, getattr(s, field)) for y, s in rows if len(getattr(s, field))]
    if not boxes:
      continue
    axis.boxplot(
      [values for _, _, values in boxes],
      positions=[y + (offset if len(s.clean) and len(s.corrupted) else 0) for y, s, _ in boxes],
      boxprops=dict(facecolor=color, alpha=0.6),
      label="not known to be corrupted" if field == "clean" and np.isnan(noise).any() else field,
      **style,
    )
  if len(shown) < len(ranked):
    axis.axhline(len(shown) - half - 0.5, color="black", linewidth=0.8, linestyle=":")
  axis.set_yticks(range(len(shown)), [short(source.name, 40) for _, source in rows])
  axis.set(ylim=(-0.6, len(shown) - 0.4), xlabel="score of the rater")
  axis.set_title(title, fontsize=8, loc="left")
  if (noise > 0).any():
    figure.legend(loc="outside lower center", ncols=2)
  return figure


def _plot_losses(metrics: list[dict]) -> Figure:
  """Mean losses, and the outer loss of each inner model with marks where it was re-initialized."""
  figure, axis = plt.subplots(figsize=(6.5, 4))
  losses, restarted = by_member(metrics, "outer_loss"), restarts(metrics)
  shown = list(losses)[:MAX_MEMBERS]
  for member in shown:
    (steps, loss), new = losses[member], restarted[member]
    axis.plot(steps, loss, color=RED, alpha=0.35, linewidth=0.6)
    axis.plot(steps[new], loss[new], "v", color="black", markersize=3.5)
  axis.get_lines()[0].set_label(f"outer loss of {len(shown)} of {len(losses)} inner models")
  axis.get_lines()[1].set_label("first loss after re-initialization")
  steps = [m["step"] for m in metrics]
  for name, color, label in (
    ("inner_loss", BLUE, "mean inner loss (training data, unweighted)"),
    ("outer_loss", RED, "mean outer loss (held-out data)"),
  ):
    axis.plot(steps, [np.mean(m[name]) for m in metrics], color=color, linewidth=1.3, label=label)
  axis.set(xlabel="meta-step", ylabel="nats per token")
  figure.legend(loc="outside upper center", ncols=2)
  return figure


def _plot_meta(metrics: list[dict]) -> Figure:
  figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
  for axis, name in zip(axes, ("meta_gradient_norm", "meta_update_norm"), strict=False):
    for member, (steps, values) in by_member(metrics, name).items():
      axis.plot(steps, values, linewidth=1, label=member)
  axes[0].set(ylabel="norm of the meta-gradient", yscale="log")
  axes[0].yaxis.set_major_formatter(LogFormatter())  # the default one writes math
  axes[0].yaxis.set_minor_formatter(LogFormatter())
  axes[1].set_ylabel("norm of the update of eta")
  lines = axes[0].get_lines()
  shown, title = lines[:MAX_MEMBERS], "inner model"
  if len(lines) > len(shown):
    title += f" (the first {len(shown)} of {len(lines)}, whose colors repeat)"
  figure.legend(handles=shown, title=title, loc="outside upper center", ncols=MAX_MEMBERS)
  corr = [(m["step"], m["score_autocorrelation"]) for m in metrics if "score_autocorrelation" in m]
  axes[2].plot(*zip(*corr, strict=True), color="black", linewidth=1)
  axes[2].set_ylabel("correlation with the last call's scores")
  for axis in axes:
    axis.set_xlabel("meta-step")
  return figure
