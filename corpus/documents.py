"""Reads files and data sets as a stream of documents; counts unusable records by reason.

`DataConfig.data` and `outer_data` may name:
  demo                      the demo corpus; half of its train and validation documents corrupted
  hf:NAME[:CONFIG[:SPLIT]]  a data set of the Hugging Face hub; the default split is `train`
  a file, a glob, a folder  .jsonl/.ndjson/.json (one object per line), .parquet, .txt/.md; all but
                            Parquet also as .gz, .bz2 or .zst

A text file of more than 8,000 characters is cut at paragraphs or lines into several documents.
Every other record is one document, whatever its length.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corpus import demo
from runtime.cli import UserError, check, check_fields, option, user_error

SPLITS = ("train", "outer", "validation")
TEXT_FILE_CHARS = 8_000  # a longer text file becomes several documents


@dataclasses.dataclass(frozen=True)
class Document:
  text: str
  source: str
  id: str
  noise: float = math.nan  # fraction of corrupted characters; nan: unknown. Only for reports.


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which text a corpus holds and how it becomes sequences."""

  data: tuple[str, ...] = option(
    ("demo",), "files, globs, folders, hf:NAME[:CONFIG[:SPLIT]] or demo", section="Data"
  )
  outer_data: tuple[str, ...] = option((), "trusted text for the outer loss; default: part of data")
  text_field: str = option("text", "field with the text of a record; a.b is field b of field a")
  source_field: str = option("source", "field with a source, for reports; else the file's name")
  noise_field: str = option("noise", "field with a known noise level in [0, 1], for reports")
  tokenizer: str = option("bytes", "bytes, or a path or hub name of a tokenizer.json")
  sequence_length: int = option(128, "S, tokens per sequence", at_least=2)
  packing: str = option(
    "document",
    "pack fills each sequence with several documents; document puts one piece in each",
    choices=("pack", "document"),
  )
  outer_fraction: float = option(0.2, "share held out for the outer loss", at_least=0, below=1)
  validation_fraction: float = option(0.1, "share held out for the report", at_least=0, below=1)
  seed: int = option(0, "seed of everything random, the splits included", at_least=0)
  max_documents: int | None = option(None, "documents to read at most", at_least=1)
  max_bad_fraction: float = option(0.1, "largest allowed share of unusable records", at_least=0)

  def __post_init__(self):
    check_fields(self)
    check(not isinstance(self.data, str) and len(self.data) > 0, "--data: give at least one name")
    outer, validation = self.outer_fraction, self.validation_fraction
    check(
      outer + validation < 1,
      f"--outer_fraction={outer} and --validation_fraction={validation} leave nothing to train on",
    )


@dataclasses.dataclass
class Report:
  """Counts of records read and skipped."""

  records: int = 0
  skipped: dict[str, int] = dataclasses.field(default_factory=collections.Counter)  # by reason
  in_outer_data: int = 0  # documents of `data` left out because `outer_data` holds them
  ignored_noise: int = 0  # noise fields that hold no number in [0, 1]
  documents: dict[str, dict[str, int]] = dataclasses.field(  # split -> source -> documents
    default_factory=lambda: {split: collections.Counter() for split in SPLITS}
  )
  tokens: dict[str, int] = dataclasses.field(default_factory=collections.Counter)  # by split
  sequences: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
  dropped_tokens: int = 0  # in remainders shorter than MIN_REMAINDER

  @property
  def usable(self) -> int:
    return self.records - sum(self.skipped.values())


def read_documents(config: DataConfig, report: Report | None = None) -> Iterator[Document]:
  """Streams the documents of `config.data`; counts unusable records in `report`."""
  return (record.document for record in corpus_records(config, report) if record.document)


class Record(NamedTuple):
  input: int  # index of its input in find_inputs(config.data)
  index: int  # its own index in that input, from 0; blank lines do not count
  number: int  # for messages: the line in JSONL, else index + 1
  document: Document | None
  problem: str  # why there is no document; "" if there is one
  value: dict | None  # its fields; None if they cannot be read
  original: Any  # the line (bytes) of a JSON record, (Arrow batch, row) of Parquet, else None
  read: float  # share of the input read so far; nan for the hub


def corpus_records(
  config: DataConfig, report: Report | None = None, start: tuple[int, int] = (0, 0)
) -> Iterator[Record]:
  """Yields all records of `config.data` in order, usable or not, and counts them in `report`.

  To resume, pass `start`, the (input, index) of a record, and a `report` with the counts of all
  records before it. A caller may count more records as skipped before it takes the next one.
  """
  report, fields = Report() if report is None else report, ()
  for place, item in list(enumerate(find_inputs(config.data)))[start[0] :]:
    first = start[1] if place == start[0] else 0
    for record in input_records(item, place, config, report, first):
      yield record
      fields = fields or tuple(record.value or ())
      if report.records >= 1000 and math.log10(report.records).is_integer():
        check_quality(config, report, fields)
      if report.usable == config.max_documents:
        return
  check_quality(config, report, fields)
  check(report.usable > 0, f"{', '.join(config.data)} holds no documents: the files are empty")


