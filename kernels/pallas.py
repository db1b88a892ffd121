"""Parameters of Pallas's compilers, and its Triton backend where JAX has one."""

from typing import Any

from jax.experimental.pallas import tpu as pltpu

from kernels import device

try:
  from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11
  triton = None


def tpu_params(*semantics: str) -> pltpu.CompilerParams:
  limit = device.of_kind(device.TPUS, device.kind("pallas_tpu") or "").vmem_bytes * 15 // 16
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def triton_params(warps: int, stages: int) -> Any:
  """Compiler parameters of a Triton kernel.

  Raises:
    ValueError: this JAX has no Triton backend.
  """
  if triton is None:
    raise ValueError(
      "pallas_gpu needs the Triton backend of Pallas, which this JAX lacks: use the 'xla' backend"
    )
  return triton.CompilerParams(num_warps=warps, num_stages=stages)
