"""A table of attention: backends x orders x head widths, run here or only compiled.

  python -m benchmarks.attention                  # time and memory; on a GPU under 8 minutes
  python -m benchmarks.attention --target=h100    # compile only, no device needed
  python -m benchmarks.attention --heads=10x128 --batch=8 --seq=4096 --backends=xla,pallas_gpu

Orders: value; gradient by queries, keys and values; hvp = jax.jvp of that gradient (forward
over reverse) without the gradient itself. `TFLOP` counts a backend's matmul FLOPs. `moved` are the
bytes that the compiled module's operations read and write, assuming no cache. Pallas backends are
not timed on a CPU, where they are interpreted.

Axes: B sequences, H heads, S tokens, K head width.
"""

import argparse

import jax
import jax.numpy as jnp

import transformer
from benchmarks import loss
from planner import flops, hlo, targets


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", choices=targets.NAMES, help="compile for it and run nothing")
  parser.add_argument("--backends", help="comma-separated; default: xla and the device's kernels")
  parser.add_argument("--heads", help="comma-separated HxK; default those of 150m and 400m")
  parser.add_argument("--batch", type=int, help="B; default 8, on a CPU 1")
  parser.add_argument("--seq", type=int, help="S; default 2,048, on a CPU 256")
  parser.add_argument("--dtype", help="default float32 on a CPU, else bfloat16")
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()

  if args.target:
    jax.config.update("jax_platforms", "cpu")
  run = args.target is None
  name = jax.devices()[0].device_kind if run else targets.device(args.target).device_kind
  platform = jax.default_backend() if run else targets.chip(args.target).platform
  small = platform == "cpu"
  ours = "pallas_tpu" if platform == "tpu" else "pallas_gpu"
  backends = args.backends.split(",") if args.backends else ["xla", ours]
  dtype = args.dtype or ("float32" if small else "bfloat16")
  B, S = args.batch or (1 if small else 8), args.seq or (256 if small else 2048)
  print(f"{name}, jax {jax.__version__}, {dtype}, B {B}, S {S}, causal, one document a sequence")
  print(f"{'H x K':10}{'order':10}{'backend':12}{'TFLOP':>8}{'temp MB':>10}{'moved GB':>10}"
        f"{'ms':>9}{'median':>9}{'TFLOP/s':>9}")  # fmt: skip
  for heads in (args.heads or "12x64,10x128").split(","):
    H, K = map(int, heads.split("x"))
    for order in ("value", "gradient", "hvp"):
      for backend in backends:
        row = f"{heads:10}{order:10}{backend:12}"
        if small and backend != "xla":
          print(f"{row}  interpreter", flush=True)
          continue
        function, shapes = orders(backend)[order], inputs(B, S, H, K, dtype, order)
        if run:
          matmuls = flops.count(function, *shapes).matmuls
          compiled = jax.jit(function).lower(*shapes).compile()
          text = compiled.as_text()
        else:
          with targets.lowering_for(args.target):
            matmuls = flops.count(function, *shapes).matmuls
          compiled, text = targets.compile_for(args.target, function, *shapes)
        temp = compiled.memory_analysis().temp_size_in_bytes
        row += f"{matmuls / 1e12:8.3f}{temp / 1e6:10.1f}{hlo.traffic(text).bytes / 1e9:10.2f}"
        if run:
          low, median = loss.seconds(compiled, shapes, 1, args.repeats)
          row += f"{low * 1e3:9.2f}{median * 1e3:9.2f}{matmuls / low / 1e12:9.1f}"
        print(row, flush=True)


def orders(backend):
  """name -> function of (segments, q, k, v[, their tangents])."""
  config = transformer.TransformerConfig(1, 1, 1, 1, 1, 1, attention_backend=backend)

  def value(segments, *qkv):
    return transformer.attention(*qkv, segments, config, causal=True)

  def gradient(segments, *qkv):
    total = lambda *qkv: jnp.sum(jnp.sin(value(segments, *qkv).astype(jnp.float32)))
    return jax.grad(total, (0, 1, 2))(*qkv)

  def hvp(segments, *x):
    return jax.jvp(lambda *qkv: gradient(segments, *qkv), x[:3], x[3:])[1]

  return {"value": value, "gradient": gradient, "hvp": hvp}


def inputs(B, S, H, K, dtype, order):
  """The shapes of an order's arguments."""
  qkv = [jax.ShapeDtypeStruct((B, S, H, K), dtype)] * 3
  return jax.ShapeDtypeStruct((B, S), jnp.int32), *qkv * (2 if order == "hvp" else 1)


if __name__ == "__main__":
  main()
