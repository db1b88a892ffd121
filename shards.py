"""Records read in shards, and as files: each as it was, with new fields after its own; a manifest.

JSONL, not compressed: the line of a JSON record is kept byte for byte, up to its last brace. Others
become an object; what JSON lacks (bytes, dates) makes a record unusable. A piece of a text file is
its `id` and its text. Parquet: rows of Parquet files keep their columns and types. JSON records get
the columns that all records together have, a missing field is null; a field of two kinds is an
error.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

import report
from cli import UserError
from documents import DataConfig, Record, Report, corpus_records, one_line

FIELDS = ("datarater_score", "datarater_quantile", "datarater_keep")
FORMATS = ("jsonl", "parquet")


class Shard(NamedTuple):
  """Consecutive records of the input."""

  number: int
  records: list[Record]  # none if they were only passed by
  next: list[int] | None  # (input, index) of the record after them; None: there is none
  documents: int  # of the input up to their end

  @property
  def usable(self) -> list[Record]:
    return [record for record in self.records if not isinstance(record.document, str)]


def read(
  reading: DataConfig, format: str, size: int, before: list[dict], kept: Callable[[int], bool]
) -> Iterator[Shard]:
  """The shards of `size` records after those of the facts `before`. Of those whose number is not to
  be kept the records are only counted."""
  counts, place = Report(), (0, 0)
  if before:
    counts.records, place = sum(about["records"] for about in before), before[-1]["next"]
    for reject in itertools.chain.from_iterable(about["rejects"] for about in before):
      counts.skipped[reject["reason"]] += 1

  records = checked(reading, format, counts, tuple(place))
  number, first = len(before), next(records, None)
  while first is not None:
    shard = itertools.chain([first], itertools.islice(records, size - 1))
    shard = collections.deque(shard, maxlen=None if kept(number) else 0)
    documents = counts.records - sum(counts.skipped.values())
    first = next(records, None)  # at the end the share of unusable records is judged
    yield Shard(number, list(shard), first and list(first[:2]), documents)
    number += 1


def facts(shard: Shard, inputs: list, format: str) -> dict[str, Any]:
  """What is to be known of a shard once its records are let go."""
  sizes, end = [item.stamp[0] for item in inputs], shard.records[-1]
  read = (sum(sizes[: end.input]) + sizes[end.input] * end.read) / max(sum(sizes), 1)
  inferred = [record for record in shard.usable if not isinstance(record.original, tuple)]
  schema = None
  if format == "parquet" and inferred:
    schema = inferred_schema(inferred).serialize().to_pybytes().hex()
  rejects = [
    {"file": inputs[x.input].path, "record": x.number, "reason": x.document}
    for x in shard.records
    if isinstance(x.document, str)
  ]
  return {
    "next": shard.next,
    "records": len(shard.records),
    "documents": shard.documents,
    "rejects": rejects,
    "read": 0 if math.isnan(read) else read,  # share of all input files up to the shard's end
    "schema": schema,
  }


def checked(
  reading: DataConfig, format: str, counts: Report | None = None, start: tuple[int, int] = (0, 0)
) -> Iterator[Record]:
  """The records from `start` on; those that cannot be written in the format are unusable."""
  counts = Report() if counts is None else counts
  for record in corpus_records(reading, counts, start):
    if not isinstance(record.document, str):
      if reason := unwritable(record, format):
        counts.skipped[reason] += 1
        record = record._replace(document=reason)
    yield record


def unwritable(record: Record, format: str) -> str | None:
  """Why a document of `read_records` cannot be written in that format, or None if it can."""
  if taken := [name for name in FIELDS if name in record.value]:
    return f"has a field {taken[0]!r} already"
  try:
    if format == "jsonl" and not isinstance(record.original, bytes):
      json_line(record)
    elif format == "parquet" and not isinstance(record.original, tuple):
      pa.array([_value(record)])
  except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
    return f"cannot be {format} ({type(error).__name__})"
  return None


def json_line(record: Record) -> bytes:
  if isinstance(record.original, bytes):
    return record.original
  return json.dumps(_value(record), ensure_ascii=False).encode("utf-8")


def with_fields(line: bytes, fields: Mapping[str, Any]) -> bytes:
  """A JSON object with at least one field, and more; float32 by the digits that tell them apart."""
  more = [f'"{name}": {str(x).lower()}' for name, x in fields.items()]
  return line[:-1].rstrip() + b", " + ", ".join(more).encode() + b"}\n"


def common_schema(schemas: list[pa.Schema]) -> pa.Schema:
  """All their columns, each of a type that holds all of its types."""
  try:
    return pa.unify_schemas(schemas or [pa.schema([])], promote_options="permissive")
  except pa.ArrowException as error:
    raise UserError(
      f"the records have no common Parquet schema ({one_line(error)}): use --format=jsonl"
    ) from None


def file_schema(path: str) -> pa.Schema:
  try:
    return pa.parquet.read_schema(path)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def inferred_schema(records: list[Record]) -> pa.Schema:
  """Of records that are not rows of Parquet."""
  try:
    return pa.schema(list(pa.array(map(_value, records)).type))
  except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
    raise UserError(
      f"records {records[0].number} to {records[-1].number} have fields of two kinds "
      f"({one_line(error)}): use --format=jsonl"
    ) from None


def write(
  path: Path, records: list[Record], columns: dict[str, np.ndarray], schema: pa.Schema | None
) -> None:
  """The records and their new fields, in a file that appears whole. No schema: JSONL."""
  if schema is None:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = (with_fields(json_line(x), row) for x, row in zip(records, rows, strict=True))
    report.write_atomically(path, lambda file: file.writelines(lines))
    return
  try:
    table = _table(records, schema)
    for name, values in columns.items():
      table = table.append_column(name, pa.array(values))
    report.write_atomically(
      path, lambda file: pa.parquet.write_table(table, file, compression="zstd")
    )
  except pa.ArrowException as error:
    raise UserError(
      f"{path.name} cannot be Parquet ({one_line(error)}): use --format=jsonl"
    ) from None


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
  """A record's fields; a piece of a text file has but its text, and gets its id."""
  if record.original is None and len(record.value) == 1:
    return {"id": record.document.id} | record.value
  return record.value


def counts(columns: Mapping[str, np.ndarray]) -> dict[str, int]:
  result = {"documents": len(columns["datarater_score"])}
  if "datarater_keep" in columns:
    result["kept"] = int(columns["datarater_keep"].sum())
  return result


def cdf(ordered: np.ndarray) -> dict[str, list[float]]:
  """The score at 1,001 even quantiles: the least that so great a share of all does not exceed."""
  places = np.linspace(0, 1, 1001)
  scores = np.quantile(ordered, places, method="inverted_cdf")
  return {"quantile": places.round(3).tolist(), "score": scores.astype(float).tolist()}


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
  """manifest.json: the last file to appear."""
  text = json.dumps(manifest, indent=1)
  report.write_atomically(output / "manifest.json", lambda file: file.write(text.encode()))


def summary(manifest: dict[str, Any]) -> str:
  line = f"{manifest['documents']} documents, {manifest['tokens']} tokens"
  if "kept" in manifest:
    share = manifest["kept"] / max(manifest["documents"], 1)
    line += f"; kept {manifest['kept']} ({share:.1%})"
  reasons = [f"{count} {reason}" for reason, count in manifest["rejected"].items()]
  return f"{line}\nrecords rejected: {', '.join(reasons) or 'none'}"
