"""Plans a meta-training run for hardware you do not have: memory, FLOPs, traffic and time.

  python -m planner --preset=paper --target=v5p:4x4x4 --mesh=population=8,data=8
  python -m planner --preset=paper --target=h100 --n_models=1 --inner_batch=8 --outer_batch=8

Takes the flags of train.py, compiles its program for the target on this machine's CPU, and reports
whether it fits. If not, tries flags that need less memory; the last command printed is one that
fits. Needs the compilers of `make .venv-compile/ready`: use .venv-compile/bin/python. A pod takes
minutes.
"""

import dataclasses

from config import PRESETS, Config
from planner.plan import plan
from runtime import cli
from runtime.cli import check, option


@dataclasses.dataclass(frozen=True)
class Target:
  """Flags of the planner itself."""

  target: str | None = option(
    None, "v5e, v5p or v6e, with a topology as in v5p:4x4x4; or h100", section="Target"
  )
  mesh: str | None = option(None, "population=N,data=M: how devices share the work; default all")
  preset: str = option("paper", "defaults of the flags below; demo's are shown", choices=PRESETS)
  vocabulary: int | None = option(
    None, "V; default 32,000, or that of --tokenizer=bytes", at_least=1
  )
  step_time: float | None = option(None, "seconds of a measured meta-step: reports its utilization")
  utilization: float = option(0.4, "share of the peak assumed for chip-hours", at_least=0)
  search: bool = option(True, "try other flags if the program does not fit")
  __post_init__ = cli.check_fields


def main() -> None:
  t = cli.read(Target)
  check(t.target is not None, "name the hardware with --target: v5p:4x4x4, v5e:8x8, h100, ...")
  config = cli.read(Config, PRESETS[t.preset])
  given = {"preset": t.preset} | cli.given(Config)
  plan(config, t.target, t.mesh, t.vocabulary, t.step_time, t.utilization, t.search, given)


if __name__ == "__main__":
  cli.run(main, Target, Config)
