"""Compiles a meta-training run for hardware you do not have, and reports what it needs."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import config as settings
import transformer
from config import Config
from corpus.tokenizer import load_tokenizer
from planner import flops, hlo, targets
from runtime import sharding

MICROBATCHES = (2, 4, 8, 16, 32, 64, 128)  # tried in turn where a program does not fit


class Compiled(NamedTuple):
  """The program of a run (`steps_per_call` meta-steps) for one target; bytes per device."""

  devices: int
  fits: bool
  arguments: float  # bytes, the state among them
  outputs: float  # bytes that do not take the place of an argument
  temp: float  # bytes
  peak: float  # bytes: all of these at once
  work: flops.Flops  # of all devices, one meta-step
  traffic: hlo.Traffic | None  # of one meta-step; None where it does not fit
  estimate: float | None  # seconds of one meta-step, the compiler's own; loops' bodies once
  seconds: float  # that compiling took
  refusal: str  # of the compiler, where the program does not fit


def compile_run(config: Config, target: str, mesh_spec: str | None, vocabulary: int):
  """Compiles the program of train.py.

  Raises:
    UserError: a target or mesh that does not exist, or whose compiler is not installed.
  """
  chip = targets.chip(target)
  devices = targets.devices(target)
  grid = settings.make_mesh(config, mesh_spec, devices)
  single = SingleDeviceSharding(devices[0])
  program, M = settings.build(config, vocabulary), config.steps_per_call

  def batch(shape, axes):
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.named(grid, *axes) or single)
    return transformer.Batch(array, array)

  batches = {name: batch(*how) for name, how in settings.batch_shapes(config).items()}
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  start = time.monotonic()
  with targets.lowering_for(target), sharding.use_mesh(grid):
    state = jax.eval_shape(program.init, key, batches["probe"])
    where = sharding.state_shardings(grid, state) or jax.tree.map(lambda _: single, state)
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )
    step = program.jit_meta_steps((where, sharding.named(grid) or single))
    traced = step.trace(state, batches["inner"], batches["outer"], batches["probe"])
    work = flops.count_jaxpr(traced.jaxpr.jaxpr).times(1 / M)
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    try:
      compiled, text = targets.compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return _refused(str(error), grid.size, work, time.monotonic() - start)
  return _measured(compiled, text, chip, grid.size, work, M, time.monotonic() - start)


def report(
  config: Config,
  target: str,
  vocabulary: int,
  compiled: Compiled,
  step_time: float | None = None,
  utilization: float = 0.4,
) -> str:
  """The report of a compiled program, as text."""
  chip, n, c = targets.chip(target), compiled.devices, compiled
  least = minimum(config, vocabulary)
  of_members = config.drawn_members
  mixed, once = of_members * least.total, of_members * (least.total - least.kept)
  formed = c.work.products - c.work.recomputed
  giga = lambda x: f"{x / 1e9:.2f} GB"
  lines = [
    f"{target}: {n} device{'s' * (n > 1)}; compiled in {c.seconds:.0f} s",
    f"memory of a device ({giga(chip.memory)}): "
    + (
      f"arguments {giga(c.arguments)} + outputs {giga(c.outputs)} + temp {giga(c.temp)}; "
      f"peak {giga(c.peak)}"
      if not c.refusal
      else c.refusal
    ),
    "fits" if c.fits else "DOES NOT FIT",
    "",
    "one meta-step, all devices",
    f"  matmuls                {formed:.4g} FLOPs",
    f"  recomputed by remat    {c.work.recomputed:.4g} FLOPs",
    f"  element-wise           {c.work.elementwise:.4g}"
    + f" ({c.work.unknown_loops} loops of unknown length)" * bool(c.work.unknown_loops),
    f"  minimum of mode mixed  {mixed:.4g} FLOPs: the program's matmuls are "
    f"{formed / mixed:.3f} of it, with remat {c.work.products / mixed:.3f}",
    *(f"    {name:20s} {of_members * x:.4g}" for name, x in least._asdict().items()),
    f"  nothing computed twice {once:.4g} FLOPs (less `kept`)",
    "",
    "one meta-step, a device",
    f"  least time by FLOPs    {c.work.products / n / chip.flops:.3g} s at the chip's peak "
    f"({once / n / chip.flops:.3g} s if nothing is computed twice)",
  ]
  if c.traffic:
    lines += [
      f"  memory traffic         {giga(c.traffic.bytes)}: at least "
      f"{c.traffic.bytes / chip.bandwidth:.3g} s"
      + f" ({c.traffic.unknown_loops} loops of unknown length)"
      * bool(c.traffic.unknown_loops)
    ]
    for kind, (times, size) in sorted(hlo.by_kind(c.traffic.collectives).items()):
      lines.append(f"  {kind:22s} {giga(size)} in {times:.0f}")
  if c.estimate and c.estimate > 0:
    lines.append(f"  compiler's estimate    {c.estimate:.3g} s, loop bodies counted once")
  if step_time:
    used = once / (n * chip.flops * step_time)
    lines.append(f"  model FLOPs utilization {used:.1%} at {step_time:g} s (necessary FLOPs)")
  K, S, T = config.meta_steps, config.sequence_length, config.inner_steps
  inner_tokens = K * of_members * T * config.inner_batch * S
  outer_tokens = K * of_members * config.outer_batch * S
  hours = K * once / (utilization * chip.flops) / 3600
  lines += [
    "",
    f"the run, {K:,} meta-steps",
    f"  tokens                 {inner_tokens:.4g} inner, {outer_tokens:.4g} outer",
    f"  FLOPs                  {K * once:.4g} necessary, {K * c.work.products:.4g} in all",
    f"  chip-hours             {hours:,.3g} at {utilization:.0%} utilization"
    f" ({hours / n:,.1f} h on {n})",
  ]
  return "\n".join(lines)


def minimum(config: Config, vocabulary: int) -> flops.Minimum:
  """The least FLOPs of one member's meta-step."""
  return flops.minimum(
    transformer.preset(config.model, vocabulary),
    transformer.preset(config.rater, vocabulary),
    config.inner_steps,
    config.inner_batch,
    config.outer_batch,
    config.sequence_length,
  )


