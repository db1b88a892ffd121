"""Reads records in shards and writes each unchanged with new fields appended; the manifest.

JSONL (uncompressed): JSON lines are copied byte for byte up to their last brace. Other records
become objects; a value that JSON lacks (bytes, dates) makes a record unusable. A part of a text
file becomes an object of `id` and text.
Parquet: rows of Parquet files keep their columns and types. Other records get the union of all
columns, null where a field is missing; a field of two kinds is an error.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from corpus.documents import DataConfig, Input, Record, Report, corpus_records
from runtime.cli import UserError, one_line
from runtime.files import write_atomically

FIELDS = {
  "datarater_score": pa.float32(),
  "datarater_quantile": pa.float32(),
  "datarater_keep": pa.bool_(),
}
FORMATS = ("jsonl", "parquet")
UNWRITABLE = (TypeError, ValueError, OverflowError, pa.ArrowException)


class Shard(NamedTuple):
  """Consecutive records of the input."""

  number: int
  records: list[Record]  # empty if the shard was only counted
  next: list[int] | None  # (input, index) of the first record after it; None at the end
  documents: int  # documents from the start of the input to the end of the shard

  @property
  def usable(self) -> list[Record]:
    return [record for record in self.records if record.document]


class About(NamedTuple):
  """A shard without its records."""

  next: list[int] | None  # as in Shard
  records: int
  documents: int  # as in Shard
  rejects: list[dict[str, Any]]  # file, record, reason
  read: float  # share of the input's bytes up to the shard's end; 0 if unknown
  schema: str | None  # of the records of other formats than Parquet, in hexadecimal
  tokens: int  # scored


def read(
  reading: DataConfig, format: str, size: int, before: list[About], wanted: Callable[[int], bool]
) -> Iterator[Shard]:
  """Yields the shards of `size` records that follow the shards `before`. A shard whose number is
  not `wanted` is only counted."""
  counts, start = Report(), (0, 0)
  if before:
    counts.records, start = sum(about.records for about in before), before[-1].next
    for reject in itertools.chain.from_iterable(about.rejects for about in before):
      counts.skipped[reject["reason"]] += 1

  records = checked(reading, format, counts, tuple(start))
  number, first = len(before), next(records, None)
  while first is not None:
    shard = itertools.chain([first], itertools.islice(records, size - 1))
    shard = collections.deque(shard, maxlen=None if wanted(number) else 0)
    documents = counts.usable
    first = next(records, None)  # raises at the end if too many records are unusable
    yield Shard(number, list(shard), first and list(first[:2]), documents)
    number += 1


def describe(shard: Shard, inputs: list[Input], format: str, tokens: int) -> About:
  sizes, last = [item.stamp[0] for item in inputs], shard.records[-1]
  read = (sum(sizes[: last.input]) + sizes[last.input] * last.read) / max(sum(sizes), 1)
  read = 0 if math.isnan(read) else read
  rejects = [
    {"file": inputs[x.input].path, "record": x.number, "reason": x.problem}
    for x in shard.records
    if x.problem
  ]
  inferred = [x for x in shard.usable if format == "parquet" and not isinstance(x.original, tuple)]
  schema = inferred_schema(inferred).serialize().to_pybytes().hex() if inferred else None
  return About(shard.next, len(shard.records), shard.documents, rejects, read, schema, tokens)


def checked(
  reading: DataConfig, format: str, counts: Report | None = None, start: tuple[int, int] = (0, 0)
) -> Iterator[Record]:
  """Yields the records from `start`; one that cannot be written in the format is unusable."""
  counts = Report() if counts is None else counts
  for record in corpus_records(reading, counts, start):
    if record.document and (problem := unwritable(record, format)):
      counts.skipped[problem] += 1
      record = record._replace(document=None, problem=problem)
    yield record


def unwritable(record: Record, format: str) -> str:
  """Why a usable record cannot be written in that format; "" if it can."""
  for name in FIELDS:
    if name in record.value:
      return f"has a field {name!r} already"
  try:
    if format == "jsonl" and not isinstance(record.original, bytes):
      json_line(record)
    elif format == "parquet" and not isinstance(record.original, tuple):
      pa.array([_value(record)])
  except UNWRITABLE as error:
    return f"cannot be {format} ({type(error).__name__})"
  return ""


def json_line(record: Record) -> bytes:
  if isinstance(record.original, bytes):
    return record.original
  return json.dumps(_value(record), ensure_ascii=False).encode("utf-8")


def with_fields(line: bytes, fields: Mapping[str, Any]) -> bytes:
  """Appends fields to a non-empty JSON object; float32 is written with the shortest digits that
  round-trip."""
  more = [f'"{name}": {str(x).lower()}' for name, x in fields.items()]
  return line[:-1].rstrip() + b", " + ", ".join(more).encode() + b"}\n"


def output_schema(
  inputs: list[Input], format: str, inferred: Iterable[str | None] = ()
) -> pa.Schema | None:
  """The columns of the output, None for JSONL. A column's types are promoted to one that holds
  them all.

  Args:
    inferred: schemas of the shards (About.schema).
  """
  if format == "jsonl":
    return None
  schemas = [file_schema(item.path) for item in inputs if item.kind == "parquet"]
  for schema in dict.fromkeys(filter(None, inferred)):
    schemas.append(pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(schema))))
  with parquet_errors("the records have no common Parquet schema"):
    return pa.unify_schemas(schemas or [pa.schema([])], promote_options="permissive")


def file_schema(path: str) -> pa.Schema:
  try:
    return pa.parquet.read_schema(path)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def inferred_schema(records: list[Record]) -> pa.Schema:
  """The schema of records of other formats than Parquet."""
  first, last = records[0].number, records[-1].number
  with parquet_errors(f"records {first} to {last} have fields of two kinds"):
    return pa.schema(list(pa.array(map(_value, records)).type))


@contextlib.contextmanager
def parquet_errors(problem: str) -> Iterator[None]:
  try:
    yield
  except (OverflowError, pa.ArrowException) as error:
    raise UserError(f"{problem} ({one_line(error)}): use --format=jsonl") from None


def write(
  path: Path, records: list[Record], columns: dict[str, np.ndarray], schema: pa.Schema | None
) -> None:
  """Writes a part atomically: the records with their new columns; JSONL if there is no schema."""
  if schema is None:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = (with_fields(json_line(x), row) for x, row in zip(records, rows, strict=True))
    write_atomically(path, lambda file: file.writelines(lines))
    return
  with parquet_errors(f"{path.name} cannot be Parquet"):
    table = _table(records, schema)
    for name, values in columns.items():
      table = table.append_column(name, pa.array(values))
    write_atomically(path, lambda file: pa.parquet.write_table(table, file, compression="zstd"))


def _table(records: list[Record], schema: pa.Schema) -> pa.Table:
  parts = [schema.empty_table()]
  origin = lambda record: id(record.original[0]) if isinstance(record.original, tuple) else None
  for key, group in itertools.groupby(records, origin):
    group = list(group)
    if key is None:
      array = pa.array(map(_value, group), pa.struct(schema))
      parts.append(pa.Table.from_struct_array(array))
    else:
      rows = [record.original[1] for record in group]
      parts.append(pa.Table.from_batches([group[0].original[0].take(rows)]))
  return pa.concat_tables(parts, promote_options="permissive")


def _value(record: Record) -> dict:
  """A record's fields; a part of a text file gets its id as well."""
  if record.original is None and len(record.value) == 1:
    return {"id": record.document.id} | record.value
  return record.value


def counts(columns: Mapping[str, np.ndarray]) -> dict[str, int]:
  result = {"documents": len(columns["datarater_score"])}
  if "datarater_keep" in columns:
    result["kept"] = int(columns["datarater_keep"].sum())
  return result


def cdf(ordered: np.ndarray) -> dict[str, list[float]]:
  """The scores at the quantiles 0, 0.001, ..., 1."""
  quantiles = np.linspace(0, 1, 1001)
  scores = np.quantile(ordered, quantiles, method="inverted_cdf")
  return {"quantile": quantiles.round(3).tolist(), "score": scores.astype(float).tolist()}
