"""The paper's three steps at the size of a laptop, and the tables and figures that README.md shows.

  make reproduce        # about an hour on 2 cores; what is finished is not done again

Meta-trains a rater on the demo corpus with half of its training documents corrupted, sweeps the
discard fraction, trains language models under every policy with three seeds, repeats that with
models of another size and on the uncorrupted corpus, and analyses what the rater learned. Nothing
is chosen by looking at the split that is reported: the discard fraction is chosen on the other half
of the validation documents (evaluate.py), all other settings are defaults.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWEEP = "--sweep_discard=0.1,0.25,0.5,0.75,0.9"
MINI_STEPS = 1000  # 5 tokens a parameter: Chinchilla's 20 would take an hour more


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--folder", default="runs/reproduce", help="of all its runs")
  parser.add_argument("--jobs", type=int, default=2, help="models trained at a time")
  arguments = parser.parse_args()
  folder, jobs = ROOT / arguments.folder, f"--jobs={arguments.jobs}"
  began = time.monotonic()
  # Inner models live about as long as the models that are evaluated train (1,140 updates).
  rater = ["train.py", "--rater=nano", "--meta_steps=400", "--lifetime=1000"]
  stage(
    "meta-training, corrupted and clean",
    [*rater, f"--workdir={folder}/rater"],
    [*rater, f"--workdir={folder}/rater_clean", "--data=.cache/demo_corpus.jsonl"],
  )
  evaluate = ["evaluate.py", jobs, f"--rater={folder}/rater"]
  stage("tiny models", [*evaluate, f"--workdir={folder}/tiny", SWEEP])
  rho = results(folder / "tiny")["models"]["tiny"]["datarater"]["discard"]
  flags = [
    "--models=mini",
    f"--steps={MINI_STEPS}",
    "--evaluations=10",
    "--scorer=tiny",
    f"--discard={rho}",
  ]
  stage("mini models", [*evaluate, f"--workdir={folder}/mini", *flags])
  clean = ["evaluate.py", jobs, f"--rater={folder}/rater_clean", f"--workdir={folder}/clean"]
  stage("tiny models, uncorrupted", [*clean, SWEEP])
  analyse = ["analyse.py", f"--rater={folder}/rater", f"--output={folder}/analysis"]
  stage("what the rater learned", analyse)
  minutes = (time.monotonic() - began) / 60
  text = tables(folder)
  (folder / "tables.md").write_text(text)
  for name in ("tiny/learning_curves", "tiny/discard"):
    shutil.copy(folder / f"{name}.png", ROOT / "figures" / f"{Path(name).name}.png")
  readme = ROOT / "README.md"
  marked = r"(?s)(<!-- make reproduce -->).*?(<!-- end -->)"
  written = re.sub(marked, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme.read_text())
  readme.write_text(written)
  print(f"{text}\n\n{minutes:.0f} minutes; README.md and figures/ are rewritten")


def stage(title: str, *commands: list[str]) -> None:
  """Runs commands side by side; any failure ends all."""
  print(f"== {title}", flush=True)
  began = time.monotonic()
  running = [subprocess.Popen([sys.executable, *c], cwd=ROOT) for c in commands]
  codes = [process.wait() for process in running]
  if any(codes):
    sys.exit(f"{title}: failed; run the same command again to resume")
  print(f"== {title}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def results(workdir: Path) -> dict:
  return json.loads((workdir / "results.json").read_text())


def tables(folder: Path) -> str:
  parts = []
  for name, title in (
    ("tiny", "Half of the training documents corrupted, models of the inner models' size"),
    ("mini", "The same rater, models of another size"),
    ("clean", "The corpus as it is, a rater of its own"),
  ):
    parts += [f"#### {title}", (folder / name / "table.md").read_text().strip()]
  return "\n\n".join([targets(folder), *parts])


def targets(folder: Path) -> str:
  """What was aimed at, and what came out."""
  rows = ["| aim | result |", "|---|---|"]
  for size in ("tiny", "mini"):
    policies = results(folder / size)["models"][size]
    validation = {name: p["metrics"]["nll/validation"] for name, p in policies.items()}
    rater = validation["datarater"]
    share = rater["compute_fraction"]
    met = share is not None and share <= 0.6
    rows.append(
      f"| {size}: the baseline's final validation NLL with at most 60% of its compute, rater "
      f"included | {'never' if share is None else f'{share:.0%}'}: {'met' if met else 'missed'} |"
    )
    wins = sum(a < b for a, b in zip(rater["final"], validation["random"]["final"], strict=True))
    seeds = len(rater["final"])
    rows.append(
      f"| {size}: better than random at equal rho in every seed | {wins} of {seeds}: "
      f"{'met' if wins == seeds else 'missed'} |"
    )
    best = min((n for n in validation if n.startswith("pplx")), key=lambda n: validation[n]["mean"])
    won = rater["mean"] < validation[best]["mean"]
    rows.append(
      f"| {size}: better than the best perplexity variant in the mean | {rater['mean']:.3f} "
      f"against {validation[best]['mean']:.3f} ({best}): {'met' if won else 'missed'} |"
    )
  return "\n".join(rows)


if __name__ == "__main__":
  main()
