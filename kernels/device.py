"""The device that kernels are compiled for: the one in this machine, or another for `compile_for`.

Kernels read it when they are traced. Without such a device they run in Pallas's interpreter.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tpu(NamedTuple):
  vmem_bytes: int  # per core
  cores: int  # per device


# Found by the longest name that the device kind starts with.
TPUS = {
  "TPU v5 lite": Tpu(128 << 20, 1),
  "TPU v6 lite": Tpu(128 << 20, 1),
  "TPU v5": Tpu(64 << 20, 2),
  "TPU v4": Tpu(16 << 20, 2),
  "": Tpu(64 << 20, 1),
}
SHARED_BYTES = {"NVIDIA H": 227 << 10, "NVIDIA A100": 163 << 10, "": 99 << 10}  # per GPU block

_target = jax.make_user_context(None)  # part of the key of jit's caches


def compile_for(kind: str) -> AbstractContextManager:
  """Kernels traced inside are compiled for a device kind ("TPU v5 lite", "NVIDIA H100")."""
  return _target(kind)


def kind(backend: str) -> str | None:
  """The device kind that "pallas_tpu" or "pallas_gpu" compiles for; None: the interpreter runs."""
  platform = backend.removeprefix("pallas_")
  target = _target.value
  if target is not None:
    return target if target.startswith("TPU") == (platform == "tpu") else None
  here = jax.config.jax_default_device or jax.devices()[0]
  here = jax.devices(here)[0] if isinstance(here, str) else here
  return here.device_kind if here.platform == platform else None


def is_hopper() -> bool:
  """Whether kernels are compiled for an NVIDIA Hopper GPU (H100, H200)."""
  return (kind("pallas_gpu") or "").startswith("NVIDIA H")


def of_kind(table: dict[str, Any], kind: str) -> Any:
  """The entry of a table whose keys are prefixes of device kinds; the longest match."""
  return table[max((name for name in table if kind.startswith(name)), key=len)]


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
  """Contracts one axis of each, with float32 results and exact products of bfloat16 and float32.

  Hardware multiplies float32 as bfloat16 or TF32 unless asked for more (three to six passes).
  """
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = ((contracted[:1], contracted[1:]), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def matmul_tangent(a, a_t, b, b_t, contracted: tuple[int, int], total=None):
  """The product rule, added to a total: total + a' b + a b'. A zero total or tangent is None."""
  for x, y in ((a_t, b), (a, b_t)):
    if x is not None and y is not None:
      product = dot(x, y, contracted)
      total = product if total is None else total + product
  return total
