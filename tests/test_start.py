"""A command starts without the packages that only a part of a run needs."""

import re
import subprocess
import sys

import pytest
from jobs import ROOT

# What imports them is imported where it is used. Together they take longer than JAX.
LATE = {"grain", "orbax", "matplotlib", "scipy", "sklearn", "jinja2", "datasets", "apache_beam"}
LATE |= {"jax.experimental.pallas", "pyarrow"}
NEEDED = {"curate.py": {"pyarrow"}}  # its types of columns


@pytest.mark.parametrize(
  "script", ["train.py", "curate.py", "evaluate.py", "analyse.py", "planner"]
)
def test_help_imports_what_every_run_needs_and_no_more(script):
  """The help comes after the command's own imports, so these are tested too."""
  command = [script] if script.endswith(".py") else ["-m", script]
  command = [sys.executable, "-X", "importtime", *command, "--help"]
  result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  assert "Flags (--name=value" in result.stdout
  imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.M))
  assert {"absl.flags", "runtime.cli"} < imported
  packages = {name.split(".")[0] for name in imported}
  assert LATE & (imported | packages) == NEEDED.get(script, set())
