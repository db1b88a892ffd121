"""The table of README.md that `make reproduce` writes."""

import json

from experiments import reproduce


def test_the_lowest_of_each_row_is_bold_and_never_is_told(tmp_path):
  of = {"none": (2.5, 1), "random": (2.5, None), "pplx_top": (2.25, 0.75), "datarater": (2.0, 0.5)}
  of["pplx_bottom"] = (2.125, 0.25)
  for name in reproduce.SHORT:
    changed = of | ({"random": (1.9, None), "datarater": (2.6, None)} if name == "mini" else {})
    policies = {
      policy: {"metrics": {"nll/validation": {"mean": mean, "compute_fraction": fraction}}}
      for policy, (mean, fraction) in changed.items()
    }
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps({"models": {"any": policies}}))
  rows = reproduce.summary(tmp_path).splitlines()
  assert len(rows) == 8 and {row.count("|") for row in rows} == {6}
  assert "(unfiltered 2.500) | 2.500 | 2.125 | **2.000** |" in rows[2]
  assert rows[3].startswith("| compute to match | never | **25%** | 50% | 1B models: Pile 72%")
  assert "| **1.900** | 2.125 | 2.600 |" in rows[4]
  assert rows[5] == "| compute to match | never | **25%** | never | |"
  assert reproduce.cells([None, None], ".0%") == "never | never"
