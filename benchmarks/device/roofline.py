"""The matmuls of a meta-step by kernel and shape, and the FLOPs they add up to. Traced on a CPU.

  python -m benchmarks.device.roofline [MODEL RATER REMAT]     # default 150m 50m block

Axes: T inner steps, B sequences, S tokens, V vocabulary.
"""

import collections
import sys

import jax
import jax.numpy as jnp

import datarater
import meta_step
import transformer
from kernels import device
from planner import flops


def main(model: str = "150m", rater: str = "50m", remat: str = "block") -> None:
  T, B, S, V = 2, 8, 2048, 32_000
  options = dict(remat=remat, attention_backend="pallas_gpu", dtype="bfloat16")
  model, rater = (transformer.preset(size, V, **options) for size in (model, rater))
  net = datarater.rater(rater)
  language_model = transformer.language_model(model, "pallas_gpu")
  algorithm = meta_step.Algorithm(
    problem=meta_step.datarater_problem(language_model, net),
    inner_optimizer=meta_step.inner_adamw(),
    meta_optimizer=meta_step.paper_meta_optimizer(),
    n_models=1,
    lifetime=10**6,
  )
  integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = lambda *axes: transformer.Batch(integers(*axes, S), integers(*axes, S))
  init = lambda key, probe: meta_step.init(algorithm, key, net.init(key), probe)
  step = lambda *arguments: meta_step.meta_step(algorithm, *arguments)
  with device.compile_for("NVIDIA H100"):
    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), batch(B))
    jaxpr = jax.make_jaxpr(step)(state, batch(1, T, B), batch(1, B)).jaxpr
  total, calls = collections.Counter(), collections.Counter()
  for equation, times, _ in flops.operations(jaxpr):
    if work := flops.matmul_flops(equation):
      label = describe(equation)
      total[label] += work * times
      calls[label] += times
  least = flops.minimum(model, rater, T, B, B, S)
  print(
    f"{total.total() / 1e12:.1f} TFLOP in matmuls; "
    f"{(least.total - least.kept) / 1e12:.1f} if nothing is computed twice"
  )
  for label, work in total.most_common(40):
    print(f"{work / 1e12:8.2f} TFLOP {calls[label]:5.0f} x {label}")


def describe(equation: jax.extend.core.JaxprEqn) -> str:
  params = equation.params
  if equation.primitive.name == "pallas_call":
    return str(params.get("name") or getattr(params.get("name_and_src_info"), "name", "kernel"))
  (contracted, _), _ = params["dimension_numbers"]
  left, out = equation.invars[0].aval, equation.outvars[0].aval
  summed = [left.shape[i] for i in contracted]
  return f"matmul {list(out.shape)} over {summed} {left.dtype} -> {out.dtype}"


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main(*sys.argv[1:])
