"""Memory and network traffic of a compiled module, read from its text, loops multiplied out."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_WIDTHS = {"pred": 8}
_NOTHING = frozenset(  # instructions that move no bytes, or whose bytes are counted elsewhere
  """parameter constant tuple get-tuple-element bitcast while conditional call after-all
  partition-id
  replica-id opt-barrier async-update async-done copy-done slice-done iota domain""".split()
)


class Collective(NamedTuple):
  """One exchange between devices."""

  kind: str  # in COLLECTIVES
  bytes: float  # a device's: of the result of a gather, of the operands of the others; once
  times: float  # that it runs in one run of the module
  shapes: tuple[tuple[int, ...], ...]  # of its results


class Traffic(NamedTuple):
  bytes: float  # read from and written to the device's memory by one run of the module
  collectives: list[Collective]
  unknown_loops: int  # loops whose trip count the text does not tell, counted once


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  operands: list[str]
  rest: str  # attributes, and the operands' text of a constant
  root: bool


def traffic(text: str) -> Traffic:
  """Of the text of a compiled module: of one device, as the module is partitioned already.

  A fusion reads its operands, or of one that it only slices, the slices; it writes its results, or
  of one updated in place, the update. On-chip memory (TPU's VMEM) counts nothing.
  """
  computations, entry = _parse(text)
  total, unknown = 0.0, 0
  found: dict[str, Collective] = {}

  def visit(name, times, fused):
    nonlocal total, unknown
    instructions = computations[name]
    for i in instructions.values():
      kind = next((k for k in COLLECTIVES if i.opcode in (k, f"{k}-start")), None)
      if kind:
        collective = _collective(kind, i, instructions, times, inside=name)
        # An asynchronous exchange stands in several computations, under one channel.
        key = (re.findall(r"channel_id=(\d+)", i.rest) or [i.name])[0]
        if key not in found or found[key].times < times:
          found[key] = collective
      if not fused:
        total += times * _bytes_moved(i, instructions, computations)
      if i.opcode == "while":
        trips = _trip_count(i, computations)
        unknown += trips is None
        visit(_called(i, "body"), times * (1 if trips is None else trips), fused)
      elif i.opcode == "conditional":
        for branch in _branches(i):
          visit(branch, times, fused)
      elif i.opcode in ("fusion", "call", "async-start"):
        called = _called(i, "calls") or _called(i, "to_apply")
        if called in computations:
          visit(called, times, fused or i.opcode == "fusion")

  visit(entry, 1.0, False)
  return Traffic(total, list(found.values()), unknown)


def by_kind(collectives: list[Collective]) -> dict[str, tuple[float, float]]:
  """Kind -> (exchanges, bytes of a device) of one run of the module."""
  sums = defaultdict(lambda: (0.0, 0.0))
  for c in collectives:
    times, size = sums[c.kind]
    sums[c.kind] = (times + c.times, size + c.times * c.bytes)
  return dict(sums)


def _parse(text):
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
    if header:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif current is not None and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
      kind, rest = _split_type(match[3])
      opcode, _, rest = rest.partition("(")
      end = _closing(rest)
      operands = re.findall(r"%([\w.\-]+)", rest[:end])
      instruction = _Instruction(match[2], kind, opcode.strip(), operands, rest, bool(match[1]))
      current[match[2]] = instruction
  return computations, entry


def _split_type(text):
  if text.startswith("("):
    end = 1 + _closing(text[1:]) + 1
    return text[:end], text[end:]
  kind, _, rest = text.partition(" ")
  return kind, rest


def _closing(text):
  """Index of the parenthesis that closes one opened before `text`."""
  depth = 1
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  return len(text)


def _size(kind, everywhere=False):
  """Bytes of a type's arrays; of those in the device's memory, unless `everywhere`."""
  total = 0
  for name, dims, layout in _ARRAY.findall(kind):
    if everywhere or not re.search(r"S\([1-9]\d*\)", layout):
      bits = _WIDTHS.get(name) or int(re.search(r"\d+", name)[0])
      total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
  return total


def _called(instruction, attribute):
  match = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
  return match[1] if match else None


def _branches(instruction):
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
  names = listed[1].split(",") if listed else []
  names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
  return [name.strip().lstrip("%") for name in names]


def _trip_count(instruction, computations):
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if known:
    return int(known[1])
  # JAX's scans count up from zero by one, to the one constant of their condition.
  condition = computations[_called(instruction, "condition")].values()
  constants = {
    i.rest.split(")")[0]
    for i in condition
    if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
  }
  return int(constants.pop()) if len(constants) == 1 else None


def _collective(kind, instruction, instructions, times, inside):
  operands = sum(_size(instructions[o].type, True) for o in instruction.operands)
  result = _size(instruction.type, True)
  if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
    result -= operands  # a start's result holds its operands too
  if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # how TPUs write it
  shapes = tuple(
    tuple(map(int, filter(None, dims.split(","))))
    for _, dims, _ in _ARRAY.findall(instruction.type)
  )
  return Collective(kind, result if kind == "all-gather" else operands, times, shapes)


def _bytes_moved(instruction, instructions, computations):
  i = instruction
  if i.opcode in _NOTHING or i.opcode.endswith("-done"):
    return 0
  if "AllocateBuffer" in i.rest:
    return 0
  read = [_size(instructions[o].type) for o in i.operands if o in instructions]
  if i.opcode in ("dynamic-slice", "slice", "gather"):
    return _size(i.type) * 2
  if i.opcode == "dynamic-update-slice":
    return read[1] * 2
  if i.opcode in ("copy-start", "slice-start"):  # (destination, source, context)
    target = _split_tuple(i.type)[0]
    return (_size(target) if i.opcode == "slice-start" else read[0]) + _size(target)
  if i.opcode == "fusion":
    fused = computations.get(_called(i, "calls"))
    if fused:
      return _fusion_reads(i, instructions, fused) + _fusion_writes(fused)
  return sum(read) + _size(i.type)


def _split_tuple(kind):
  return [match[0] for match in _ARRAY.finditer(kind)] or [kind]


def _fusion_reads(fusion, instructions, fused):
  total = 0.0
  parameters = [i for i in fused.values() if i.opcode == "parameter"]
  parameters.sort(key=lambda p: int(p.rest.split(")")[0]))
  for operand, parameter in zip(fusion.operands, parameters, strict=False):
    whole = _size(instructions[operand].type) if operand in instructions else 0
    total += min(whole, _part_read(parameter.name, fused)) if whole else 0
  return total


def _part_read(name, fused):
  """Bytes that the computation takes of a value of its own."""
  total = 0.0
  for user in fused.values():
    if name not in user.operands:
      continue
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      total += _size(user.type, True)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # in place: what is not updated is not touched
    elif user.opcode in ("bitcast", "get-tuple-element", "transpose", "reshape", "copy"):
      total += _part_read(user.name, fused)
    else:
      return math.inf
  return total


def _fusion_writes(fused):
  root = next(i for i in fused.values() if i.root)
  outputs = [fused[o] for o in root.operands] if root.opcode == "tuple" else [root]
  total = 0.0
  for output in outputs:
    written = output
    while written.opcode in ("bitcast", "copy", "convert") and written.operands[0] in fused:
      written = fused[written.operands[0]]
    if written.opcode == "dynamic-update-slice" and _size(output.type):
      total += _size(fused[written.operands[1]].type, True)
    else:
      total += _size(output.type)
  return total
