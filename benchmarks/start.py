"""CPU time of importing each command and of its --help, next to `import jax` alone.

  python -m benchmarks.start

User and system seconds of whole processes: all kinds in turn, the fastest of --runs counts. Then
the packages that cost most, by the time that their own modules take to import.
"""

import collections
import dataclasses
import re
import resource
import subprocess
import sys

from runtime import cli
from runtime.cli import option

COMMANDS = {  # module -> arguments of python
  "train": ["train.py"],
  "curate": ["curate.py"],
  "evaluate": ["evaluate.py"],
  "analyse": ["analyse.py"],
  "planner.__main__": ["-m", "planner"],
}


@dataclasses.dataclass(frozen=True)
class Settings:
  runs: int = option(5, "processes of each kind", at_least=1)
  packages: int = option(10, "packages listed for each command", at_least=1)


def main() -> None:
  settings = cli.read(Settings)
  kinds = {"import jax": ["-c", "import jax"]}
  for module, arguments in COMMANDS.items():
    kinds[f"import {module}"] = ["-c", f"import {module}"]
    kinds[f"python {' '.join(arguments)} --help"] = [*arguments, "--help"]
  for arguments in kinds.values():
    run(*arguments)  # compiles the modules and reads them from the disk
  rounds = [[cpu_seconds(*arguments) for arguments in kinds.values()] for _ in range(settings.runs)]
  fastest = [min(times) for times in zip(*rounds, strict=True)]
  print("CPU s  of import jax")
  for name, seconds in zip(kinds, fastest, strict=True):
    print(f"{seconds:5.2f}  {seconds / fastest[0]:13.2f}  {name}")
  for module in COMMANDS:
    costs = own_milliseconds(module).most_common(settings.packages)
    print(f"{module}, ms:", ", ".join(f"{package} {ms:.0f}" for package, ms in costs))


def run(*arguments: str) -> str:
  """The error output of `python ARGUMENTS`."""
  command = [sys.executable, *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def cpu_seconds(*arguments: str) -> float:
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  run(*arguments)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def own_milliseconds(module: str) -> collections.Counter:
  """Package -> time of its modules' own bodies as `module` is imported."""
  costs, report = collections.Counter(), run("-X", "importtime", "-c", f"import {module}")
  for own, package in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\w+)", report, re.M):
    costs[package] += int(own) / 1000
  return costs


if __name__ == "__main__":
  cli.run(main, Settings)
