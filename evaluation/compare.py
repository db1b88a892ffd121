"""Compares selection policies by their learning curves: table, compute fractions and figures.

A run's folder holds curve.jsonl, a line per evaluation: `step`, `train` (mean loss on the training
batches since the last evaluation), `nll` {evaluation set: nats per token} and `accuracy` {task:
share of questions answered right}.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import selection
from evaluation.plan import Costs
from runtime.figures import BLUE, STYLE, save_figure, short
from runtime.files import write_text

STYLES = {  # color-blind-safe colors of Okabe and Ito
  policy: {"color": color, "linestyle": (0, dashes), "marker": marker}
  for policy, color, dashes, marker in zip(
    selection.POLICIES,
    ("#000000", "#56B4E9", "#D55E00", "#0072B2", "#009E73", "#CC79A7"),
    ((), (1, 1), (6, 1.5), (3, 1.5), (6, 1.5, 1, 1.5), (3, 1.5, 1, 1.5, 1, 1.5)),
    "osD^vX",
    strict=True,
  )
}
MAX_PANELS, COLUMNS = 24, 4  # learning_curves.png
MAX_MODELS = 8  # compute.png


def compute_fraction(
  steps: Sequence[float],
  values: Sequence[float],
  baseline_steps: float,
  baseline_final: float,
  overhead: float = 0.0,
  higher_is_better: bool = False,
) -> float | None:
  """The share of the baseline's compute that reaches its final value (the paper's Fig. 1):

    (steps at which the curve first reaches `baseline_final`) / baseline_steps * (1 + overhead),

  interpolated linearly between evaluations. None if the curve never reaches it.
  """
  sign = -1 if higher_is_better else 1
  gaps = [sign * (value - baseline_final) for value in values]
  for i, gap in enumerate(gaps):
    if gap <= 0:
      reached = steps[i]
      if i > 0:
        reached -= (steps[i] - steps[i - 1]) * gap / (gap - gaps[i - 1])
      return reached / baseline_steps * (1 + overhead)
  return None


def best_discard(workdir: Path, sweep: list) -> float:
  """The discard fraction whose run ends with the lowest NLL on `selection`."""
  tried = [run for run in sweep if run.policy == "datarater"]
  return min(tried, key=lambda run: read_curve(workdir, run)[-1]["nll"]["selection"]).discard


def read_curve(workdir: Path, run) -> list[dict]:
  lines = (workdir / "runs" / run.name / "curve.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@plt.rc_context(STYLE | {"axes.titlesize": 10, "legend.fontsize": 8})
def write(workdir: Path, runs: list, sweep: list, costs: Costs, benchmarks: dict) -> str:
  """Writes results.json, table.md and the figures; returns the table.

  Args:
    runs, sweep: lists of plan.Run, all trained.
    benchmarks: {task: {"questions": their number, "chance": accuracy of random choices}}.
  """
  curves, swept = ({run: read_curve(workdir, run) for run in group} for group in (runs, sweep))
  recipes = {size: recipe._asdict() for size, recipe in costs.recipes.items()}
  results = {"costs": costs._asdict() | {"recipes": recipes}}
  models = dict.fromkeys(run.model for run in runs)
  results["models"] = {model: _compare(model, curves, costs) for model in models}
  if sweep:
    results["sweep"] = _sweep(swept)
    save_figure(workdir / "discard.png", _plot_sweep(results["sweep"], sweep[0].model))
  results["benchmarks"] = benchmarks
  results["curves"] = {run.name: curve for run, curve in (curves | swept).items()}
  save_figure(workdir / "learning_curves.png", _plot_curves(curves, benchmarks))
  save_figure(workdir / "compute.png", _plot_compute(results["models"]))
  table = _table(results, costs)
  write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
  write_text(workdir / "table.md", table + "\n")
  return table


def metrics_of(row: dict) -> dict[tuple[str, str], float]:
  """(kind, name) -> value, from one line of a curve."""
  return {(kind, n): v for kind in ("nll", "accuracy") for n, v in row.get(kind, {}).items()}


def panels(models: list[str], metrics: list) -> list[tuple]:
  """The (model, metric) pairs of the learning curves, at most MAX_PANELS.

  All models get the same metrics: the first evaluation sets and the first tasks.
  """
  models = models[:MAX_PANELS]
  kinds = [kind for kind, _ in metrics]
  place = {metric: kinds[:i].count(metric[0]) for i, metric in enumerate(metrics)}
  kept = sorted(metrics, key=place.get)[: MAX_PANELS // len(models)]
  return [(model, metric) for model in models for metric in metrics if metric in kept]


def _compare(model: str, curves: dict, costs: Costs) -> dict:
  """policy -> metric -> final values by seed; compute fractions of each seed and of the mean."""
  out = {}
  for policy, discard in {run.policy: run.discard for run in curves}.items():
    overhead, metrics = costs.overhead(model, policy, discard), {}
    for metric in metrics_of(next(iter(curves.values()))[-1]):
      steps, values = _by_seed(curves, model, policy, metric)
      final, goal = values[:, -1], _by_seed(curves, model, "none", metric)[1][:, -1]
      how = dict(overhead=overhead, higher_is_better=metric[0] == "accuracy")
      fraction = partial(compute_fraction, steps, baseline_steps=steps[-1], **how)
      seeds = zip(values, goal, strict=True)
      metrics["/".join(metric)] = {
        "final": final.tolist(),
        "mean": float(final.mean()),
        "sd": float(final.std(ddof=1)) if len(final) > 1 else None,
        "compute_fraction": fraction(values.mean(0), baseline_final=goal.mean()),
        "compute_fraction_by_seed": [fraction(v, baseline_final=g) for v, g in seeds],
      }
    out[policy] = {"discard": discard, "overhead": overhead, "metrics": metrics}
  return out


def _by_seed(curves: dict, model: str, policy: str, metric) -> tuple[list[int], np.ndarray]:
  """Steps and values [seeds, evaluations] of a metric."""
  seeds = [curve for run, curve in curves.items() if (run.model, run.policy) == (model, policy)]
  values = np.array([[metrics_of(row)[metric] for row in curve] for curve in seeds])
  return [row["step"] for row in seeds[0]], values


def _sweep(curves: dict) -> dict:
  """Evaluation set -> rho -> final NLL by seed; rho = 0 is the unfiltered baseline."""
  out = {}
  for run, curve in curves.items():
    for name, value in curve[-1]["nll"].items():
      out.setdefault(name, {}).setdefault(f"{run.discard:g}", []).append(value)
  return out


def _table(results: dict, costs: Costs) -> str:
  lines = []
  for model, policies in results["models"].items():
    metrics = policies["none"]["metrics"]
    seeds = len(metrics["nll/validation"]["final"])
    size, steps = f"{costs.parameters[model]:,} parameters", f"{costs.recipes[model].steps:,} steps"
    size += f", {steps}, {costs.tokens(model):,} tokens, {seeds} seeds"
    names = " | ".join(name.removeprefix("nll/") for name in metrics)
    lines += [f"**{model}** ({size}; rater {costs.rater:,} parameters)", ""]
    lines.append(f"| policy | rho | {names} | compute to match `none` on validation |")
    lines.append("|---" * (len(metrics) + 3) + "|")
    for policy, result in policies.items():
      cells = [policy, f"{result['discard']:g}"]
      for value in result["metrics"].values():
        spread = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
        cells.append(f"{value['mean']:.3f}{spread}")
      validation = result["metrics"]["nll/validation"]
      cells.append(_percent(validation["compute_fraction"]))
      if policy != "none" and seeds > 1:
        each = ", ".join(map(_percent, validation["compute_fraction_by_seed"]))
        cells[-1] += f" (by seed {each})"
      lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
  lines.append(
    "NLL in nats per token at the end, mean ± sd over seeds; compute includes rating the "
    "oversampled batches; never: not reached."
  )
  tasks = results["benchmarks"].items()
  tasks = [f"{t}: {b['questions']:,} questions, chance {b['chance']:.3f}" for t, b in tasks]
  if tasks:
    lines += ["", f"Accuracy on {'; '.join(tasks)}."]
  if "sweep" in results:
    swept = results["sweep"]["selection"].items()
    swept = ", ".join(f"{rho}: {np.mean(v):.3f}" for rho, v in swept)
    lines += ["", f"Sweep of rho, NLL on `selection` (0 = none): {swept}."]
  return "\n".join(lines)


def _percent(fraction: float | None) -> str:
  return "never" if fraction is None else f"{fraction:.0%}"


def _plot_curves(curves: dict, benchmarks: dict) -> Figure:
  """Mean and range over seeds: a panel for each size and metric, a line for each policy."""
  models = list(dict.fromkeys(run.model for run in curves))
  policies = dict.fromkeys(run.policy for run in curves)
  metrics = [m for m in metrics_of(next(iter(curves.values()))[-1]) if m[1] != "selection"]
  shown, total = panels(models, metrics), len(models) * len(metrics)
  models = models[:MAX_PANELS]
  each = len(shown) // len(models)  # panels of a model
  rows = -(-each // COLUMNS)
  columns = -(-each // rows)
  size = max(3.8 * columns, 6), 3 * rows * len(models) + 0.6
  figure, axes = plt.subplots(rows * len(models), columns, figsize=size, squeeze=False)
  axes = axes.reshape(len(models), -1)
  for axis in axes[:, each:].flat:
    axis.remove()
  for axis, (model, metric) in zip(axes[:, :each].flat, shown, strict=True):
    kind, name = metric
    title, heights = f"{model}: {short(name)}", []
    for policy in policies:
      steps, values = _by_seed(curves, model, policy, metric)
      style = STYLES[policy] | {"markevery": max(1, len(steps) // 5), "markersize": 4}
      axis.plot(steps, values.mean(0), **style, label=policy, linewidth=1.3)
      low, high = values.min(0), values.max(0)
      axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
      heights += [*values[:, len(steps) // 5 :].flat]  # the first steps would dominate the scale
      if policy == "none":
        axis.axhline(values[:, -1].mean(), color="black", linewidth=0.5, label="none, at the end")
    if kind == "accuracy" and name in benchmarks:
      chance = benchmarks[name]["chance"]
      title += f", {benchmarks[name]['questions']:,} questions"
      heights.append(chance)
      axis.axhline(chance, color="black", linewidth=1, linestyle=":")
      beside = dict(transform=axis.get_yaxis_transform(), va="center", fontsize=7)
      axis.text(1.01, chance, "chance", **beside)
    pad = 0.05 * np.ptp(heights) or 0.01
    axis.set(ylim=(min(heights) - pad, max(heights) + pad), title=title, xlabel="step")
    axis.set_ylabel("nats per token" if kind == "nll" else "accuracy")
  _legend(figure, axes[0][0], total - len(shown), "panels")
  return figure


def _legend(figure: Figure, axis: Axes, left_out: int = 0, things: str = "") -> None:
  """Outside of the axes, with a note on the things that the figure leaves out."""
  note = f"{left_out} more {things} not shown: table.md has all results" if left_out else None
  entries, place = axis.get_legend_handles_labels(), "outside upper center"
  figure.legend(*entries, title=note, ncols=4, handlelength=4, loc=place)


def _plot_compute(models: dict) -> Figure:
  """The share of the baseline's compute that reaches its final NLL on validation (Fig. 1)."""
  shown = list(models)[:MAX_MODELS]
  policies = [policy for policy in models[shown[0]] if policy != "none"]
  width = 0.8 / max(len(policies), 1)
  figure, axis = plt.subplots(figsize=(max(4.5, 1 + 0.3 * len(shown) * (len(policies) + 1)), 4))
  above = dict(xytext=(0, 7), textcoords="offset points", ha="center", va="bottom", rotation=90)
  for k, policy in enumerate(policies):
    for i, model in enumerate(shown):
      fraction = models[model][policy]["metrics"]["nll/validation"]["compute_fraction"]
      x, label = i + (k - (len(policies) - 1) / 2) * width, policy if i == 0 else None
      height = np.nan if fraction is None else fraction
      axis.plot([x, x], [0, height], **STYLES[policy], markevery=[1], label=label)
      axis.annotate(_percent(fraction), (x, fraction or 0), fontsize=7, **above)
  axis.axhline(1, color="black", linewidth=0.7, linestyle=":")
  axis.set_xticks(range(len(shown)), shown)
  axis.margins(y=0.2)
  axis.set(xlim=(-0.5, len(shown) - 0.5), ylim=(0, None))
  axis.set_ylabel("compute to reach the final loss of none", fontsize=9)
  _legend(figure, axis, len(models) - len(shown), "models")
  return figure


def _plot_sweep(sweep: dict, model: str) -> Figure:
  """Final NLL against the discard fraction (Fig. 4)."""
  figure, axis = plt.subplots(figsize=(4.5, 3.6))
  for name, style, color in (("selection", "o--", BLUE), ("validation", "s-", "black")):
    points = sorted((float(rho), np.mean(values)) for rho, values in sweep[name].items())
    axis.plot(*zip(*points, strict=True), style, color=color, label=name)
  axis.set(xlabel="discard fraction", ylabel="nats per token at the end", title=model)
  _legend(figure, axis)
  return figure
