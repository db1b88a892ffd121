"""What a run learned: a plain summary, results.json and figures, from the files of its workdir.

Everything is judged on validation documents, which neither loop has seen. Where the documents carry
a known noise level (the demo, or a `noise` field of one's own data) score and level are compared
within each source: the sources themselves differ in worth, so pooled figures mix two things.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from runtime.files import save_figure, write_text

PAPER_R2 = {0: 0.163, 10: 0.561, 30: 0.693, 70: 0.813}  # Fig. 3 of the paper
MIN_DOCUMENTS = 8  # corrupted (and clean) documents of a source, below which it is left out


def write(workdir: Path, documents: list, config: dict) -> str:
  """Writes the summary, results.json, validation_scores.jsonl and figures; returns the summary."""
  scores = {int(p.stem): np.load(p) for p in (workdir / "scores").glob("*.npy")}
  scores = dict(sorted(scores.items()))
  metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  last = scores[max(scores)]
  noise = np.array([d.noise for d in documents], float)
  source = np.array([d.source for d in documents])

  results = {"meta_steps": max(scores), "documents": len(documents)}
  lines = [
    f"DataRater after {max(scores)} meta-steps, judged on {len(documents)} held-out documents"
  ]
  if metrics:
    final = metrics[-1]
    skipped = int(sum(np.sum(m["skipped"]) for m in metrics))
    results |= {
      "outer_loss": float(np.mean(final["outer_loss"])),
      "score_autocorrelation": final.get("score_autocorrelation"),
      "skipped_meta_gradients": skipped,
    }
    lines.append(
      f"  outer loss {results['outer_loss']:.3f} nats a token; scores correlate "
      f"{results['score_autocorrelation']:.3f} with those {config['steps_per_call']} meta-steps "
      f"before; {skipped} meta-gradients skipped"
    )
  if np.isfinite(noise).any() and len(set(noise[np.isfinite(noise)])) > 1:
    results["noise"] = noise_table(last, noise, source)
    results["weight_fit_r2"] = {
      step: weight_fit(s, noise, source)["r2"] for step, s in scores.items()
    }
    lines += _noise_lines(results)
    save_figure(workdir / "noise_vs_weight.png", _plot_noise(scores, noise, source))
  else:
    lines.append("  no known noise levels in these documents: scores are reported by source only")
  lines.append("  mean score by source, best first:")
  by_source = {s: last[source == s] for s in sorted(set(source))}
  for name, values in sorted(by_source.items(), key=lambda kv: -kv[1].mean()):
    lines.append(f"    {name:24s} {values.mean():+.3f}  (spread {values.std():.3f}, {len(values)})")
  results["score_by_source"] = {k: float(v.mean()) for k, v in by_source.items()}
  save_figure(workdir / "scores_by_source.png", _plot_sources(by_source, noise, source, last))
  if metrics:
    save_figure(workdir / "losses.png", _plot_losses(metrics))
    save_figure(workdir / "meta_gradients.png", _plot_meta(metrics))
  lines.append(f"  figures, results.json and validation_scores.jsonl: {workdir}")
  summary = "\n".join(lines)

  rows = [
    {"id": d.id, "source": d.source, "noise": None if np.isnan(d.noise) else d.noise, "score": s}
    for d, s in zip(documents, last.tolist(), strict=True)
  ]
  for name, text in (
    ("validation_scores.jsonl", "".join(json.dumps(r) + "\n" for r in rows)),
    ("results.json", json.dumps(results, indent=1) + "\n"),
    ("summary.txt", summary + "\n"),
  ):
    write_text(workdir / name, text)
  return summary


def noise_table(scores: np.ndarray, noise: np.ndarray, source: np.ndarray) -> dict:
  """Per source: Spearman correlation of level and score among the corrupted documents, and AUROC
  of clean against corrupted at levels >= 0.2. Sources with too few documents are named only."""
  spearman, auroc, too_few = {}, {}, []
  for name in sorted(set(source)):
    mine = source == name
    bad, good = mine & (noise > 0), mine & (noise == 0)
    worse = mine & (noise >= 0.2)
    if bad.sum() < MIN_DOCUMENTS or len(set(noise[bad])) < 2:
      too_few.append(name)
      continue
    spearman[name] = float(scipy.stats.spearmanr(noise[bad], scores[bad]).statistic)
    if min(good.sum(), worse.sum()) >= MIN_DOCUMENTS:
      u = scipy.stats.mannwhitneyu(scores[good], scores[worse]).statistic
      auroc[name] = float(u / (good.sum() * worse.sum()))
  return {
    "spearman": spearman,
    "spearman_mean": float(np.mean(list(spearman.values()))) if spearman else None,
    "auroc": auroc,
    "auroc_mean": float(np.mean(list(auroc.values()))) if auroc else None,
    "too_few_documents": too_few,
  }


def weight_fit(scores: np.ndarray, noise: np.ndarray, source: np.ndarray, batch: int = 128) -> dict:
  """Linear fit of softmax weight on noise level over the corrupted documents (the paper's Fig. 3).

  Weights are taken in batches of 128 documents, relative to the mean weight of the source.
  """
  order = np.random.default_rng(0).permutation(np.flatnonzero(noise > 0))
  weights = np.full(len(scores), np.nan)
  for start in range(0, len(order), batch):
    chunk = order[start : start + batch]
    exp = np.exp(scores[chunk] - scores[chunk].max())
    weights[chunk] = exp / exp.sum() * (len(chunk) / batch)
  x, y = noise[order], weights[order]
  if np.ptp(y) == 0:
    return {"r2": 0.0, "x": x, "y": y, "slope": 0.0, "intercept": float(y[0])}
  fit = scipy.stats.linregress(x, y)
  return {
    "r2": float(fit.rvalue**2),
    "x": x,
    "y": y,
    "slope": fit.slope,
    "intercept": fit.intercept,
  }


def _noise_lines(results: dict) -> list[str]:
  table = results["noise"]
  lines = []
  if table["spearman"]:
    lines.append(
      f"  noise level against score, within a source: Spearman {table['spearman_mean']:+.3f} "
      f"(mean of {len(table['spearman'])} sources; -1 = the noisier, the lower)"
    )
  if table["auroc"]:
    lines.append(
      f"  clean against corrupted (levels >= 0.2), within a source: AUROC "
      f"{table['auroc_mean']:.3f} (mean of {len(table['auroc'])} sources; 1 = perfect)"
    )
  if table["too_few_documents"]:
    lines.append(f"  too few documents to judge: {', '.join(table['too_few_documents'])}")
  fits = ", ".join(
    f"{step}: {r2:.3f}" + (f" (paper {PAPER_R2[step]})" if step in PAPER_R2 else "")
    for step, r2 in results["weight_fit_r2"].items()
  )
  lines.append(f"  R^2 of weight on noise level at meta-step {fits}")
  return lines


def _plot_noise(scores, noise, source):
  figure, axes = plt.subplots(
    1, len(scores), figsize=(3.2 * len(scores), 3), sharey=True, squeeze=False
  )
  for axis, (step, values) in zip(axes[0], scores.items(), strict=True):
    fit = weight_fit(values, noise, source)
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(fit["x"]))
    axis.scatter(fit["x"] + jitter, fit["y"], s=6, alpha=0.5, linewidths=0)
    ends = np.array([fit["x"].min(), fit["x"].max()])
    axis.plot(ends, fit["intercept"] + fit["slope"] * ends, color="black", linewidth=1)
    axis.set_title(f"meta-step {step}, $R^2$ = {fit['r2']:.3f}", fontsize=10)
    axis.set_xlabel("noise level of the document")
  axes[0][0].set_ylabel("weight in a batch of 128")
  return figure


def _plot_sources(by_source, noise, source, scores):
  names = sorted(by_source, key=lambda name: by_source[name].mean())[-40:]
  figure, axis = plt.subplots(figsize=(6, 0.3 * len(names) + 1))
  for kind, offset, color, label in (
    (noise > 0, -0.15, "tab:red", "corrupted"),
    (~(noise > 0), 0.15, "tab:blue", "clean or unknown"),
  ):
    picked = [(i + offset, scores[(source == name) & kind]) for i, name in enumerate(names)]
    for k, (y, values) in enumerate([p for p in picked if len(p[1])]):
      axis.boxplot(
        values,
        positions=[y],
        orientation="horizontal",
        widths=0.25,
        showfliers=False,
        patch_artist=True,
        boxprops=dict(facecolor=color, alpha=0.6),
        medianprops=dict(color="black"),
        label=label if k == 0 else None,
      )
  axis.set_yticks(range(len(names)), names)
  axis.set_xlabel("score of the rater")
  axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
  return figure


def _plot_losses(metrics):
  steps = [m["step"] for m in metrics]
  figure, axis = plt.subplots(figsize=(6, 3.5))
  outer = np.array([np.mean(m["outer_loss"]) for m in metrics])
  inner = np.array([np.mean(m["inner_loss"]) for m in metrics])
  axis.plot(steps, inner, label="inner loss (training data, unweighted)", linewidth=1)
  axis.plot(steps, outer, label="outer loss (held-out data)", linewidth=1)
  axis.set_xlabel("meta-step")
  axis.set_ylabel("nats a token, mean over inner models")
  axis.legend(fontsize=8)
  return figure


def _plot_meta(metrics):
  figure, axes = plt.subplots(1, 3, figsize=(13, 3.5))
  members = sorted({i for m in metrics for i in m["member"]})
  for member in members:
    picked = [(m["step"], m["member"].index(member), m) for m in metrics if member in m["member"]]
    steps = [step for step, _, _ in picked]
    for axis, name in zip(axes, ("meta_gradient_norm", "meta_update_norm"), strict=False):
      axis.plot(steps, [m[name][i] for _, i, m in picked], linewidth=1, label=f"member {member}")
  axes[0].set_ylabel("norm of the meta-gradient")
  axes[1].set_ylabel("norm of the member's update of eta")
  axes[0].set_yscale("log")
  axes[0].legend(fontsize=7)
  corr = [(m["step"], m["score_autocorrelation"]) for m in metrics if "score_autocorrelation" in m]
  axes[2].plot(*zip(*corr, strict=True), color="black", linewidth=1)
  axes[2].set_ylabel("correlation with the scores one call before")
  for axis in axes:
    axis.set_xlabel("meta-step")
  figure.tight_layout()
  return figure
