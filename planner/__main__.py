"""Plans a meta-training run for hardware you do not have: memory, FLOPs, traffic and time.

  python -m planner --preset=paper --target=v5p:4x4x4 --mesh=population=8,data=8
  python -m planner --preset=paper --target=h100 --n_models=1 --inner_batch=8 --outer_batch=8

Takes the flags of train.py, compiles its program for the target on this machine's CPU, and reports
whether it fits. If not, tries flags that need less memory; the last command printed fits, if
one does. Needs the compilers of `make .venv-compile/ready`: use .venv-compile/bin/python. A pod
takes minutes.
"""

from config import PRESETS, Config
from planner.plan import Target, plan
from runtime import cli


def main() -> None:
  target = cli.read(Target)
  given = {"preset": target.preset} | cli.given(Config)
  plan(cli.read(Config, PRESETS[target.preset]), target, given)


if __name__ == "__main__":
  cli.run(main, Target, Config)
