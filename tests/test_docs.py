"""README.md promises only what is there."""

import importlib
import re
from pathlib import Path

import curate
import evaluate
import train
import transformer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_files_of_the_layout_and_figures_exist():
  layout = README.split("## Layout")[1].split("```")[1]
  names = [line.split()[0] for line in layout.splitlines() if line]
  names += re.findall(r"!\[.*?\]\((.*?)\)", README)
  assert len(names) > 10
  assert [name for name in names if not (ROOT / name).exists()] == []
  modules = {p.name for p in ROOT.glob("*.py")}
  assert modules <= set(names), "a module is missing from the layout"


def test_functions_of_the_paper_table_exist():
  table = README.split("## From paper to code")[1].split("## Layout")[0]
  named = re.findall(r"`([\w/.]+)`: ((?:`[\w.]+`(?:, )?)+)", table)
  assert len(named) > 12
  for file, functions in named:
    for name in re.findall(r"`([\w.]+)`", functions):
      owner = importlib.import_module(file.removesuffix(".py").strip("/"))
      attribute = name.split(".")[0]
      if file == "transformer.py" and name == "remat":
        owner = transformer.TransformerConfig
      assert hasattr(owner, attribute), f"{file}: {name}"
      if "." in name:
        assert name.split(".")[1] in getattr(owner, attribute)._fields


def test_flags_and_presets_of_the_commands_exist():
  flags = set(re.findall(r"--(\w+)[=`]", README)) - {"help"}
  known = {"workdir", "cache_dir", "preset", "output", "jobs", "dry_run"}
  known |= {"mesh", "coordinator", "target", "plan"}
  for job in (train, curate, evaluate):
    known |= set(job.Config.__dataclass_fields__)
  assert flags and flags <= known
  assert {"50m", "150m", "paper", "demo"} == set(train.PRESETS)
  for preset in train.PRESETS.values():
    train.Config(**preset)  # its values do not contradict each other
