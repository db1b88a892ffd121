"""Running the entry points as a user does: small, in processes of their own."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
SMALL = (  # flags of train.py
  "--model=nano",
  "--rater=nano",
  "--sequence_length=32",
  "--inner_batch=4",
  "--outer_batch=4",
  "--n_models=2",
  "--lifetime=6",
  "--steps_per_call=2",
  "--checkpoint_every=4",
)
# Tests compile much and compute little: each program is compiled once for all processes of a
# session, without the stack trace of each operation; those of jobs without optimization as well.
COMPILE_ONCE = {
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_traceback_in_locations_limit": 0,
}

# The imports of a command take longer than most jobs: a server has them done and forks.
COMMANDS = ["train", "curate", "evaluate", "analyse", "planner.__main__"]
LATE = ["analysis.page", "analysis.explain", "evaluation.compare", "grain", "orbax.checkpoint"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*COMMANDS, *LATE])


def start(script: str, cache: Path, *flags: str, **options) -> subprocess.Popen:
  """A new interpreter. The jobs of a session share the folder `cache`: tokenized corpora and
  compiled programs."""
  return subprocess.Popen(
    [sys.executable, script, *flags],
    cwd=ROOT,
    env=environment(cache),
    text=True,
    **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
  )


def environment(cache: Path) -> dict[str, str]:
  return os.environ | {name.upper(): str(value) for name, value in _of_jobs(cache).items()}


def compile_once(cache: Path) -> dict[str, Any]:
  """JAX's settings."""
  return COMPILE_ONCE | {"jax_compilation_cache_dir": str(cache / "compiled")}


def run(script: str, cache: Path, *flags: str) -> subprocess.CompletedProcess:
  """A job of the server, from start to end."""
  arguments = [script, *flags]
  with tempfile.TemporaryDirectory() as folder:
    files = [Path(folder) / name for name in ("output", "errors")]
    job = SERVER.Process(target=_job, args=(arguments, dict(os.environ), _of_jobs(cache), files))
    job.start()
    job.join(600)
    if job.exitcode is None:
      job.kill()
      raise TimeoutError(arguments)
    output, errors = (path.read_text() if path.exists() else "" for path in files)
  return subprocess.CompletedProcess(arguments, job.exitcode, output, errors)


def _of_jobs(cache):
  return compile_once(cache) | {"jax_disable_most_optimizations": True}


def _job(arguments, environment, settings, files):
  """`python ARGUMENTS` in a process that has imported the commands and started no device."""
  for descriptor, path in enumerate(files, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(environment)
  for name, value in settings.items():
    jax.config.update(name, value)
  if arguments[0] == "-m":
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
  else:
    sys.argv = arguments
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def succeed(script: str, cache: Path, *flags: str) -> str:
  """What a run that must succeed prints."""
  result = run(script, cache, *flags)
  assert result.returncode == 0, result.stderr
  return result.stdout


def wait_until(condition, process: subprocess.Popen, seconds: float = 300):
  end = time.monotonic() + seconds
  while not condition() and process.poll() is None:
    assert time.monotonic() < end
    time.sleep(0.05)


def assert_one_line_error(result: subprocess.CompletedProcess, message: str):
  assert result.returncode in (1, 2)
  errors = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert len(errors) == 1 and message in errors[0], result.stderr
  assert "Traceback" not in result.stderr
