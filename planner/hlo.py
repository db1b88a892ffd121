"""Memory traffic and collectives of a compiled module, from its text, loops multiplied out."""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_FREE = frozenset(  # instructions that move no bytes, or whose bytes are counted elsewhere
  """parameter constant tuple get-tuple-element bitcast while conditional call after-all
  partition-id replica-id opt-barrier async-update async-done copy-done slice-done iota
  domain""".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


class Traffic(NamedTuple):
  bytes: float  # read from and written to a device's memory
  collectives: dict[str, tuple[float, float]]  # a kind of COLLECTIVES -> (exchanges, bytes)
  unknown_loops: int  # loops whose trip count the text does not tell, counted once


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  operands: list[str]
  rest: str  # operands as text, then attributes
  root: bool


def traffic(text: str, runs: float = 1.0) -> Traffic:
  """Traffic of one device in `runs` of a compiled, partitioned module, from its text.

  A fusion reads its operands, or only their slices; it writes its results, or only the updated
  part. On-chip memory (VMEM of TPUs) is free.
  """
  computations, entry = _parse(text)
  total, unknown = 0.0, 0
  found = {}  # channel -> (kind of exchange, its executions, bytes of one)

  def visit(name, times, fused):
    nonlocal total, unknown
    instructions = computations[name]
    for i in instructions.values():
      kind = next((k for k in COLLECTIVES if i.opcode in (k, f"{k}-start")), None)
      if kind:
        # An asynchronous exchange appears in several computations, under one channel.
        key = (re.findall(r"channel_id=(\d+)", i.rest) or [i.name])[0]
        if key not in found or found[key][1] < times:
          found[key] = _collective(kind, i, instructions, times, inside=name)
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

  visit(entry, runs, False)
  collectives = {}
  for kind, times, size in found.values():
    exchanges, moved = collectives.get(kind, (0.0, 0.0))
    collectives[kind] = exchanges + times, moved + times * size
  return Traffic(total, collectives, unknown)


def _parse(text):
  """({computation: {name: instruction}}, the entry computation's name)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
    if header:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)", line):
      root, name, kind, opcode, rest = match.groups()
      current[name] = _Instruction(name, kind, opcode, _operands(rest), rest, bool(root))
  return computations, entry


def _operands(rest):
  """The names before the parenthesis that closes the list of operands."""
  depth, names = 1, []
  for found in re.finditer(r"[()]|%([\w.\-]+)", rest):
    names += filter(None, found.groups())
    depth += {"(": 1, ")": -1}.get(found[0], 0)
    if depth == 0:
      break
  return names


def _size(kind, on_chip=False):
  """Bytes of a type's arrays; of arrays in on-chip memory only if `on_chip`."""
  total = 0
  for name, dims, layout in _ARRAY.findall(kind):
    if on_chip or not re.search(r"S\([1-9]\d*\)", layout):
      bits = 8 if name == "pred" else int(re.search(r"\d+", name)[0])
      total += math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
  return total


def _called(instruction, attribute):
  match = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
  return match[1] if match else None


def _branches(instruction):
  lists = re.findall(r"(?:branch|true|false)_computations?=(\{[^}]*\}|[^,\s]+)", instruction.rest)
  return re.findall(r"[\w.\-]+", " ".join(lists))


def _trip_count(loop, computations):
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  # JAX's scans count up from zero by one, to the only constant of their condition.
  constants = {
    i.rest.split(")")[0]
    for i in computations[_called(loop, "condition")].values()
    if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
  }
  return int(constants.pop()) if len(constants) == 1 else None


def _collective(kind, instruction, instructions, times, inside):
  """(kind, times, bytes per device: a gather's result, the operands of others)."""
  operands = sum(_size(instructions[o].type, True) for o in instruction.operands)
  result = _size(instruction.type, True)
  if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
    result -= operands  # a start's result includes its operands
  if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # as compiled for TPUs
  return kind, times, result if kind == "all-gather" else operands


def _bytes_moved(i, instructions, computations):
  if i.opcode in _FREE or i.opcode.endswith("-done") or "AllocateBuffer" in i.rest:
    return 0
  read = [_size(instructions[o].type) for o in i.operands if o in instructions]
  if i.opcode in _SLICES:
    return _size(i.type) * 2
  if i.opcode == "dynamic-update-slice":
    return read[1] * 2
  if i.opcode in ("copy-start", "slice-start"):  # its type: (destination, source, context)
    written = _size(_ARRAY.search(i.type)[0])
    return (written if i.opcode == "slice-start" else read[0]) + written
  if i.opcode == "fusion" and (fused := computations.get(_called(i, "calls"))):
    return _fusion_reads(i, instructions, fused) + _fusion_writes(fused)
  return sum(read) + _size(i.type)


def _fusion_reads(fusion, instructions, fused):
  parameters = [i for i in fused.values() if i.opcode == "parameter"]
  parameters.sort(key=lambda p: int(p.rest.split(")")[0]))
  whole = [_size(instructions[o].type) if o in instructions else 0 for o in fusion.operands]
  parts = [_part_read(p.name, fused) for p in parameters]
  return sum(map(min, whole, parts))


def _part_read(name, fused):
  """Bytes of a value that the computation `fused` reads: its slices, or infinity for all."""
  total = 0.0
  for user in fused.values():
    if name not in user.operands:
      continue
    if user.opcode in _SLICES and user.operands[0] == name:
      total += _size(user.type, True)
    elif user.opcode in ("bitcast", "get-tuple-element", "transpose", "reshape", "copy"):
      total += _part_read(user.name, fused)
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
      return math.inf  # an update is in place: the rest of its first operand is not touched
  return total


def _fusion_writes(fused):
  root = next(i for i in fused.values() if i.root)
  outputs = [fused[o] for o in root.operands] if root.opcode == "tuple" else [root]
  total = 0.0
  for output in outputs:
    written, size = output, _size(output.type)
    while written.opcode in ("bitcast", "copy", "convert") and written.operands[0] in fused:
      written = fused[written.operands[0]]
    in_place = written.opcode == "dynamic-update-slice" and size
    total += _size(fused[written.operands[1]].type, True) if in_place else size
  return total
