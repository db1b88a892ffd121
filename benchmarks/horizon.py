"""Memory and time of the gradient of a whole run: T inner steps, as `inner_loop.unroll` plans them.

  python -m benchmarks.horizon                        # CPU: compiled memory of a small model, time
  python -m benchmarks.horizon --T=8,100 --repeats=3
  python -m benchmarks.horizon --target=h100 --model=150m --T=8,100,1000    # compile only
  python -m benchmarks.horizon --model=150m --T=8,100 --repeats=2           # on a GPU

Differentiates the outer loss with respect to a weight per step and sequence. Prints, per T and
number of replays: what the plan saves in copies of the parameters, what the compiled program takes
beside its arguments, and the time. Times of one T are measured in turn.
"""

import dataclasses

import jax
import jax.numpy as jnp

import inner_loop
import meta_step
import mixflow
import transformer
from benchmarks.loss import timed
from planner import targets
from runtime import cli, cpu
from runtime.cli import option


@dataclasses.dataclass(frozen=True)
class Settings:
  T: tuple[int, ...] = option((8, 100, 1000), "inner steps", at_least=1, section="In turn")
  replay: tuple[int, ...] = option((0, 1, 2), "repeats of a step in the backward pass", at_least=0)
  model: str = option("nano", "size of the model", choices=transformer.PRESETS, section="Size")
  batch: int = option(8, "sequences of a batch", at_least=1)
  repeats: int = option(0, "timed gradients; 0: compile only", at_least=0)
  target: str | None = option(None, "compile for it and run nothing", choices=targets.NAMES)


def main() -> None:
  s = cli.read(Settings)
  cpu.keep_freed_memory()
  if s.target:
    jax.config.update("jax_platforms", "cpu")
  platform = targets.chip(s.target).platform if s.target else jax.default_backend()
  if platform == "cpu":
    S, vocab, dtype, backend = 16, 258, "float32", "xla"
  else:
    S, vocab, dtype = 2048, 32_000, "bfloat16"
    backend = "pallas_tpu" if platform == "tpu" else "pallas_gpu"
  shape = transformer.preset(s.model, vocab, attention_backend=backend, dtype=dtype)
  model = transformer.language_model(shape, backend)
  optimizer = meta_step.inner_adamw()

  def loss(params, weights_B, batch):
    return model.loss(params, weights_B, batch)[0], None

  def gradient(state, weights_TB, batches, outer, replay):
    def outer_loss(weights_TB):
      end, _ = inner_loop.unroll(
        loss, optimizer, state, weights_TB, batches, truncated=True, replay=replay
      )
      return loss(end.params, jnp.full(s.batch, 1 / s.batch), outer)[0]

    return jax.grad(outer_loss)(weights_TB)

  state = jax.eval_shape(
    lambda key: inner_loop.init(optimizer, model.init(key)), jax.ShapeDtypeStruct((2,), "uint32")
  )
  size = 4 * transformer.parameter_count(state.params)
  print(f"{s.target or jax.devices()[0].device_kind}: {s.model}, {size / 4e6:.1f}M parameters")
  print(f"{'T':>6}{'replay':>8}{'plan':>8}{'compiled':>10}{'temporary GB':>14}{'s':>8}  plan")
  for T in s.T:
    programs = {}
    for replay in s.replay:
      batch = transformer.Batch(*[jax.ShapeDtypeStruct((T, s.batch, S), "int32")] * 2)
      outer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
      x = state, jax.ShapeDtypeStruct((T, s.batch), "float32"), batch, outer
      run = lambda *x, replay=replay: gradient(*x, replay)
      programs[replay] = if_it_fits(lambda run=run, x=x: compiled_for(s.target, run, x)), x
    seconds = {}
    for replay, (compiled, x) in programs.items():
      if compiled and s.repeats:
        seconds[replay] = if_it_fits(lambda c=compiled, x=x: fastest(c, x, s.repeats))
    for replay, (compiled, _) in programs.items():
      temp = compiled.memory_analysis().temp_size_in_bytes if compiled else float("nan")
      plan = mixflow.plan(T, replay=replay)
      print(
        f"{T:6}{replay:8}{plan.saved():8}{temp / size:10.1f}{temp / 1e9:14.3f}"
        f"{seconds.get(replay) or '':>8.3}  {plan.first} + {' x '.join(map(str, plan.loops))}"
        f" x {plan.length}",
        flush=True,
      )


def compiled_for(target: str | None, function, shapes) -> jax.stages.Compiled:
  if target:
    return targets.compile_for(target, function, *shapes)[0]
  return jax.jit(function).lower(*shapes).compile()


def if_it_fits(function):
  """function(); None where it does not fit in memory."""
  try:
    return function()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise


def fastest(compiled, shapes, repeats: int) -> float:
  """Seconds, on random numbers."""
  key = jax.random.key(0)
  draw = {
    "int32": lambda x: jax.random.randint(key, x.shape, 1, 2),
    "uint32": lambda x: jax.random.bits(key, x.shape),
    "float32": lambda x: jax.random.normal(key, x.shape) / 50,
  }
  x = jax.tree.map(lambda x: draw[str(x.dtype)](x), shapes)
  return timed(lambda: jax.block_until_ready(compiled(*x)), repeats)[0]


if __name__ == "__main__":
  cli.run(main, Settings)
