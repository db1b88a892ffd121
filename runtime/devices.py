"""The mesh of devices that --mesh describes.

  population   inner models: each shard trains N / population of them in turn
  data         the sequences of a batch; large parameters and optimizer states (FSDP)

`--mesh=population=2,data=4` uses eight devices.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from runtime.cli import check
from runtime.sharding import AXES


def make_mesh(spec: str | None, n_models: int, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `spec`, "population=2,data=4"; an axis left out takes the remaining devices.

  Default: all visible devices, with the largest population that divides both their number and
  n_models.

  Raises:
    UserError: the spec cannot be read, or does not fit the devices or the number of inner models.
  """
  devices = list(jax.devices() if devices is None else devices)
  count, sizes = len(devices), {}
  for part in (spec or "").split(",") if spec else ():
    axis, _, size = part.partition("=")
    readable = axis in AXES and axis not in sizes and size.isdecimal() and int(size) >= 1
    check(readable, f"--mesh={spec} cannot be read at {part!r}: write it like population=2,data=4")
    sizes[axis] = int(size)
  rest = max(count // sizes.get("data", 1), 1)
  population = sizes.get("population", math.gcd(rest, n_models))
  data = sizes.get("data", max(count // population, 1))
  size, divides = population * data, n_models % population == 0
  check(
    size == count or size < count and jax.process_count() == 1,
    f"--mesh=population={population},data={data} takes {size} devices, {count} are visible: "
    "the product must be their number (or less, on one host)",
  )
  check(divides, f"--mesh=population={population} does not divide --n_models={n_models}")
  # Neighbors on a pod's network where possible; 8 x 8 of 4 x 4 x 4 chips splits an axis.
  grid = create_device_mesh((population, data), devices[:size], allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def make_data_mesh(spec: str | None, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of a command that trains or runs one model: "data=4"."""
  own = "population" not in (spec or "")
  check(own, f"--mesh={spec}: only train.py has a population; write it like data=4")
  return make_mesh(spec, 1, devices)


def local_mesh(mesh: Mesh) -> Mesh:
  """The sub-mesh of this process's devices, for work that hosts do independently. Never empty: with
  several hosts make_mesh uses all devices."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  return Mesh(np.array(own).reshape(1, -1), AXES, axis_types=mesh.axis_types)
