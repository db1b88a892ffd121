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
from config import PRESETS, Config
from corpus.tokenizer import load_tokenizer
from planner import flops, hlo, targets
from runtime import sharding
from runtime.cli import check, option

MICROBATCHES = (2, 4, 8, 16, 32, 64, 128)  # tried in turn if a program does not fit


@dataclasses.dataclass(frozen=True)
class Target:
  """Flags of the planner itself."""

  target: str | None = option(
    None, "v5e, v5p or v6e, with a topology as in v5p:4x4x4; or h100", section="Target"
  )
  mesh: str | None = option(None, "population=N,data=M: how devices share the work; default all")
  preset: str = option(
    "paper",
    "of train.py: sets the defaults of the flags below, which are shown for demo",
    choices=PRESETS,
  )
  vocabulary: int | None = option(
    None, "V; default 32,000, or that of --tokenizer=bytes", at_least=1
  )
  step_time: float | None = option(None, "seconds of a measured meta-step: reports its utilization")
  utilization: float = option(0.4, "share of the peak assumed for chip-hours", at_least=0)
  search: bool = option(True, "try other flags if the program does not fit")


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


def plan(config: Config, options: Target, given: dict[str, Any]) -> None:
  """Prints the report; if the program does not fit, tries other flags and prints their reports.

  Args:
    given: the flags of the run on the command line, to print with each report.
  """
  jax.config.update("jax_platforms", "cpu")
  o, tried = options, [({}, options.target, options.mesh)]
  check(o.target is not None, "name the hardware with --target: v5p:4x4x4, v5e:8x8, h100, ...")
  default = load_tokenizer("bytes").vocab_size if config.tokenizer == "bytes" else 32_000
  vocabulary = o.vocabulary or default
  if o.search:
    mesh = settings.make_mesh(config, o.mesh, targets.devices(o.target))
    tried += alternatives(config, o.target, o.mesh, mesh.shape["data"])
  for changes, target, spec in tried:
    print(f"$ {command(given | changes, target, spec)}", flush=True)
    changed = dataclasses.replace(config, **changes)
    compiled = compile_run(changed, target, spec, vocabulary)
    print(report(changed, target, vocabulary, compiled, o.step_time, o.utilization))
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
  traffic = hlo.traffic(text, 1 / config.steps_per_call)
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
  chip, n, c, work = targets.chip(target), compiled.devices, compiled, compiled.work
  least, members = minimum(config, vocabulary), config.drawn_members
  mixed, once = members * least.total, members * (least.total - least.kept)
  matmuls = work.matmuls - work.recomputed
  row = lambda label, text: f"  {label:22s} {text}"
  giga = lambda x: f"{x / 1e9:.2f} GB"
  loops = lambda count: f" ({count} loops of unknown length)" if count else ""
  parts = f"arguments {giga(c.arguments)} + outputs {giga(c.outputs)} + temp {giga(c.temp)}"
  ratios = f"{matmuls / mixed:.3f} of it, with remat {work.matmuls / mixed:.3f}"
  seconds = lambda matmuls: f"{matmuls / n / chip.flops:.3g} s"
  lines = [
    f"{target}: {n} device{'s' * (n > 1)}; compiled in {c.seconds:.0f} s",
    f"memory per device ({giga(chip.memory)}): {c.refusal or f'{parts}; peak {giga(c.peak)}'}",
    "fits" if c.fits else "DOES NOT FIT",
    "",
    "one meta-step, all devices",
    row("matmuls", f"{matmuls:.4g} FLOPs"),
    row("recomputed by remat", f"{work.recomputed:.4g} FLOPs"),
    row("element-wise", f"{work.elementwise:.4g}{loops(work.unknown_loops)}"),
    row("minimum of mode mixed", f"{mixed:.4g} FLOPs: the program's matmuls are {ratios}"),
    *(row(f"  {name}", f"{members * x:.4g}") for name, x in least._asdict().items()),
    row("nothing computed twice", f"{once:.4g} FLOPs (less `kept`)"),
    "",
    "one meta-step, per device",
    row(
      "least time by FLOPs",
      f"{seconds(work.matmuls)} at the chip's peak ({seconds(once)} if nothing is computed twice)",
    ),
  ]
  if c.traffic:
    least_time = f"at least {c.traffic.bytes / chip.bandwidth:.3g} s"
    unknown = loops(c.traffic.unknown_loops)
    lines.append(row("memory traffic", f"{giga(c.traffic.bytes)}: {least_time}{unknown}"))
    for kind, (times, size) in sorted(c.traffic.collectives.items()):
      lines.append(row(kind, f"{giga(size)} in {times:.0f}"))
  if c.estimate and c.estimate > 0:
    lines.append(row("compiler's estimate", f"{c.estimate:.3g} s, loop bodies counted once"))
  if step_time:
    used = f"{once / (n * chip.flops * step_time):.1%} at {step_time:g} s (necessary FLOPs)"
    lines.append(row("model FLOPs utilization", used))
  K, S = config.meta_steps, config.sequence_length
  inner, outer = config.inner_steps * config.inner_batch, config.outer_batch
  tokens = lambda sequences: f"{K * members * sequences * S:.4g}"
  hours = K * once / (utilization * chip.flops) / 3600
  used = f"at {utilization:.0%} utilization ({hours / n:,.1f} h on {n})"
  lines += [
    "",
    f"the run, {K:,} meta-steps",
    row("tokens", f"{tokens(inner)} inner, {tokens(outer)} outer"),
    row("FLOPs", f"{K * once:.4g} necessary, {K * work.matmuls:.4g} in all"),
    row("chip-hours", f"{hours:,.3g} {used}"),
  ]
  return "\n".join(lines)


def minimum(config: Config, vocabulary: int) -> flops.Minimum:
  """The fewest FLOPs of one member's meta-step."""
  c = config
  models = [transformer.preset(size, vocabulary) for size in (c.model, c.rater)]
  return flops.minimum(*models, c.inner_steps, c.inner_batch, c.outer_batch, c.sequence_length)


def alternatives(
  config: Config, target: str, spec: str | None, data_shards: int
) -> Iterator[tuple[dict[str, Any], str, str | None]]:
  """Yields (changed flags of train.py, target, mesh) that need less memory, the cheapest first."""
  less = {} if config.mode in ("mixed", "first_order") else {"mode": "mixed"}
  if less:
    yield less, target, spec
  sizes = config.inner_batch, config.outer_batch
  for parts in MICROBATCHES:
    if parts > config.microbatches and all(b % (parts * data_shards) == 0 for b in sizes):
      yield less | {"microbatches": parts}, target, spec
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
