"""A table of the score-weighted loss: backends x orders x sizes, run here or only compiled.

  python -m benchmarks.loss                  # time, memory, matmul units; on a GPU under 8 minutes
  python -m benchmarks.loss --target=h100    # compile only, no device needed
  python -m benchmarks.loss --sizes=16384x1280x32000 --backends=xla,pallas_gpu

Orders: value; gradient by hidden, unembedding and weights; hvp = jax.jvp of that gradient along
all three (forward over reverse) without the gradient itself. `units` are matmul FLOPs in 2 N D V,
from the jaxpr and its trip counts; the minimum is 1, 3 and 7. `rate` is the minimum FLOPs over the
time, relative to a large matmul of the same dtype on this device. `temp` is the temporary memory of
the compiled module. Pallas backends are not timed on a CPU, where they are interpreted.
benchmarks/device/peers.py compares other libraries.

Axes: N tokens, D model width, V vocabulary.
"""

import argparse
import contextlib
import math
import statistics
import time

import jax
import jax.numpy as jnp

from kernels import score_weighted_loss
from planner import flops, targets

MINIMUM = {"value": 1, "gradient": 3, "hvp": 7}
SIZES = {
  "cpu": ["512x256x4096", "1024x256x32000"],
  "accelerator": ["4096x1280x32000", "16384x1280x32000", "16384x1280x256000"],
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", choices=targets.NAMES, help="compile for it and run nothing")
  parser.add_argument("--backends", help="comma-separated; default: those for the device")
  parser.add_argument("--sizes", help="comma-separated NxDxV")
  parser.add_argument("--dtype", help="of hidden; default float32 on CPU, else bfloat16")
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()

  if args.target:
    jax.config.update("jax_platforms", "cpu")
  platform = args.target or jax.default_backend()
  kind = "cpu" if platform == "cpu" else "gpu" if platform in ("gpu", "h100") else "tpu"
  ours = {"gpu": ["pallas_gpu"], "tpu": ["pallas_tpu"], "cpu": ["pallas_gpu", "pallas_tpu"]}[kind]
  backends = args.backends.split(",") if args.backends else ["reference", "xla", *ours]
  sizes = args.sizes.split(",") if args.sizes else SIZES["cpu" if kind == "cpu" else "accelerator"]
  dtype = args.dtype or ("float32" if kind == "cpu" else "bfloat16")
  run = args.target is None
  name = targets.device(args.target).device_kind if args.target else jax.devices()[0].device_kind
  peak = matmul_rate(dtype, 1024 if kind == "cpu" else 8192) if run else math.nan
  print(
    f"{name}, jax {jax.__version__}, hidden {dtype}, unembedding float32, "
    + (f"matmul {peak / 1e12:.2f} TFLOP/s, minimum of {args.repeats}" if run else "compiled only")
  )
  print(f"{'N x D x V':20}{'order':10}{'backend':14}{'units':>6}{'temp MB':>11}{'/ dense':>9}"
        f"{'ms':>10}{'median':>10}{'rate':>7}")  # fmt: skip
  for size in sizes:
    N, D, V = map(int, size.split("x"))
    unit = 2 * N * D * V  # FLOPs of a matmul
    dense = {}
    for backend in backends:
      for order in MINIMUM:
        row = f"{size:20}{order:10}{backend:14}"
        shapes = inputs(N, D, V, dtype, order)
        function = orders(backend)[order]
        units = matmul_flops(args.target, function, *shapes) / unit
        try:
          interpreted = kind == "cpu" and backend.startswith("pallas")
          if interpreted:
            print(f"{row}{units:6.2f}{'  interpreter'}", flush=True)
            continue
          compiled = (
            jax.jit(function).lower(*shapes).compile()
            if run
            else targets.compile_for(args.target, function, *shapes)[0]
          )
          temp = compiled.memory_analysis().temp_size_in_bytes
          dense[order] = temp if backend == "reference" else dense.get(order, math.nan)
          row += f"{units:6.2f}{temp / 1e6:11.1f}{temp / dense[order]:9.4f}"
          if run:
            low, median = seconds(compiled, shapes, V, args.repeats)
            rate = MINIMUM[order] * unit / low / peak
            row += f"{low * 1e3:10.2f}{median * 1e3:10.2f}{rate:7.0%}"
        except Exception as error:  # does not fit: continue with the table
          if "RESOURCE_EXHAUSTED" not in str(error):
            raise
          row += "  does not fit in memory"
        print(row, flush=True)


def orders(backend):
  """name -> function of (targets, hidden, unembedding, weights[, their tangents])."""

  def value(targets, *point):
    return score_weighted_loss(*point[:2], targets, point[2], backend=backend)

  def gradient(targets, *point):
    return jax.grad(lambda *x: value(targets, *x)[0], (0, 1, 2))(*point)

  def hvp(targets, *x):
    return jax.jvp(lambda *point: gradient(targets, *point), x[:3], x[3:])[1]

  return {"value": value, "gradient": gradient, "hvp": hvp}


def inputs(N, D, V, dtype, order):
  """The shapes of an order's arguments; the unembedding is a float32 parameter."""
  shape = jax.ShapeDtypeStruct
  point = [shape((N, D), dtype), shape((V, D), jnp.float32), shape((N,), jnp.float32)]
  return shape((N,), jnp.int32), *point * (2 if order == "hvp" else 1)


def matmul_flops(target, function, *shapes) -> float:
  """FLOPs of the matmuls that the results depend on, including loops and kernels' bodies."""
  with targets.lowering_for(target) if target else contextlib.nullcontext():
    counted = flops.count(function, *shapes, estimates=False)
  if counted.unknown_loops:
    raise ValueError("a loop has a trip count that is not in the jaxpr")
  return counted.matmuls


def seconds(compiled, shapes, V, repeats):
  """(minimum, median) of `repeats` runs on random inputs."""
  key = jax.random.key(0)
  arrays = [
    jax.random.randint(key, s.shape, 0, V, s.dtype)
    if s.dtype == jnp.int32
    else jax.random.normal(jax.random.fold_in(key, i), s.shape, s.dtype) / s.shape[-1] ** 0.5
    for i, s in enumerate(shapes)
  ]
  return timed(lambda: jax.block_until_ready(compiled(*arrays)), repeats)


def matmul_rate(dtype, n) -> float:
  """FLOPs per second of an [n, n] x [n, n] product."""
  a = jax.random.normal(jax.random.key(0), (n, n), dtype)
  product = jax.jit(lambda a: a @ a)
  return 2 * n**3 / timed(lambda: jax.block_until_ready(product(a)), 9)[0]


def timed(run, repeats):
  """(minimum, median) seconds of `repeats` calls, after one that is not timed."""
  run()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times), statistics.median(times)


if __name__ == "__main__":
  main()