def input_records(
  item: Input, place: int, config: DataConfig, report: Report, first: int = 0
) -> Iterator[Record]:
  """Yields the records of one input from index `first`; does not enforce max_bad_fraction."""
  records = read_records(item, config.text_field, first)
  for index, (number, value, original, read) in enumerate(records, first):
    report.records += 1
    document, problem = _document(value, item, index, config, report)
    if problem:
      report.skipped[problem] = report.skipped.get(problem, 0) + 1
    value = value if isinstance(value, dict) else None
    yield Record(place, index, number, document, problem, value, original, read)


def split_of(text: str, config: DataConfig) -> tuple[str, int]:
  """(the split of a text, 64 more bits of its hash), whatever the white space between words."""
  key = config.seed.to_bytes(8, "little", signed=True)
  plain = " ".join(text.split()).encode("utf-8", "replace")
  digest = hashlib.blake2b(plain, key=key, digest_size=16).digest()
  place = int.from_bytes(digest[:8], "little") / 2**64
  validation, outer = config.validation_fraction, 0 if config.outer_data else config.outer_fraction
  split = "validation" if place < validation else "outer" if place < validation + outer else "train"
  return split, int.from_bytes(digest[8:], "little")


class Input(NamedTuple):
  kind: str  # json, text, parquet or hub
  path: str
  name: str  # the source of records that name none
  stamp: tuple[int, int]  # size and time of a file


_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json"}
_KINDS |= {".parquet": "parquet", ".txt": "text", ".md": "text"}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def find_inputs(data: tuple[str, ...]) -> list[Input]:
  """The files and data sets that `data` names."""
  inputs = []
  for name in data:
    if name.startswith("hf:"):
      inputs.append(Input("hub", name, name.split(":")[1].rpartition("/")[2], (0, 0)))
      continue
    path = demo.build() if name == "demo" else Path(name).expanduser()
    if path.is_dir():
      files = [p for p in sorted(path.rglob("*")) if _kind(p) and p.is_file()]
      files = [p for p in files if not re.search(r"(^|/)\.", p.relative_to(path).as_posix())]
      problem = f"the folder {name} has no file of a known kind ({', '.join(_KINDS)})"
    elif glob.has_magic(name) and not path.exists():
      files = [p for p in sorted(map(Path, glob.glob(str(path), recursive=True))) if p.is_file()]
      problem = f"no file matches {name}: check the pattern (quote it from the shell)"
    else:
      files = [path] if path.exists() else []
      problem = f"{name} does not exist: give a file, glob, folder, hf:NAME, or demo"
    check(len(files) > 0, problem)
    for file in files:
      kind, stat = _kind(file), file.stat()
      known = f"known are {', '.join(_KINDS)}, *.gz, *.bz2, *.zst"
      check(kind is not None, f"{file} is of an unknown kind: {known}")
      stem = file.name.partition(".")[0] or file.name
      inputs.append(Input(kind, str(file), stem, (stat.st_size, stat.st_mtime_ns)))
  return list(dict.fromkeys(inputs))


def _kind(path: Path) -> str | None:
  suffixes = path.suffixes[:-1] if path.suffix in _COMPRESSED else path.suffixes
  return _KINDS.get(suffixes[-1]) if suffixes else None


_Read = tuple[int, dict | str, Any, float]  # number, fields or the problem, original, read: Record


def read_records(item: Input, text_field: str = "text", first: int = 0) -> Iterator[_Read]:
  """Yields the records of one input from index `first`; their number counts from 1, in JSONL lines.

  A string instead of fields is the reason why a record is unusable. The parts of a text file have
  their text in `text_field`."""
  import pyarrow as pa
  import pyarrow.parquet

  with user_error((OSError, pa.ArrowException), f"{item.path} cannot be read to its end"):
    if item.kind == "hub":
      for number, value in itertools.islice(enumerate(_hub_records(item.path), 1), first, None):
        yield number, value, None, math.nan
    elif item.kind == "parquet":
      yield from _parquet_records(pa.parquet.ParquetFile(item.path), first)
    else:
      with open(item.path, "rb") as raw:
        compression = _COMPRESSED.get(Path(item.path).suffix)
        file = io.BufferedReader(pa.input_stream(raw, compression), 1 << 20)
        texts = item.kind == "text"
        records = _text_records(file, text_field) if texts else _json_lines(file)
        for number, record in itertools.islice(records, first, None):
          value, original = (record, None) if texts else (_parsed(record), record)
          yield number, value, original, raw.tell() / max(item.stamp[0], 1)


