"""Running the entry points as a user does: small, in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (  # flags of train.py
  "--model=tiny",
  "--rater=tiny",
  "--sequence_length=32",
  "--inner_batch=4",
  "--outer_batch=4",
  "--n_models=2",
  "--lifetime=6",
  "--steps_per_call=2",
  "--checkpoint_every=4",
)


def start(script: str, cache: Path, *flags: str, **options) -> subprocess.Popen:
  """The runs of a session share the folder `cache`: tokenised corpora and compiled programs."""
  return subprocess.Popen(
    [sys.executable, script, *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")},
    text=True,
    **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
  )


def run(script: str, cache: Path, *flags: str) -> subprocess.CompletedProcess:
  process = start(script, cache, *flags)
  output, errors = process.communicate(timeout=600)
  return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


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
