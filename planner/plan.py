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

MICROBATCHES = (2, 4, 8, 16, 32, 64, 128)  # tried in turn if a program does not fit


class Compiled(NamedTuple):
  """The program of a run for one target; bytes per device."""

  devices: int
  fits: bool
  peak: float  # arguments, outputs and temporary memory together
  work: flops.Flops  # of one meta-step on all devices
  seconds: float  # of compilation
  arguments: float = math.nan  # the state among them
  outputs: float = math.nan  # those that do not replace an argument
  temp: float = math.nan
  traffic: hlo.Traffic | None = None  # of one meta-step; None if the program does not fit
  estimate: float | None = None  # the compiler's, seconds of a meta-step; loop bodies counted once
  refusal: str = ""  # the compiler's error if the program does not fit


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
    spec: the mesh, as in --mesh.
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
  for changes, target, spec in tried:
    print(f"$ {command((given or {}) | changes, target, spec)}", flush=True)
    changed = dataclasses.replace(config, **changes)
    compiled = compile_run(changed, target, spec, vocabulary)
    print(report(changed, target, vocabulary, compiled, step_time, utilization))
    if compiled.fits:
      return
    print(flush=True)
  print("nothing tried fits: use more devices along `data`, or a smaller batch or model")


def command(given: dict[str, Any], target: str, spec: str | None) -> str:
  """The command line of a plan."""
  given = given | {"target": target} | ({"mesh": spec} if spec else {})
  shown = lambda value: ",".join(value) if isinstance(value, (list, tuple)) else value
  return " ".join(["python -m planner", *(f"--{k}={shown(v)}" for k, v in given.items())])


def compile_run(config: Config, target: str, spec: str | None, vocabulary: int) -> Compiled:
  """Compiles the program of train.py.

  Raises:
    UserError: the target or mesh does not exist, or its compiler is not installed.
  """
  chip, devices = targets.chip(target), targets.devices(target)
  mesh = settings.make_mesh(config, spec, devices)
  single = SingleDeviceSharding(devices[0])
  program = settings.build(config, vocabulary)

  def batch(shape, axes):
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.named(mesh, *axes) or single)
    return transformer.Batch(array, array)

  batches = {name: batch(*how) for name, how in settings.batch_shapes(config).items()}
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  start = time.monotonic()
  with targets.lowering_for(target), sharding.use_mesh(mesh):
    state = jax.eval_shape(program.init, key, batches["probe"])
    where = sharding.state_shardings(mesh, state) or jax.tree.map(lambda _: single, state)
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    step = program.jit_meta_steps((where, sharding.named(mesh) or single))
    traced = step.trace(jax.tree.map(placed, state, where), *batches.values())
    work = flops.count_jaxpr(traced.jaxpr.jaxpr).times(1 / config.steps_per_call)
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    try:
      compiled, text = targets.compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return _refused(str(error), mesh.size, work, time.monotonic() - start)
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + outputs + temp
  traffic = _of_one_step(hlo.traffic(text), config.steps_per_call)
  estimate = (compiled.cost_analysis() or {}).get("optimal_seconds")
  fits = peak <= chip.memory
  return Compiled(mesh.size, fits, peak, work, seconds, arguments, outputs, temp, traffic, estimate)


def report(
  config: Config,
  target: str,
  vocabulary: int,
  compiled: Compiled,
  step_time: float | None = None,
  utilization: float = 0.4,
) -> str:
  """Describes a compiled program, as text."""
  chip, n, c = targets.chip(target), compiled.devices, compiled
  least, members = minimum(config, vocabulary), config.drawn_members
  mixed, once = members * least.total, members * (least.total - least.kept)
  matmuls = c.work.matmuls - c.work.recomputed
  giga = lambda x: f"{x / 1e9:.2f} GB"
  loops = lambda count: f" ({count} loops of unknown length)" if count else ""
  lines = [
    f"{target}: {n} device{'s' * (n > 1)}; compiled in {c.seconds:.0f} s",
    f"memory per device ({giga(chip.memory)}): "
    + (
      c.refusal
      or f"arguments {giga(c.arguments)} + outputs {giga(c.outputs)} + temp {giga(c.temp)}; "
      f"peak {giga(c.peak)}"
    ),
    "fits" if c.fits else "DOES NOT FIT",
    "",
    "one meta-step, all devices",
    f"  matmuls                {matmuls:.4g} FLOPs",
    f"  recomputed by remat    {c.work.recomputed:.4g} FLOPs",
    f"  element-wise           {c.work.elementwise:.4g}{loops(c.work.unknown_loops)}",
    f"  minimum of mode mixed  {mixed:.4g} FLOPs: the program's matmuls are "
    f"{matmuls / mixed:.3f} of it, with remat {c.work.matmuls / mixed:.3f}",
    *(f"    {name:20s} {members * x:.4g}" for name, x in least._asdict().items()),
    f"  nothing computed twice {once:.4g} FLOPs (less `kept`)",
    "",
    "one meta-step, per device",
    f"  least time by FLOPs    {c.work.matmuls / n / chip.flops:.3g} s at the chip's peak "
    f"({once / n / chip.flops:.3g} s if nothing is computed twice)",
  ]
  if c.traffic:
    lines.append(
      f"  memory traffic         {giga(c.traffic.bytes)}: at least "
      f"{c.traffic.bytes / chip.bandwidth:.3g} s{loops(c.traffic.unknown_loops)}"
    )
    for kind, (times, size) in sorted(hlo.by_kind(c.traffic.collectives).items()):
      lines.append(f"  {kind:22s} {giga(size)} in {times:.0f}")
  if c.estimate and c.estimate > 0:
    lines.append(f"  compiler's estimate    {c.estimate:.3g} s, loop bodies counted once")
  if step_time:
    used = once / (n * chip.flops * step_time)
    lines.append(f"  model FLOPs utilization {used:.1%} at {step_time:g} s (necessary FLOPs)")
  K, S, T = config.meta_steps, config.sequence_length, config.inner_steps
  hours = K * once / (utilization * chip.flops) / 3600
  lines += [
    "",
    f"the run, {K:,} meta-steps",
    f"  tokens                 {K * members * T * config.inner_batch * S:.4g} inner, "
    f"{K * members * config.outer_batch * S:.4g} outer",
    f"  FLOPs                  {K * once:.4g} necessary, {K * c.work.matmuls:.4g} in all",
    f"  chip-hours             {hours:,.3g} at {utilization:.0%} utilization "
    f"({hours / n:,.1f} h on {n})",
  ]
  return "\n".join(lines)


def minimum(config: Config, vocabulary: int) -> flops.Minimum:
  """The fewest FLOPs of one member's meta-step."""
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
  """A program that the compiler refused; the first size that its error names is the peak."""
  used = re.search(r"\b([\d.]+)([KMGT])\b", error)
  peak = float(used[1]) * 1024.0 ** "_KMGT".index(used[2]) if used else math.nan
  return Compiled(devices, False, peak, work, seconds, refusal=error.splitlines()[0])


def _of_one_step(traffic, steps):
  collectives = [c._replace(times=c.times / steps) for c in traffic.collectives]
  return traffic._replace(bytes=traffic.bytes / steps, collectives=collectives)
