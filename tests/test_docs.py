"""README.md and the other documents promise only what is there."""

import importlib
import re

import jax
import numpy as np
import pytest
from jobs import ROOT

import analyse
import curate
import evaluate
import train
from analysis import units
from config import PRESETS, Config
from curation import job
from evaluation import plan
from planner import __main__ as planner
from runtime import cli, hosts

README = (ROOT / "README.md").read_text()
DOCUMENTS = [p for p in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")] if p.name != "CHANGELOG.md"]
COMMANDS = {
  "train.py": (train, [train.Place, Config, hosts.Hosts]),
  "curate.py": (curate, [curate.Place, job.Config, hosts.Hosts]),
  "evaluate.py": (evaluate, [evaluate.Place, plan.Config, hosts.Hosts]),
  "analyse.py": (analyse, [analyse.Place, units.Config]),
  "-m planner": (planner, [planner.Target, Config]),
}


def fields_of(settings):
  return [name for each in settings for name in each.__dataclass_fields__]


def test_files_of_the_layout_and_figures_exist():
  layout = README.split("## Layout")[1].split("```")[1]
  names = re.findall(r"[\w/]+(?:\.py|/)(?=\s)", layout)
  names += re.findall(r"!?\[.*?\]\(((?!http)[^)]*)\)", README)
  assert len(names) > 20
  assert [name for name in names if not (ROOT / name).exists()] == []
  modules = {p.name for p in ROOT.glob("*.py")}
  modules |= {f"{p.parent.name}/" for p in ROOT.glob("*/__init__.py")}
  assert modules <= set(names), "a part is missing from the layout"


def test_functions_of_the_paper_table_exist():
  table = README.split("## From paper to code")[1].split("## Layout")[0]
  named = re.findall(r"`([\w/.]+)`: ((?:`[\w.]+`(?: \(\w+\))?(?:, )?)+)", table)
  assert len(named) > 15
  for file, functions in named:
    for name in re.findall(r"`([\w.]+)`", functions):
      owner = importlib.import_module(file.removesuffix(".py").strip("/").replace("/", "."))
      attribute, _, field = name.partition(".")
      assert hasattr(owner, attribute), f"{file}: {name}"
      assert not field or field in getattr(owner, attribute)._fields


def test_the_method_in_a_few_lines_runs_and_has_a_gradient(quick_compile):
  (block,) = re.findall(r"## The method.*?```python\n(.*?)```", README, re.S)
  scope = {}
  exec(compile(block, "README.md", "exec"), scope)
  norms = [float(np.abs(g).max()) for g in jax.tree.leaves(scope["meta_gradient"])]
  assert max(norms) > 0 and np.isfinite(norms).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_have_flags_that_exist(command):
  known = set(fields_of(COMMANDS[command][1]))
  text = "\n".join(p.read_text() for p in DOCUMENTS) + "\n" + COMMANDS[command][0].__doc__
  text = text.replace("\\\n", " ")
  lines = re.findall(rf"python {re.escape(command)}(?![\w.])([^\n`]*)", text)
  flags = {flag for line in lines for flag in re.findall(r"(?<!\S)--(\w+)", line)} - {"help"}
  assert (
    flags and {f for f in flags if f not in known and f.removeprefix("no") not in known} == set()
  )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_with_its_default_and_no_other(command):
  module, settings = COMMANDS[command]
  text = cli.help_text(module.__doc__, settings)
  flags = text.split("\nFlags ")[1]
  assert re.findall(r"^  --(\w+)", flags, re.M) == fields_of(settings)
  for each in settings:
    for field in each.__dataclass_fields__.values():
      entry = re.search(rf"^  --{field.name}\b(.*?)(?=^  --|\Z)", flags, re.M | re.S)[1]
      entry = " ".join(entry.split())
      assert field.metadata["help"].split()[0] in entry
      for choice in field.metadata["choices"]:
        assert choice in entry
      if field.default not in (None, (), ""):
        assert f"[default: {cli._shown(field.default)}]" in entry
  assert text.startswith(module.__doc__.strip())


def test_presets_do_not_contradict_themselves():
  assert {"50m", "150m", "paper", "demo"} == set(PRESETS)
  for preset in PRESETS.values():
    Config(**preset)


def test_documents_use_no_word_of_the_workshop():
  for path in DOCUMENTS:
    for line in path.read_text().splitlines():
      assert not re.search(
        r"\b(aims?|missed|anew|afresh)\b|nats a token|\b[0-9a-f]{7}\b(?!\.)", line
      ), f"{path.name}: {line}"
