"""mesh.py: on 8 devices, which this process does not have: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def holds(part):
  """What that part of sharded_meta_step.py prints, on eight CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)}
  command = [sys.executable, str(HERE / "sharded_meta_step.py"), part]
  run = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-3000:]
  return run.stdout.splitlines()


def test_which_mesh_and_which_shardings():
  assert holds("layout") == ["meshes", "shardings"]


def test_meta_steps_are_the_same_on_any_mesh_and_gather_only_parameters():
  assert holds("float32") == [
    "same numbers on 1 8",
    "same numbers on 8 1",
    "same numbers on 2 4",
    "gathers at most a parameter of a member",
    "a checkpoint of 2 4 goes on on 8 1 and on one device",
  ]


def test_with_the_optimisers_of_a_run_only_rounding_differs():
  assert holds("float64") == ["the same to 7 digits in float64"]


def test_kernels_run_under_the_mesh():
  assert holds("kernels") == ["kernels under the mesh"]
