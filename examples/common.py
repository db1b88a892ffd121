"""What all examples share: flags, seeds, training, one figure and one line of result."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import inner_loop
from runtime import cli
from runtime.cli import check, option
from runtime.figures import save_figure


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = option(0, "the first of the seeds", section="The example")
  seeds: int = option(5, "runs, for the spread")
  figure: str = option(f"runs/{Path(sys.argv[0]).stem}.png", "file of the figure")


def start(main: Callable[[Any], Any], config_class: type[Config]) -> None:
  cli.run(lambda: main(cli.read(config_class)), config_class)


def seeds(config: Config) -> range:
  return range(config.seed, config.seed + config.seeds)


def calls(meta_steps: int, call: int) -> range:
  """A range over compiled calls of `call` meta-steps each."""
  check(meta_steps % call == 0, f"--meta_steps={meta_steps} is not a multiple of {call}")
  return range(meta_steps // call)


def repeat(tree: Any, T: int) -> Any:
  """[T, ...]: the same in every step."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), tree)


def train(loss, optimizer: optax.GradientTransformation, theta: Any, metas: Any, batches: Any):
  """theta after an update on each of the batches: `inner_loop.unroll` from a fresh optimizer."""
  state = inner_loop.init(optimizer, theta)
  return inner_loop.unroll(loss, optimizer, state, metas, batches)[0].params


def spread(of_seeds: np.ndarray | jax.Array, digits: int = 3) -> str:
  return f"{np.mean(of_seeds):.{digits}f} ± {np.std(of_seeds):.{digits}f}"


def show(config: Config, figure: plt.Figure, line: str) -> None:
  save_figure(config.figure, figure)
  print(f"{line} ({config.seeds} seeds)")
