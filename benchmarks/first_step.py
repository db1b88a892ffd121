"""CPU seconds of train.py to its second meta-step, by what is compiled; size of the program.

  python -m benchmarks.first_step             # the demo: a first start, another workdir, resumed
  python -m benchmarks.first_step --lines=2,8,32,128

User and system seconds of the whole process (Linux), with a call per meta-step, until the metrics
of the first one are written, which is after the second. The corpus is ready. `--lines` counts the
lines of StableHLO of mode mixed by T and runs nothing.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import config
import transformer
from corpus.tokenizer import load_tokenizer
from runtime import cli
from runtime.cli import check, option


@dataclasses.dataclass(frozen=True)
class Settings:
  lines: tuple[int, ...] = option((), "T of programs to count instead", at_least=1)
  cache_dir: str = option(".cache", "with the corpus of the demo")


def main() -> None:
  settings = cli.read(Settings)
  for T in settings.lines:
    print(f"T {T:4}: {lines(T):7,} lines of StableHLO", flush=True)
  if settings.lines:
    return
  corpora = list(Path(settings.cache_dir).absolute().glob("corpus-*"))
  check(corpora, f"no corpus in {settings.cache_dir}: run train.py once")
  with tempfile.TemporaryDirectory() as folder:
    cache = Path(folder, "cache")
    cache.mkdir()
    for corpus in corpora:
      shutil.copytree(corpus, cache / corpus.name)
    for name, workdir in (
      ("first start", "one"),
      ("another workdir", "two"),
      ("resumed", "two"),
    ):
      print(f"{name:16}{cpu_seconds(Path(folder, workdir), cache):6.1f} CPU s", flush=True)


def cpu_seconds(workdir: Path, cache: Path) -> float:
  """Until a line is added to the metrics; the run then stops as at Ctrl-C."""
  metrics = workdir / "metrics.jsonl"
  count = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
  before, flags = count(), ["--steps_per_call=1", "--checkpoint_every=1"]
  command = [sys.executable, "train.py", f"--workdir={workdir}", f"--cache_dir={cache}", *flags]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while count() <= before:
    check(process.poll() is None, f"{' '.join(command)} ended with {process.returncode}")
    time.sleep(0.05)
  fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
  process.send_signal(signal.SIGTERM)
  process.wait()
  return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def lines(T: int) -> int:
  """Of the demo's program with T inner steps."""
  settings = config.Config(inner_steps=T, mode="mixed")
  program = config.build(settings, load_tokenizer(settings.tokenizer).vocab_size)
  batch = lambda shape: transformer.Batch(*[jax.ShapeDtypeStruct(shape, "int32")] * 2)
  batches = {name: batch(shape) for name, (shape, _) in config.batch_shapes(settings).items()}
  state = jax.eval_shape(program.init, jax.random.PRNGKey(0), batches["probe"])
  lowered = program.jit_meta_steps().lower(state, *batches.values())
  return lowered.as_text().count("\n")


if __name__ == "__main__":
  cli.run(main, Settings)
