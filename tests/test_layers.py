"""Imports run one way: which part of the house may import which, checked on import statements."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"train", "curate", "evaluate", "analyse", "planner.__main__"}

# Part -> the parts that it may import besides itself. A part is a module at the top, a folder, or
# `runtime.sharding`, which the method uses.
SHARED = {"runtime", "runtime.sharding"}
METHOD = {
  "kernels": set(),
  "runtime.sharding": set(),
  "transformer": {"kernels", "runtime.sharding"},
  "datarater": {"transformer"},
  "mixflow": set(),
  "inner_loop": {"mixflow"},
  "meta_step": {"inner_loop", "datarater", "transformer", "runtime.sharding"},
  "meta_gradient_check": {"inner_loop"},
}
MODEL = {"kernels", "transformer", "datarater", "inner_loop", "meta_step"}
ROOMS = {
  "runtime": {"runtime.sharding"},
  "selection": set(),
  "corpus": {"transformer", *SHARED},
  "config": {"corpus", *MODEL, *SHARED},
  "rating": {"config", "corpus", "kernels", "transformer", *SHARED},
  "curation": {"rating", "selection", "corpus", *SHARED},
  "evaluation": {"rating", "selection", "config", "corpus", "kernels", "transformer", *SHARED},
  "analysis": {"rating", "selection", "config", "corpus", *SHARED},
  "planner": {"config", "corpus", "kernels", "transformer", *SHARED},
}
LAYERS = METHOD | ROOMS
LAYERS |= {
  "train": {"config", "rating", "corpus", "analysis", "meta_step", "transformer", *SHARED},
  "curate": {"curation", *SHARED},
  "evaluate": {"evaluation", "selection", *SHARED},
  "analyse": {"analysis", "rating", *SHARED},
}
ALLOWED_IN_METHOD = {"jax", "numpy", "haiku", "optax", "chex"} | sys.stdlib_module_names


def part_of(module: str) -> str | None:
  """The part that a dotted name belongs to; None if it is not ours."""
  names = module.split(".")
  candidates = (".".join(names[:2]), names[0])
  return next((name for name in candidates if name in LAYERS), None)


def imports(source: str, modules: set[str]) -> set[str]:
  """All that a source imports, at any depth of its code. `from a import b` imports a.b if that is
  one of the modules, else a."""
  targets = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      targets |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      targets |= {name if name in modules else node.module for name in names}
  return targets


def sources() -> dict[str, str]:
  """Dotted name -> source of every module of the product."""
  files = [*ROOT.glob("*.py")]
  for folder in ROOT.iterdir():
    if folder.name in LAYERS:
      files += folder.rglob("*.py")
  names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
  return {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}


def violations(modules: dict[str, str]) -> list[str]:
  """Every import that the layers forbid."""
  wrong = []
  for name, source in modules.items():
    part = part_of(name)
    if part is None:
      wrong.append(f"{name} stands in no layer")
      continue
    for target in sorted(imports(source, set(modules))):
      other = part_of(target)
      if target in COMMANDS:
        wrong.append(f"{name} imports the command {target}")
      elif other and other != part and other not in LAYERS[part]:
        wrong.append(f"{name} imports {target}")
      elif part in METHOD and not other and target.split(".")[0] not in ALLOWED_IN_METHOD:
        wrong.append(f"{name}, of the method, imports {target}")
  return wrong


def cycles(modules: dict[str, str]) -> list[str]:
  """Modules that import themselves by way of others."""
  graph = {
    name: imports(source, set(modules)) & set(modules) - {name} for name, source in modules.items()
  }

  def reaches(start):
    seen, stack = set(), list(graph[start])
    while stack:
      if (name := stack.pop()) not in seen:
        seen.add(name)
        stack += graph[name]
    return seen

  return [name for name in graph if name in reaches(name)]


def test_imports_run_one_way():
  modules = sources()
  assert len(modules) > 40
  assert violations(modules) == []
  assert cycles(modules) == []


@pytest.mark.parametrize(
  "module, line",
  [
    ("inner_loop", "import meta_step"),
    ("mixflow", "import inner_loop"),
    ("datarater", "from corpus.batches import cut"),
    ("meta_step", "from absl import flags"),
    ("transformer", "import matplotlib.pyplot as plt"),
    ("transformer", "from runtime.cli import check"),
    ("kernels.loss.xla", "import transformer"),
    ("rating", "import train"),
    ("curation.local", "def f():\n  from curate import main"),
    ("planner.plan", "from planner.__main__ import main"),
    ("runtime.files", "from corpus.documents import DataConfig"),
    ("corpus.batches", "import config"),
  ],
)
def test_a_forbidden_import_is_found(module, line):
  modules = sources()
  assert module in modules
  assert violations(modules | {module: f"{modules[module]}\n{line}\n"}) != []


def test_a_circle_is_found():
  modules = sources()
  name = "corpus.tokenizer"
  modules[name] += "\nfrom corpus.batches import cut\n"
  assert name in cycles(modules)


def test_few_modules_lie_at_the_top():
  assert len(list(ROOT.glob("*.py"))) <= 14
