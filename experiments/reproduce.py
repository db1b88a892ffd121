"""The paper's three steps at the size of a laptop, and the tables of RESULTS.md and README.md.

  make reproduce        # about an hour on 2 cores; resumes

Meta-trains a rater on the demo corpus with half of its training documents corrupted, sweeps the
discard fraction, trains language models under every policy with three seeds, repeats that with
models of another size and on the uncorrupted corpus, and analyzes what the rater learned. The
discard fraction is chosen on the other half of the validation documents (evaluate.py), not on the
split that is reported. Only "perplexity, best" in README.md's table is picked on that split, in
favor of the rival. The rater is nano, trained for 400 meta-steps with a lifetime of 1,000.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWEEP = "--sweep_discard=0.1,0.25,0.5,0.75,0.9"
TITLES = {
  "tiny": "Half of the training documents corrupted, models of the inner models' size",
  "mini": "The same rater, models of another size",
  "clean": "The corpus as it is, with its own rater",
}
SHORT = {
  "tiny": "half of the documents corrupted, tiny models",
  "mini": "the same rater, mini models",
  "clean": "corpus as it is, tiny models",
}
MINI_STEPS = 1000  # 5 tokens per parameter; Chinchilla's 20 would take an hour more


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
  for name in ("tiny/learning_curves", "tiny/discard"):
    shutil.copy(folder / f"{name}.png", ROOT / "figures" / f"{Path(name).name}.png")
  rewrite(ROOT / "RESULTS.md", text)
  rewrite(ROOT / "README.md", summary(folder))
  print(f"{text}\n\n{minutes:.0f} minutes; RESULTS.md, README.md and figures/ are rewritten")


def rewrite(path: Path, text: str) -> None:
  """Replaces the text between the marks of a document."""
  marked = r"(?s)(<!-- make reproduce -->).*?(<!-- end -->)"
  path.write_text(re.sub(marked, lambda m: f"{m[1]}\n{text}\n{m[2]}", path.read_text()))


def stage(title: str, *commands: list[str]) -> None:
  """Runs commands at the same time, several on a core each; exits if one fails."""
  print(f"== {title}", flush=True)
  began = time.monotonic()
  running = [subprocess.Popen([sys.executable, *c], cwd=ROOT) for c in commands]
  if len(running) > 1 and hasattr(os, "sched_setaffinity"):
    for process, core in zip(running, itertools.cycle(sorted(os.sched_getaffinity(0)))):
      os.sched_setaffinity(process.pid, {core})
  codes = [process.wait() for process in running]
  if any(codes):
    sys.exit(f"{title}: failed; run the same command again to resume")
  print(f"== {title}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def results(workdir: Path) -> dict:
  return json.loads((workdir / "results.json").read_text())


def tables(folder: Path) -> str:
  parts = []
  for name, title in TITLES.items():
    parts += [f"## {title}", (folder / name / "table.md").read_text().strip()]
  return "\n\n".join(parts)


def summary(folder: Path) -> str:
  """One table of all settings: final NLL on validation, and compute to match the baseline."""
  rows = ["| | random | perplexity, best | rater | paper's rater |", "|---|---|---|---|---|"]
  for name, title in SHORT.items():
    (policies,) = results(folder / name)["models"].values()
    metrics = {policy: p["metrics"]["nll/validation"] for policy, p in policies.items()}
    best = min((p for p in metrics if p.startswith("pplx")), key=lambda p: metrics[p]["mean"])
    shown = [metrics[p] for p in ("random", best, "datarater")]
    baseline, nll = metrics["none"]["mean"], cells([m["mean"] for m in shown], ".3f")
    rows.append(f"| {title}: NLL (unfiltered {baseline:.3f}) | {nll} | |")
    paper = " 1B models: Pile 72%, C4/noclean 78%, C4 93% (Fig. 1)" if name == "tiny" else ""
    shares = cells([m["compute_fraction"] for m in shown], ".0%")
    rows.append(f"| compute to match | {shares} |{paper} |")
  return "\n".join(rows)


def cells(values: list[float | None], form: str) -> str:
  """Cells of a table, the lowest value in bold; None is never."""
  lowest = min((x for x in values if x is not None), default=math.nan)
  mark = lambda x: f"**{x:{form}}**" if x == lowest else f"{x:{form}}"
  return " | ".join("never" if x is None else mark(x) for x in values)


if __name__ == "__main__":
  main()
