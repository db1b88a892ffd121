"""The GPU kernels at real sizes with their own tiles, against float32 matmuls.

  python -m benchmarks.device.correct loss|attention [--dry]

Unit tests use tiny tiles and N = 37; registers, pipelining, L2 and ragged edges at real tiles show
only here. Errors are ||a - e|| / ||e||. Every result is computed twice and must repeat exactly.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention, loss

ORDERS = ("value", "gradient", "hvp")


def main(which: str, dry: bool) -> int:
  """Prints a line per comparison; returns the number that failed."""
  failed = (check_loss if which == "loss" else check_attention)(dry)
  print(f"RESULT correctness: {failed} of {which} failed")
  return failed


def check_loss(dry: bool) -> int:
  failed = 0
  for N, D, V in (
    [(64, 64, 300)] if dry else [(4096, 1280, 32000), (1000, 576, 5003), (16384, 768, 32000)]
  ):
    for order in ORDERS:
      arrays = draw(loss.inputs(N, D, V, "bfloat16", order), V, 0)
      # The kernels round W to the dtype of hidden, hence so does the reference's input.
      wide = [x.astype(jnp.bfloat16).astype(jnp.float32) if x.ndim == 2 else x for x in arrays]
      name = f"loss {N}x{D}x{V} {order}"
      failed += not agree(name, loss.orders, order, arrays, wide, bound=1.5e-2)
  N, D, V = (64, 64, 300) if dry else (300, 320, 2001)
  arrays = draw(loss.inputs(N, D, V, "float32", "hvp"), V, 1)
  return failed + (not agree("loss float32 hvp", loss.orders, "hvp", arrays, arrays, bound=1e-4))


def check_attention(dry: bool) -> int:
  failed = 0
  for B, S, H, K in (
    [(1, 64, 2, 16)] if dry else [(2, 2048, 12, 64), (1, 2048, 10, 128), (2, 777, 4, 64)]
  ):
    third = jnp.arange(S) * 3 // S
    segments = jnp.broadcast_to(1 + third, (B, S)).astype(jnp.int32)  # three documents
    for order in ORDERS:
      _, *qkv = draw(attention.inputs(B, S, H, K, "bfloat16", order), 1, 2)
      wide = [segments, *(x.astype(jnp.float32) for x in qkv)]
      name = f"attention {B}x{S}x{H}x{K} {order}"
      failed += not agree(name, attention.orders, order, [segments, *qkv], wide, bound=2e-2)
  return failed


def agree(name: str, orders, order: str, arrays: list, wide: list, bound: float) -> bool:
  """Compares the kernels on `arrays` with XLA in float32 on `wide`."""
  start = time.perf_counter()
  try:
    kernel = jax.jit(orders("pallas_gpu")[order])
    actual, again = (jax.tree.leaves(kernel(*arrays)) for _ in range(2))
    with jax.default_matmul_precision("float32"):
      expected = jax.tree.leaves(jax.jit(orders("xla")[order])(*wide))
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    repeats = all(np.array_equal(a, b) for a, b in zip(actual, again, strict=True))
  except Exception as error:  # a failure is a result
    print(f"CHECK BAD {name} {type(error).__name__}: {str(error)[:600]}", flush=True)
    return False
  fine = repeats and all(error < bound for error in errors)
  print(
    f"CHECK {'ok ' if fine else 'BAD'} {name} errors {' '.join(f'{x:.1e}' for x in errors)}"
    f"{'' if repeats else ' NOT REPEATABLE'} ({time.perf_counter() - start:.1f} s)",
    flush=True,
  )
  return fine


def draw(shapes: tuple, V: int, seed: int) -> list[jax.Array]:
  """Standard normal arrays, but the unembedding (index 2 of a loss) of variance 1 / D; integers
  below V."""
  arrays = []
  for i, s in enumerate(shapes):
    key = jax.random.fold_in(jax.random.key(seed), i)
    if s.dtype == jnp.int32:
      arrays.append(jax.random.randint(key, s.shape, 0, V, s.dtype))
    else:
      scale = s.shape[-1] ** -0.5 if i == 2 and V > 1 else 1
      arrays.append((scale * jax.random.normal(key, s.shape, jnp.float32)).astype(s.dtype))
  return arrays


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
  a, e = (np.asarray(x.astype(jnp.float32), np.float64) for x in (actual, expected))
  return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], "--dry" in sys.argv) > 0)
