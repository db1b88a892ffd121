"""Time, memory and FLOPs of one DataRater meta-step on the device here.

  python -m benchmarks.meta_step                       # T 2 and 8, three modes, a small model
  python -m benchmarks.meta_step --T=2 --mode=mixed --repeats=9
  python -m benchmarks.meta_step --model=150m --rater=50m --dtype=bfloat16 --vocab=32000 \\
    --seq=2048 --T=2 --mode=mixed --remat=block,products \\
    --attention_backend=pallas_gpu --profile                           # one accelerator

Prints a line per configuration: seconds of a meta-step, the rate of its necessary FLOPs (Minimum in
planner/flops.py, nothing computed twice) as a share of the chip's peak where it is known, and
memory. Compare only times measured in turn: they move with whatever else the machine does.
"""

import collections
import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

import datarater
import inner_loop
import meta_step
import transformer
from kernels.loss import BACKENDS
from planner import flops, targets
from runtime import cli, cpu
from runtime.cli import option

# Part of jax.Device.device_kind -> name in targets.CHIPS.
KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "H100": "h100", "H200": "h100"}


@dataclasses.dataclass(frozen=True)
class Settings:
  T: tuple[int, ...] = option((2, 8), "inner steps of the window", at_least=1, section="In turn")
  mode: tuple[str, ...] = option(
    ("mixed", "mixed_save", "reverse"), "of differentiation", choices=inner_loop.MODES
  )
  remat: tuple[str, ...] = option(("none",), "what is recomputed", choices=transformer.REMAT)
  members: tuple[int, ...] = option((1,), "inner models", at_least=1)
  attention_backend: tuple[str, ...] = option(
    (), "kernels of attention; default: the fastest", choices=transformer.ATTENTION
  )

  model: str | None = option(
    None, "default: --layers and --d", choices=transformer.PRESETS, section="Size"
  )
  rater: str | None = option(None, "default: the model's size", choices=transformer.PRESETS)
  layers: int = option(4, "of model and rater", at_least=1)
  d: int = option(256, "model width; heads are 64 wide", at_least=64)
  vocab: int = option(512, "V", at_least=1)
  seq: int = option(128, "S, tokens per sequence", at_least=1)
  batch: int = option(8, "sequences of an inner and of an outer batch", at_least=1)
  microbatches: int = option(1, "of a batch", at_least=1)
  dtype: str = option("float32", "of activations and matmul inputs")
  loss_backend: str | None = option(
    None, "kernels of the loss; default: the fastest", choices=BACKENDS
  )
  repeats: int = option(7, "timed meta-steps", at_least=1)
  profile: bool = option(False, "also list the device's kernels by time")


class Measured(NamedTuple):
  seconds: list[float]  # of each repeat
  compile_seconds: float
  memory: Any  # the compiler's analysis
  outer_loss: float  # the last one


def main() -> None:
  s = cli.read(Settings)
  cpu.keep_freed_memory()
  device = jax.devices()[0]
  chip = next((targets.CHIPS[v] for k, v in KINDS.items() if k in device.device_kind), None)
  print(
    f"{device.device_kind}, jax {jax.__version__}; vocabulary {s.vocab}, S {s.seq}, "
    f"B {s.batch}, {s.dtype}"
  )
  for T, members, remat, attention, mode in itertools.product(
    s.T, s.members, s.remat, s.attention_backend or (None,), s.mode
  ):
    model, rater = (
      shape(s, size, remat=remat, attention_backend=attention) for size in (s.model, s.rater)
    )
    measured = measure(s, T, members, model, rater, mode)
    least = flops.minimum(model, rater, T, s.batch, s.batch, s.seq)
    low, memory = min(measured.seconds), measured.memory
    rate = members * (least.total - least.kept) / low
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print(
      f"T={T} N={members} {remat:8s} {attention or 'fastest':10s} {mode:13s} min {low:.4f} s"
      f"  median {statistics.median(measured.seconds):.4f} s  {rate / 1e12:.3g} TFLOP/s"
      + (f" ({rate / chip.flops:.1%} of bfloat16 peak)" if chip else "")
      + f"  arguments {memory.argument_size_in_bytes / 2**20:,.0f}"
      f" + temp {memory.temp_size_in_bytes / 2**20:,.0f} MiB"
      + (f" (in use so far {in_use / 2**20:,.0f})" if in_use else "")
      + f"  compiled in {measured.compile_seconds:.0f} s  outer loss {measured.outer_loss:.4f}",
      flush=True,
    )


def shape(s: Settings, size: str | None, **options) -> transformer.TransformerConfig:
  size, options = size or s.model, options | dict(dtype=s.dtype)
  if size is not None:
    return transformer.preset(size, s.vocab, **options)
  wide = dict(d_model=s.d, n_heads=s.d // 64, head_dim=64, d_ff=4 * s.d)
  return transformer.TransformerConfig(s.vocab, n_layers=s.layers, **wide, **options)


def measure(
  s: Settings,
  T: int,
  members: int,
  model_shape: transformer.TransformerConfig,
  rater_shape: transformer.TransformerConfig,
  mode: str,
) -> Measured:
  model = transformer.language_model(model_shape, s.loss_backend, s.microbatches)
  rater = datarater.rater(rater_shape)
  save = mode == "mixed_save" and model_shape.remat == "none"
  algorithm = meta_step.Algorithm(
    problem=meta_step.datarater_problem(model, rater, s.microbatches, save),
    inner_optimizer=meta_step.inner_adamw(),
    meta_optimizer=meta_step.paper_meta_optimizer(),
    n_models=members,
    lifetime=10**6,
    mode=mode,
  )
  key = jax.random.key(0)
  tokens = jax.random.randint(key, (members, T + 1, s.batch, s.seq), 0, s.vocab)
  batches = transformer.Batch(tokens, tokens * 0 + 1)
  window = jax.tree.map(lambda x: x[:, :T], batches), jax.tree.map(lambda x: x[:, T], batches)
  probe = jax.tree.map(lambda x: x[0, 0], batches)
  init = jax.jit(lambda key, probe: meta_step.init(algorithm, key, rater.init(key), probe))
  state = init(key, probe)
  step = jax.jit(lambda state, *x: meta_step.meta_step(algorithm, state, *x), donate_argnums=0)
  start = time.perf_counter()
  step = step.lower(state, *window).compile()
  compile_seconds, seconds = time.perf_counter() - start, []
  for _ in range(s.repeats + 1):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, *window))
    seconds.append(time.perf_counter() - start)
  if s.profile:
    print_kernels(lambda: jax.block_until_ready(step(state, *window)))
  loss = float(metrics["outer_loss"].ravel()[-1])
  return Measured(seconds[1:], compile_seconds, step.memory_analysis(), loss)


def print_kernels(run) -> None:
  """The device's kernels in one call, by the time they take."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (path,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
  gpu = jax.default_backend() == "gpu"
  nanoseconds, calls = collections.Counter(), collections.Counter()
  for plane in profile.planes:
    for line in plane.lines if ("GPU" if gpu else "CPU") in plane.name else ():
      for event in line.events if "Stream" in line.name or not gpu else ():
        nanoseconds[event.name] += event.duration_ns
        calls[event.name] += 1
  total = max(nanoseconds.total(), 1)
  print(f"RESULT kernels of one meta-step: {total / 1e6:.1f} ms in {calls.total()} launches")
  for name, time_ns in nanoseconds.most_common(45):
    print(f"  {time_ns / 1e6:9.3f} ms {time_ns / total:6.1%} {calls[name]:6d} x {name[:110]}")


if __name__ == "__main__":
  cli.run(main, Settings)