def _parquet_records(file: Any, first: int) -> Iterator[_Read]:
  number, total = 0, max(file.metadata.num_rows, 1)
  for batch in file.iter_batches(batch_size=256):
    values = _rows(batch) if number + len(batch) > first else [{}] * len(batch)
    for row, value in enumerate(values):
      number += 1
      if number > first:
        yield number, value, (batch, row), number / total


def _rows(batch: Any) -> list[dict | str]:
  try:
    return batch.to_pylist()
  except (OverflowError, ValueError):  # a date of the year 20,000, say
    if len(batch) == 1:
      return ["a value that Python cannot hold"]
    return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _json_lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
  for number, line in enumerate(file, 1):
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    if line := line.strip():
      yield number, line


def _parsed(line: bytes) -> dict | str:
  try:
    record = json.loads(line.decode("utf-8"))
    return record if isinstance(record, dict) else "not a JSON object"
  except UnicodeDecodeError:
    return "invalid UTF-8"
  except (ValueError, RecursionError):
    return "broken JSON"


def _text_records(file: io.BufferedReader, text_field: str) -> Iterator[tuple[int, dict | str]]:
  reader = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
  number, rest, more = 0, "", True
  while more:
    block = reader.read(TEXT_FILE_CHARS)
    rest, more = rest + block, bool(block)
    while len(rest) > TEXT_FILE_CHARS or (rest and not more):
      cuts = [rest.rfind(mark, 1, TEXT_FILE_CHARS) for mark in ("\n\n", "\n", " ")]
      cut = next((cut for cut in cuts if cut > 0), TEXT_FILE_CHARS)
      cut = cut if len(rest) > TEXT_FILE_CHARS else len(rest)
      part, rest = rest[:cut], rest[cut:]
      escaped = re.search("[\udc80-\udcff]", part)  # the decoder's marks for invalid bytes
      if part.strip():
        number += 1
        yield number, "invalid UTF-8" if escaped else {text_field: part}


def _hub_records(name: str) -> Iterator[dict]:
  import datasets

  _, path, config, split, *more = [*name.split(":"), "", ""]
  if more[2:] or not path or path.startswith("/"):
    raise UserError(f"{name} is not of the form hf:NAME[:CONFIG[:SPLIT]]")
  # Errors are of many kinds: no network, no such name, gated, a bad file.
  fix = "check the name, the network, and whether it needs a login or a configuration"
  with user_error(Exception, f"{name} cannot be read", f"{fix} (hf:NAME:CONFIG:SPLIT)"):
    yield from datasets.load_dataset(path, config or None, split=split or "train", streaming=True)


def _document(
  record: dict | str, item: Input, number: int, config: DataConfig, report: Report
) -> tuple[Document | None, str]:
  """(the document of a record, "") or (None, the problem)."""
  if isinstance(record, str):
    return None, record
  text = _field(record, config.text_field)
  if text is None:
    return None, f"without a value in {config.text_field!r}"
  if not isinstance(text, str):
    return None, f"{config.text_field!r} is not text but {type(text).__name__}"
  if not text.strip():
    return None, "empty text"
  source, noise = _field(record, config.source_field), _field(record, config.noise_field)
  source = source if isinstance(source, str) and source.strip() else item.name
  known = isinstance(noise, int | float) and 0 <= noise <= 1
  report.ignored_noise += noise is not None and not known
  id = str(record.get("id") or f"{item.name}:{number}")
  return Document(text, source, id, float(noise) if known else math.nan), ""


def _field(record: dict, name: str) -> Any:
  if name in record or "." not in name:
    return record.get(name)
  for part in name.split("."):
    record = record.get(part) if isinstance(record, dict) else None
  return record


def check_quality(config: DataConfig, report: Report, fields: tuple[str, ...]) -> None:
  """Raises UserError if no record has a text, or too many are unusable."""
  missing = report.skipped.get(f"without a value in {config.text_field!r}", 0)
  if report.records and missing == report.records:
    known = ", ".join(fields)
    raise UserError(
      f"no record has a text in {config.text_field!r}: set --text_field to one of {known}"
    )
  bad = sum(report.skipped.values())
  if bad > config.max_bad_fraction * report.records:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
    raise UserError(
      f"{bad} of {report.records} records are unusable ({reasons}): fix the files, or raise "
      f"--max_bad_fraction={config.max_bad_fraction} to skip them"
    )