def alternatives(
  config: Config, target: str, spec: str | None, data_shards: int
) -> Iterator[tuple[dict[str, Any], str, str | None]]:
  """Yields (changed flags of train.py, target, mesh) that need less memory, the cheapest first."""
  less = {} if config.mode in ("mixed", "mixed_offload", "first_order") else {"mode": "mixed"}
  if less:
    yield less, target, spec
  sizes, most = (config.inner_batch, config.outer_batch), {}
  for parts in MICROBATCHES:
    if parts > config.microbatches and all(b % (parts * data_shards) == 0 for b in sizes):
      most = {"microbatches": parts}
      yield less | most, target, spec
  if less or config.mode == "mixed":
    yield most | {"mode": "mixed_offload"}, target, spec
  if ":" in target and all(b % (2 * data_shards) == 0 for b in sizes):
    chip, axes = target.split(":")
    sizes = [int(size) for size in axes.split("x")]
    population = math.prod(sizes) // data_shards
    sizes[sizes.index(min(sizes))] *= 2
    larger = f"{chip}:{'x'.join(map(str, sorted(sizes)))}"
    yield less, larger, f"population={population},data={2 * data_shards}"


def _refused(error, devices, work, seconds):
  """A program that the compiler refused; the first size it names is what the program needs."""
  used = re.search(r"\b([\d.]+)([KMGT])\b", error)
  peak = float(used[1]) * 1024.0 ** "_KMGT".index(used[2]) if used else math.nan
  said = error.splitlines()[0]
  nan = math.nan
  return Compiled(devices, False, nan, nan, nan, peak, work, None, None, seconds, said)


def _measured(compiled, text, chip, devices, work, M, seconds):
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + outputs + temp
  traffic = hlo.traffic(text)
  traffic = traffic._replace(
    bytes=traffic.bytes / M,
    collectives=[c._replace(times=c.times / M) for c in traffic.collectives],
  )
  costs = compiled.cost_analysis() or {}
  estimate = costs.get("optimal_seconds")
  fits = peak <= chip.memory
  return Compiled(
    devices, fits, arguments, outputs, temp, peak, work, traffic, estimate, seconds, ""
  )


def plan(
  config: Config,
  target: str,
  spec: str | None = None,
  vocabulary: int | None = None,
  step_time: float | None = None,
  utilization: float = 0.4,
  search: bool = True,
  given: dict[str, Any] | None = None,
) -> None:
  """Prints the report; if the program does not fit, tries other flags and prints their reports.

  Args:
    vocabulary: V; default 32,000, or that of --tokenizer=bytes.
    given: the flags of the command line, to print with each report.
  """
  jax.config.update("jax_platforms", "cpu")
  vocabulary = vocabulary or (
    load_tokenizer("bytes").vocab_size if config.tokenizer == "bytes" else 32_000
  )
  tried = [({}, target, spec)]
  if search:
    shards = settings.make_mesh(config, spec, targets.devices(target)).shape["data"]
    tried += alternatives(config, target, spec, shards)
  for changed, target, spec in tried:
    print(f"$ {command((given or {}) | changed, target, spec)}", flush=True)
    changed = dataclasses.replace(config, **changed)
    compiled = compile_run(changed, target, spec, vocabulary)
    print(report(changed, target, vocabulary, compiled, step_time, utilization))
    if compiled.fits:
      return
    print(flush=True)
  print("nothing tried fits: more devices along `data` are needed, or a smaller batch or model")


def command(given: dict[str, Any], target: str, spec: str | None) -> str:
  """The command line of a plan."""
  given = given | {"target": target} | ({"mesh": spec} if spec else {})
  shown = lambda value: ",".join(value) if isinstance(value, (list, tuple)) else value
  return " ".join(["python -m planner", *(f"--{k}={shown(v)}" for k, v in given.items())])
