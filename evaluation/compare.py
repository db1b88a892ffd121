"""The comparison of selection policies: table, compute fractions and figures, from learning curves.

A run's folder holds curve.jsonl: a line for each evaluation with `step`, `train` (its mean loss on
its own batches since the last one), `nll` {evaluation set: nats a token} and `accuracy` {task}.
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import selection
from runtime.files import save_figure, write_text

COLORS = dict(
  zip(
    selection.POLICIES,
    ("black", "tab:gray", "tab:red", "tab:blue", "tab:green", "tab:purple"),
    strict=True,
  )
)


class Costs(NamedTuple):
  """What FLOPs are counted from."""

  parameters: dict[str, int]  # by size
  rater: int  # parameters
  scorer: str  # size of the perplexity scorer
  recipes: dict[str, NamedTuple]  # by size: learning_rate, batch, steps
  sequence_length: int

  def overhead(self, model: str, policy: str, discard: float) -> float:
    """FLOPs of rating over those of training."""
    scorers = {"datarater": self.rater}
    scorers |= dict.fromkeys(selection.PERPLEXITY, self.parameters[self.scorer])
    if policy not in scorers:
      return 0.0
    return selection.rating_overhead(scorers[policy], self.parameters[model], discard)

  def flops(self, model: str, policy: str, discard: float) -> float:
    """Of one run, rating included: 6 N D (1 + overhead)."""
    recipe = self.recipes[model]
    tokens = recipe.steps * recipe.batch * self.sequence_length
    return 6 * self.parameters[model] * tokens * (1 + self.overhead(model, policy, discard))


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


def write(workdir: Path, runs: list, sweep: list, costs: Costs) -> str:
  """Writes results.json, table.md and the figures; returns the table."""
  curves = {run: read_curve(workdir, run) for run in dict.fromkeys([*runs, *sweep])}
  results = {"costs": json.loads(json.dumps(costs._asdict(), default=lambda x: x._asdict()))}
  results["models"] = {
    model: _compare(model, [r for r in runs if r.model == model], curves, costs)
    for model in dict.fromkeys(run.model for run in runs)
  }
  if sweep:
    results["sweep"] = _sweep(sweep, curves)
    save_figure(workdir / "discard.png", _plot_sweep(results["sweep"], sweep[0].model))
  results["curves"] = {run.name: curve for run, curve in curves.items()}
  save_figure(workdir / "learning_curves.png", _plot_curves(runs, curves))
  save_figure(workdir / "compute.png", _plot_compute(results["models"]))
  table = _table(results, costs)
  for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", table)):
    write_text(workdir / name, f"{text}\n")
  return table


def metrics_of(row: dict) -> dict[tuple[str, str], float]:
  """(kind, name) -> value of one line of a curve."""
  return {(kind, n): v for kind in ("nll", "accuracy") for n, v in row.get(kind, {}).items()}


def _compare(model: str, runs: list, curves: dict, costs: Costs) -> dict:
  """policy -> metric -> final values by seed, and the compute fraction by seed and of the mean."""
  members = {}
  for run in runs:
    members.setdefault(run.policy, []).append(run)
  out = {}
  for policy, mine in members.items():
    discard = mine[0].discard
    overhead = costs.overhead(model, policy, discard)
    out[policy] = {"discard": discard, "overhead": overhead, "metrics": {}}
    for metric in metrics_of(curves[mine[0]][-1]):
      steps, values = _by_seed(mine, curves, metric)
      _, baseline = _by_seed(members["none"], curves, metric)

      def fraction(curve, final, steps=steps, overhead=overhead, metric=metric):
        higher = metric[0] == "accuracy"
        return selection.compute_fraction(steps, curve, steps[-1], final, overhead, higher)

      out[policy]["metrics"]["/".join(metric)] = {
        "final": values[:, -1].tolist(),
        "mean": float(values[:, -1].mean()),
        "sd": float(values[:, -1].std(ddof=1)) if len(values) > 1 else None,
        "compute_fraction": fraction(values.mean(0), baseline[:, -1].mean()),
        "compute_fraction_by_seed": [
          fraction(v, b) for v, b in zip(values, baseline[:, -1], strict=True)
        ],
      }
  return out


def _by_seed(runs: list, curves: dict, metric) -> tuple[list[int], np.ndarray]:
  """(steps, values [seeds, evaluations])."""
  steps = [row["step"] for row in curves[runs[0]]]
  return steps, np.array([[metrics_of(row)[metric] for row in curves[run]] for run in runs])


def _sweep(sweep: list, curves: dict) -> dict:
  """set -> rho -> final NLL by seed; rho = 0 is the unfiltered baseline."""
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
      "| policy | rho | " + " | ".join(names) + " | compute to match `none` on validation |",
      "|---" * (len(metrics) + 3) + "|",
    ]
    for policy, result in policies.items():
      cells = []
      for metric in metrics:
        value = result["metrics"][metric]
        spread = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
        cells.append(f"{value['mean']:.3f}{spread}")
      validation = result["metrics"]["nll/validation"]
      cell = _percent(validation["compute_fraction"])
      if policy != "none" and seeds > 1:
        each = ", ".join(_percent(f) for f in validation["compute_fraction_by_seed"])
        cell += f" (by seed {each})"
      lines.append(f"| {policy} | {result['discard']:g} | {' | '.join(cells)} | {cell} |")
    lines.append("")
  lines.append(
    "NLL in nats a token at the end, mean ± sd over seeds; compute counts the rater's inference on "
    "the oversampled batches; never: not reached."
  )
  if "sweep" in results:
    means = {rho: np.mean(v) for rho, v in results["sweep"]["selection"].items()}
    swept = ", ".join(f"{rho}: {mean:.3f}" for rho, mean in means.items())
    lines += ["", f"Sweep of rho, NLL on `selection` (0 = none): {swept}."]
  return "\n".join(lines)


def _percent(fraction: float | None) -> str:
  return "never" if fraction is None else f"{fraction:.0%}"


def _plot_curves(runs: list, curves: dict):
  """Mean over seeds and its range, for each size and metric."""
  models = list(dict.fromkeys(run.model for run in runs))
  metrics = [m for m in metrics_of(curves[runs[0]][-1]) if m[1] != "selection"]
  figure, axes = plt.subplots(
    len(models), len(metrics), figsize=(5 * len(metrics), 3.6 * len(models)), squeeze=False
  )
  for i, model in enumerate(models):
    for axis, metric in zip(axes[i], metrics, strict=True):
      for policy in dict.fromkeys(run.policy for run in runs):
        mine = [run for run in runs if run.model == model and run.policy == policy]
        steps, values = _by_seed(mine, curves, metric)
        mean, color = values.mean(0), COLORS[policy]
        axis.plot(steps, mean, color=color, label=policy, linewidth=1.3)
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        if policy == "none":
          axis.axhline(mean[-1], color=color, linewidth=0.7, linestyle=":")
      first = len(steps) // 5  # the first steps would set the scale
      shown = np.concatenate([line.get_ydata()[first:] for line in axis.get_lines()])
      pad = 0.05 * np.ptp(shown)
      axis.set_ylim(shown.min() - pad, shown.max() + pad)
      axis.set_title(f"{model}: {metric[1]}", fontsize=10)
      axis.set_xlabel("step")
      axis.set_ylabel("nats a token" if metric[0] == "nll" else "accuracy")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  return figure


def _plot_compute(models: dict):
  """Share of the baseline's compute that reaches its final NLL on validation (Fig. 1)."""
  figure, axis = plt.subplots(figsize=(1.2 + 2.6 * len(models), 3.4))
  policies = [policy for policy in next(iter(models.values())) if policy != "none"]
  width = 0.8 / max(len(policies), 1)
  for k, policy in enumerate(policies):
    for i, result in enumerate(models.values()):
      fraction = result[policy]["metrics"]["nll/validation"]["compute_fraction"]
      x = i + (k - (len(policies) - 1) / 2) * width
      label = policy if i == 0 else None
      axis.bar(x, fraction or 0, width * 0.9, color=COLORS[policy], label=label)
      text = f"{fraction:.0%}" if fraction is not None else "never"
      axis.text(x, (fraction or 0) + 0.01, text, ha="center", va="bottom", fontsize=7, rotation=90)
  axis.axhline(1, color="black", linewidth=0.7, linestyle=":")
  axis.set_xticks(range(len(models)), models)
  axis.margins(y=0.2)
  axis.set_ylabel("compute to match the baseline", fontsize=9)
  if policies:
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  return figure


def _plot_sweep(sweep: dict, model: str):
  """Final NLL against the discard fraction (Fig. 4)."""
  figure, axis = plt.subplots(figsize=(4.5, 3.4))
  for name in ("selection", "validation"):
    rhos = sorted(sweep[name], key=float)
    values = np.array([sweep[name][rho] for rho in rhos])
    axis.plot(np.array(rhos, float), values.mean(1), marker="o", label=name)
  axis.set_xlabel("discard fraction")
  axis.set_ylabel("nats a token at the end")
  axis.set_title(model, fontsize=10)
  axis.legend(fontsize=8)
  return figure
