"""Analyzes a trained rater: its scores by source and against simple heuristics, as one HTML page.

  python analyse.py --rater=runs/demo --output=runs/demo/analysis              # validation split
  python analyse.py --rater=runs/demo --output=runs/other --data='texts/*.jsonl'

Score distributions and the mixture implied by discarding the lowest (the paper's Fig. 7), documents
rated lowest and highest (Fig. 8), and how far the heuristics of Table 1 explain the scores: Pearson
correlations, OLS and Lasso (Figs. 14, 15).

The unit is the one that the rater was trained on. After --packing=document: a document, its score
the mean over its pieces. After --packing=pack: a packed sequence of the validation split, its
documents joined by newlines. With --data always a document.

Writes report.html, analysis.json (all numbers) and scores.jsonl (a line per unit).
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from analysis.heuristics import NAMES
from analysis.units import Config, Units, read_units
from rating import open_rater
from runtime import cli, cpu, programs
from runtime.cli import check, option
from runtime.files import write_text


@dataclasses.dataclass(frozen=True)
class Place:
  """Input and output folders."""

  rater: str | None = option(None, "workdir of the trained rater (required)", section="Where")
  output: str | None = option(None, "folder of the report (required)")
  cache_dir: str = option(".cache", "folder of tokenized corpora and compiled programs")


def main() -> None:
  place, config = cli.read(Place), cli.read(Config)
  check(place.rater is not None, "name the folder of a trained rater with --rater")
  check(place.output is not None, "name a folder for the report with --output")
  output = Path(place.output)
  check(not output.exists() or output.is_dir(), f"--output={output} is a file: name a folder")
  cpu.keep_freed_memory()
  programs.keep(place.cache_dir)
  rater = open_rater(place.rater)
  units = read_units(config, rater, Path(place.cache_dir))
  from analysis import explain, page  # with SciPy, scikit-learn and Matplotlib

  results = explain.analyse(units, config.seed)
  header = {
    "rater": str(place.rater),
    "fingerprint": rater.fingerprint,
    "size": f"{rater.config.rater}, {rater.parameters:,} parameters",
    "data": ", ".join(config.data) or f"validation split of {', '.join(rater.config.data)}",
    "units": f"{len(units.texts):,} {units.kind}s of {len(set(units.source))} sources",
    "command": shlex.join(["python", *sys.argv]),
  }
  write(output, units, header | results, page.render(units, header, results))
  fit = results["lasso"]
  print(
    f"{header['units']}: OLS R^2 {results['ols']['r2']:.3f}, Lasso R^2 {fit['r2_mean']:.3f} with "
    f"{len(fit['coefficients'])} non-zero coefficients\n{output / 'report.html'}"
  )


def write(output: Path, units: Units, results: dict, html: str) -> None:
  """The three files of the report; each appears whole or not at all."""
  output.mkdir(parents=True, exist_ok=True)
  rows = []
  for i, (id, source) in enumerate(zip(units.ids, units.source.tolist(), strict=True)):
    noise = float(units.noise[i])
    row = {"id": id, "source": source, "noise": None if np.isnan(noise) else noise}
    row["score"] = float(units.scores[i])
    rows.append(row | dict(zip(NAMES, units.features[i].tolist(), strict=True)))
  lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
  write_text(output / "scores.jsonl", lines)
  write_text(output / "analysis.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
  write_text(output / "report.html", html)


if __name__ == "__main__":
  cli.run(main, Place, Config)
