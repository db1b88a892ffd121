"""Compares selection policies by their learning curves: table, compute fractions and figures.

A run's folder holds curve.jsonl, a line per evaluation: `step`, `train` (mean loss on the training
batches since the last evaluation), `nll` {evaluation set: nats per token} and `accuracy` {task:
share of questions answered right}.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import selection
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


class Costs(NamedTuple):
  """Sizes of models and runs; FLOPs are counted from them."""

  parameters: dict[str, int]  # by size
  rater: int  # parameters
  scorer: str  # size of the perplexity scorer
  recipes: dict[str, NamedTuple]  # by size: learning_rate, batch, steps
  sequence_length: int

  def overhead(self, model: str, policy: str, discard: float) -> float:
    """FLOPs of rating / FLOPs of training."""
    scorers = {"datarater": self.rater}
    scorers |= dict.fromkeys(selection.PERPLEXITY, self.parameters[self.scorer])
    if policy not in scorers:
      return 0.0
    return rating_overhead(scorers[policy], self.parameters[model], discard)

  def flops(self, model: str, policy: str, discard: float) -> float:
    """FLOPs of one run with its rating: 6 N D (1 + overhead)."""
    recipe = self.recipes[model]
    tokens = recipe.steps * recipe.batch * self.sequence_length
    return 6 * self.parameters[model] * tokens * (1 + self.overhead(model, policy, discard))


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


def rating_overhead(scorer_parameters: int, lm_parameters: int, discard: float) -> float:
  """FLOPs of rating the oversampled batch / FLOPs of a training step on the kept batch: per kept
  token 2 N_rater / (1 - rho) over 6 N_lm."""
  return 2 * scorer_parameters / (1 - discard) / (6 * lm_parameters)


def best_discard(workdir: Path, sweep: list) -> float:
  """The discard fraction whose runs end with the lowest mean NLL on `selection`."""
  final = {}
  for run in sweep:
    if run.policy == "datarater":
      final.setdefault(run.discard, []).append(read_curve(workdir, run)[-1]["nll"]["selection"])
  return min(final, key=lambda rho: np.mean(final[rho]))


def read_curve(workdir: Path, run) -> list[dict]:
  lines = (workdir / "runs" / run.name / "curve.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@plt.rc_context(STYLE)
def write(workdir: Path, runs: list, sweep: list, costs: Costs, benchmarks: dict) -> str:
  """Writes results.json, table.md and the figures; returns the table.

  Args:
    runs, sweep: lists of plan.Run, all trained.
    benchmarks: {task: {"questions": their number, "chance": accuracy of random choices}}.
  """
  curves = {run: read_curve(workdir, run) for run in [*runs, *sweep]}
  recipes = {size: recipe._asdict() for size, recipe in costs.recipes.items()}
  results = {"costs": costs._asdict() | {"recipes": recipes}}
  models = _distinct(runs, "model")
  results["models"] = {model: _compare(model, runs, curves, costs) for model in models}
  if sweep:
    results["sweep"] = _sweep(sweep, curves)
    save_figure(workdir / "discard.png", _plot_sweep(results["sweep"], sweep[0].model))
  results["benchmarks"] = benchmarks
  results["curves"] = {run.name: curve for run, curve in curves.items()}
  save_figure(workdir / "learning_curves.png", _plot_curves(runs, curves, benchmarks))
  save_figure(workdir / "compute.png", _plot_compute(results["models"]))
  table = _table(results, costs)
  for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", table)):
    write_text(workdir / name, f"{text}\n")
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


def _compare(model: str, runs: list, curves: dict, costs: Costs) -> dict:
  """policy -> metric -> final values by seed; compute fractions of each seed and of the mean."""
  out = {}
  for policy in _distinct(runs, "policy"):
    seeds = _select(runs, model, policy)
    overhead = costs.overhead(model, policy, seeds[0].discard)
    metrics = {}
    for metric in metrics_of(curves[seeds[0]][-1]):
      steps, values = _by_seed(seeds, curves, metric)
      final = values[:, -1]
      baseline = _by_seed(_select(runs, model, "none"), curves, metric)[1][:, -1]
      fraction = partial(
        compute_fraction,
        steps,
        baseline_steps=steps[-1],
        overhead=overhead,
        higher_is_better=metric[0] == "accuracy",
      )
      metrics["/".join(metric)] = {
        "final": final.tolist(),
        "mean": float(final.mean()),
        "sd": float(final.std(ddof=1)) if len(final) > 1 else None,
        "compute_fraction": fraction(values.mean(0), baseline_final=baseline.mean()),
        "compute_fraction_by_seed": [
          fraction(v, baseline_final=b) for v, b in zip(values, baseline, strict=True)
        ],
      }
    out[policy] = {"discard": seeds[0].discard, "overhead": overhead, "metrics": metrics}
  return out


def _distinct(runs: list, field: str) -> list[str]:
  return list(dict.fromkeys(getattr(run, field) for run in runs))


def _select(runs: list, model: str, policy: str) -> list:
  return [run for run in runs if run.model == model and run.policy == policy]


def _by_seed(runs: list, curves: dict, metric) -> tuple[list[int], np.ndarray]:
  """Steps and values [seeds, evaluations] of a metric."""
  steps = [row["step"] for row in curves[runs[0]]]
  return steps, np.array([[metrics_of(row)[metric] for row in curves[run]] for run in runs])


def _sweep(sweep: list, curves: dict) -> dict:
  """Evaluation set -> rho -> final NLL by seed; rho = 0 is the unfiltered baseline."""
  out = {}
  for run in sweep:
    for name, value in curves[run][-1]["nll"].items():
      out.setdefault(name, {}).setdefault(f"{run.discard:g}", []).append(value)
  return out


def _table(results: dict, costs: Costs) -> str:
  lines = []
  for model, policies in results["models"].items():
    recipe = costs.recipes[model]
    tokens = recipe.steps * recipe.batch * costs.sequence_length
    metrics = list(policies["none"]["metrics"])
    seeds = len(policies["none"]["metrics"][metrics[0]]["final"])
    names = [m.removeprefix("nll/") for m in metrics]
    lines += [
      f"**{model}** ({costs.parameters[model]:,} parameters, {recipe.steps:,} steps, {tokens:,} "
      f"tokens, {seeds} seeds; rater {costs.rater:,} parameters)",
      "",
      f"| policy | rho | {' | '.join(names)} | compute to match `none` on validation |",
      "|---" * (len(metrics) + 3) + "|",
    ]
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
  if results["benchmarks"]:
    tasks = "; ".join(
      f"{task}: {b['questions']:,} questions, chance {b['chance']:.3f}"
      for task, b in results["benchmarks"].items()
    )
    lines += ["", f"Accuracy on {tasks}."]
  if "sweep" in results:
    swept = ", ".join(
      f"{rho}: {np.mean(v):.3f}" for rho, v in results["sweep"]["selection"].items()
    )
    lines += ["", f"Sweep of rho, NLL on `selection` (0 = none): {swept}."]
  return "\n".join(lines)


def _percent(fraction: float | None) -> str:
  return "never" if fraction is None else f"{fraction:.0%}"


def _plot_curves(runs: list, curves: dict, benchmarks: dict) -> Figure:
  """Mean and range over seeds: a panel for each size and metric, a line for each policy."""
  models, policies = _distinct(runs, "model"), _distinct(runs, "policy")
  metrics = [m for m in metrics_of(curves[runs[0]][-1]) if m[1] != "selection"]
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
      steps, values = _by_seed(_select(runs, model, policy), curves, metric)
      style = STYLES[policy] | {"markevery": max(1, len(steps) // 5), "markersize": 4}
      axis.plot(steps, values.mean(0), **style, label=policy, linewidth=1.3)
      axis.fill_between(
        steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0
      )
      heights += [*values[:, len(steps) // 5 :].flat]  # the first steps would dominate the scale
      if policy == "none":
        axis.axhline(values[:, -1].mean(), color="black", linewidth=0.5, label="none, at the end")
    if kind == "accuracy" and name in benchmarks:
      chance = benchmarks[name]["chance"]
      title += f", {benchmarks[name]['questions']:,} questions"
      heights.append(chance)
      axis.axhline(chance, color="black", linewidth=1, linestyle=":")
      axis.annotate(
        "chance", (1, chance), (3, 0), axis.get_yaxis_transform(), "offset points",
        va="center", fontsize=7, annotation_clip=False,
      )  # fmt: skip
    pad = 0.05 * np.ptp(heights) or 0.01
    axis.set_ylim(min(heights) - pad, max(heights) + pad)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("nats per token" if kind == "nll" else "accuracy")
  _legend(figure, axes[0][0], total - len(shown), "panels")
  return figure


def _legend(figure: Figure, axis: Axes, left_out: int = 0, things: str = "") -> None:
  """Outside of the axes, with a note on the things that the figure leaves out."""
  note = f"{left_out} more {things} not shown: table.md has all results" if left_out else None
  entries, place = axis.get_legend_handles_labels(), "outside upper center"
  figure.legend(*entries, title=note, fontsize=8, ncols=4, handlelength=4, loc=place)


def _plot_compute(models: dict) -> Figure:
  """The share of the baseline's compute that reaches its final NLL on validation (Fig. 1)."""
  shown = list(models)[:MAX_MODELS]
  policies = [policy for policy in models[shown[0]] if policy != "none"]
  width = 0.8 / max(len(policies), 1)
  figure, axis = plt.subplots(figsize=(max(4.5, 1 + 0.3 * len(shown) * (len(policies) + 1)), 4))
  for k, policy in enumerate(policies):
    for i, model in enumerate(shown):
      fraction = models[model][policy]["metrics"]["nll/validation"]["compute_fraction"]
      x, label = i + (k - (len(policies) - 1) / 2) * width, policy if i == 0 else None
      height = np.nan if fraction is None else fraction
      axis.plot([x, x], [0, height], **STYLES[policy], markevery=[1], label=label)
      axis.annotate(
        _percent(fraction), (x, fraction or 0), (0, 7), textcoords="offset points",
        ha="center", va="bottom", fontsize=7, rotation=90,
      )  # fmt: skip
  axis.axhline(1, color="black", linewidth=0.7, linestyle=":")
  axis.set_xticks(range(len(shown)), shown)
  axis.set_xlim(-0.5, len(shown) - 0.5)
  axis.margins(y=0.2)
  axis.set_ylim(bottom=0)
  axis.set_ylabel("compute to reach the final loss of none", fontsize=9)
  _legend(figure, axis, len(models) - len(shown), "models")
  return figure


def _plot_sweep(sweep: dict, model: str) -> Figure:
  """Final NLL against the discard fraction (Fig. 4)."""
  figure, axis = plt.subplots(figsize=(4.5, 3.6))
  for name, style, color in (("selection", "o--", BLUE), ("validation", "s-", "black")):
    rhos = sorted(sweep[name], key=float)
    values = np.array([sweep[name][rho] for rho in rhos])
    axis.plot(np.array(rhos, float), values.mean(1), style, color=color, label=name)
  axis.set_xlabel("discard fraction")
  axis.set_ylabel("nats per token at the end")
  axis.set_title(model, fontsize=10)
  _legend(figure, axis)
  return figure
