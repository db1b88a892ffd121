"""Reads records and writes each unchanged with new fields appended.

JSONL (uncompressed): JSON lines are copied byte for byte up to their last brace. Other records
become objects; a value that JSON lacks (bytes, dates) makes a record unusable. A part of a text
file becomes an object of `id` and text.
Parquet: rows of Parquet files keep their columns and types. Other records get the union of all
columns, null where a field is missing; a field of two kinds is an error.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from corpus.documents import DataConfig, Input, Record, Report, corpus_records
from runtime.cli import user_error
from runtime.files import write_atomically

FIELDS = {
  "datarater_score": pa.float32(),
  "datarater_quantile": pa.float32(),
  "datarater_keep": pa.bool_(),
}
FORMATS = ("jsonl", "parquet")
UNWRITABLE = (TypeError, ValueError, OverflowError, pa.ArrowException)
parquet_errors = partial(user_error, (OverflowError, pa.ArrowException), fix="use --format=jsonl")


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
    inferred: schemas of the shards (local.About.schema).
  """
  if format == "jsonl":
    return None
  schemas = []
  for path in [item.path for item in inputs if item.kind == "parquet"]:
    with user_error((OSError, pa.ArrowException), f"{path} cannot be read"):
      schemas.append(pa.parquet.read_schema(path))
  for schema in dict.fromkeys(filter(None, inferred)):
    schemas.append(pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(schema))))
  with parquet_errors("the records have no common Parquet schema"):
    return pa.unify_schemas(schemas or [pa.schema([])], promote_options="permissive")


def inferred_schema(records: list[Record]) -> pa.Schema:
  """The schema of records of other formats than Parquet."""
  first, last = records[0].number, records[-1].number
  with parquet_errors(f"records {first} to {last} have fields of two kinds"):
    return pa.schema(list(pa.array(map(_value, records)).type))


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
