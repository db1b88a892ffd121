"""Compiled programs on disk: found again, shared, bounded, and never in the way."""

import json
import os
import subprocess
import sys

import pytest
from jobs import ROOT

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from runtime import programs

programs.LIMIT = int(sys.argv[2])
programs.keep(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
values = [float(jax.jit(lambda x: jnp.sin(x * i).sum())(jnp.arange(99.0))) for i in (2, 3, 4)]
print(json.dumps([events.count("cache_hits"), values, jax.config.jax_compilation_cache_dir]))
"""


def start(folder, limit=10**9, **environment):
  clean = {k: v for k, v in os.environ.items() if "JAX_" not in k}
  command = [sys.executable, "-c", SCRIPT, str(folder), str(limit)]
  options = dict(env=clean | environment, cwd=ROOT, text=True)
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*arguments, **environment):
  """(programs found, their results, the folder in use, errors)."""
  process = start(*arguments, **environment)
  output, errors = process.communicate(timeout=100)
  assert process.returncode == 0, errors
  return *json.loads(output), errors


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  return folder, run(folder)


def programs_in(folder):
  return {path.name for path in (folder / "compiled").glob("*-cache")}


def test_a_second_process_finds_what_the_first_one_compiled(first):
  folder, (found, values, used, errors) = first
  assert found == 0 and used == str(folder / "compiled") and errors == ""
  compiled = programs_in(folder)
  assert len(compiled) >= 3
  assert run(folder) == (len(compiled), values, used, "")
  assert programs_in(folder) == compiled


def test_two_processes_at_once_share_a_folder(first, tmp_path):
  both = [start(tmp_path) for _ in range(2)]
  for process in both:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and errors == "" and json.loads(output)[1] == first[1][1]
  assert len(programs_in(tmp_path)) == len(programs_in(first[0]))


def test_what_a_killed_process_left_half_written_is_compiled_again(first, tmp_path):
  run(tmp_path)
  compiled = programs_in(tmp_path)
  broken, *whole = sorted(tmp_path.glob("compiled/*-cache"))
  broken.write_bytes(broken.read_bytes()[:100])
  broken.with_name(broken.name.removesuffix("cache") + "atime").unlink()
  found, values, _, errors = run(tmp_path)
  assert (found, values, errors) == (len(whole), first[1][1], "")
  assert programs_in(tmp_path) == compiled
  assert run(tmp_path)[0] == 1 + len(whole)


def test_the_folder_is_bounded(first, tmp_path):
  sizes = [path.stat().st_size for path in first[0].glob("compiled/*-cache")]
  limit = sum(sizes) - 1
  assert run(tmp_path, limit)[1] == first[1][1]
  assert 0 < len(programs_in(tmp_path)) < len(sizes)
  assert sum(path.stat().st_size for path in tmp_path.glob("compiled/*-cache")) <= limit


def test_a_folder_of_the_users_own_is_left_to_them(tmp_path):
  own = str(tmp_path / "own")
  assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=own)[2] == own
  assert not (tmp_path / "compiled").exists()


def test_a_folder_that_cannot_be_made_only_warns(first, tmp_path):
  (tmp_path / "file").touch()
  found, values, _, errors = run(tmp_path / "file")
  assert (found, values) == (0, first[1][1]) and "Not a directory" in errors
