"""Versions, and the ceilings of the device: matmuls, a copy, an empty call.

python -m benchmarks.device.machine [--dry]
"""

import importlib.metadata
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.loss import timed

PACKAGES = (
  "jax jaxlib jax-cuda13-plugin dm-haiku optax orbax-checkpoint chex grain numpy torch triton "
  "liger-kernel cut-cross-entropy tokamax"
).split()


def main(dry: bool) -> None:
  for name in PACKAGES:
    try:
      print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
      print(name, "-")
  device = jax.devices()[0]
  memory = (device.memory_stats() or {}).get("bytes_limit")
  print("CHECK device", device.platform, device.device_kind, memory)

  # A square matmul; then the MLP of a 150m model on 8 sequences of 2,048 tokens.
  n = 512 if dry else 8192
  for N, D, F in ((n, n, n), (2 * n, 768, 3072)):
    a, b = random(0, N, D), random(1, D, F)
    rate = 2 * N * D * F / fastest(lambda a, b: a @ b, a, b)
    print(f"CEILING bfloat16 matmul {N}x{D}x{F}: {rate / 1e12:.0f} TFLOP/s (host clock)")
  x = jnp.zeros(2**24 if dry else 2**30, jnp.bfloat16)
  print(f"CEILING copy: {2 * x.nbytes / fastest(lambda x: x + 1, x) / 1e12:.2f} TB/s")
  print(f"CEILING empty call: {fastest(lambda x: x + 1, jnp.zeros(8)) * 1e6:.0f} us (host clock)")


def random(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def fastest(function: Callable, *arrays: jax.Array, repeats: int = 7) -> float:
  """Seconds of the fastest of some compiled calls."""
  run = jax.jit(function).lower(*arrays).compile()
  return timed(lambda: jax.block_until_ready(run(*arrays)), repeats)[0]


if __name__ == "__main__":
  main("--dry" in sys.argv)
