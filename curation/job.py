"""A curation run: its settings, the opened rater, the resolved inputs, the output folder."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from corpus.documents import DataConfig, Input, find_inputs
from curation import records
from rating import TrainedRater, open_rater
from runtime import hosts
from runtime.cli import check, check_fields, option
from runtime.workdir import open_workdir

FORMAT = 1  # of the output; raise it when the written files change


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines the output. Every field is a flag."""

  rater: str | None = option(None, "workdir of train.py with the trained rater", section="Input")
  data: tuple[str, ...] = option((), "files, globs, folders, hf:NAME[:CONFIG[:SPLIT]] or demo")
  text_field: str | None = option(
    None, "field of a record that holds its text; default: as in the rater's training"
  )
  max_documents: int | None = option(None, "documents to read at most", at_least=1)
  max_bad_fraction: float = option(
    0.1, "share of unusable records beyond which the run stops", at_least=0
  )
  discard: float | None = option(
    None, "share of the documents to drop", at_least=0, below=1, section="Selection"
  )
  selection: str = option(
    "pointwise",
    "by P_accept of each document's quantile, or the best K of each batch",
    choices=("pointwise", "top_k"),
  )
  batch_size: int = option(
    256, "B, documents in the oversampled batch, real (top_k) or emulated", at_least=1
  )
  score_only: bool = option(False, "write scores and quantiles only; select nothing")
  seed: int = option(0, "for the coins of pointwise and the permutation of top_k")
  format: str | None = option(
    None,
    "of the output; default: parquet if all inputs are, else jsonl",
    choices=records.FORMATS,
    section="Format and batches",
  )
  shard_records: int = option(
    4096, "input records per output file; an interrupted shard is scored again", at_least=1
  )
  score_batch: int = option(
    64, "sequences of full length per batch; shorter ones fill as many tokens", at_least=1
  )
  runner: str | None = option(
    None, "run on Apache Beam: DirectRunner, Dataflow, Flink, Spark, ...", section="Apache Beam"
  )
  beam_options: tuple[str, ...] = option((), "flags for the runner: --project=x,--region=y")

  def __post_init__(self):
    check(self.rater is not None, "name the workdir of a trained rater with --rater")
    check(len(self.data) > 0, "name the corpus to curate with --data")
    check_fields(self)
    if self.score_only:
      return
    check(self.discard is not None, "give the share to drop with --discard=0.5, or --score_only")
    keep = round((1 - self.discard) * self.batch_size)
    check(keep >= 1, f"--discard={self.discard} keeps none of a batch of {self.batch_size}")


class Job(NamedTuple):
  """A curation run: its config, the opened rater and the resolved inputs."""

  config: Config
  rater: TrainedRater
  inputs: list[Input]
  reading: DataConfig
  format: str


def open_job(config: Config, output: Path) -> Job:
  """Opens the rater and prepares the output folder.

  Raises:
    UserError: no rater, nothing to read, or the folder holds another run.
  """
  inputs = find_inputs(config.data)
  folder = output.resolve()
  for path in map(Path, (*config.data, *(item.path for item in inputs))):
    source = path.resolve()
    overlap = source.is_relative_to(folder) or path.is_dir() and folder.is_relative_to(source)
    check(not overlap, f"--output={output} and the input {path} overlap: name another folder")
  rater = open_rater(config.rater)
  reading = DataConfig(
    data=config.data,
    text_field=config.text_field or rater.config.text_field,
    max_documents=config.max_documents,
    max_bad_fraction=config.max_bad_fraction,
  )
  parquet = all(item.kind == "parquet" for item in inputs)
  digest = hashlib.blake2b(json.dumps([FORMAT, inputs]).encode(), digest_size=8).hexdigest()
  fingerprint = f"{digest} scored by {rater.fingerprint}"
  format = config.format or ("parquet" if parquet else "jsonl")
  job = Job(config, rater, inputs, reading, format)
  if not (output / "config.json").exists():  # find mistakes before a folder is made
    output_schema(job, [])
    list(itertools.islice(records.checked(reading, format), 1001))
  hosts.leader_first(lambda: open_workdir(output, config, fingerprint, flag="output"))
  return job


def output_schema(job: Job, inferred: list[str]) -> pa.Schema | None:
  """The columns of the output, None for JSONL.

  Args:
    inferred: schemas of shards with records of other formats than Parquet, in hexadecimal.
  """
  if job.format == "jsonl":
    return None
  schemas = [records.file_schema(item.path) for item in job.inputs if item.kind == "parquet"]
  for schema in dict.fromkeys(filter(None, inferred)):
    schemas.append(pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(schema))))
  return records.common_schema(schemas)


def origin(job: Job) -> dict[str, Any]:
  """The inputs, the selection and the rater, for the manifest."""
  config, rater = job.config, job.rater
  names = () if config.score_only else ("selection", "discard", "batch_size", "seed")
  rule = {name: getattr(config, name) for name in names}
  if rule:
    rule["keep_of_batch"] = round((1 - config.discard) * config.batch_size)
  return {
    "format": FORMAT,
    "data": config.data,
    "inputs": [{"file": item.path, "bytes": item.stamp[0]} for item in job.inputs],
    "selection": rule or "score_only",
    "rater": {
      "workdir": config.rater,
      "fingerprint": rater.fingerprint,
      "size": rater.config.rater,
      "parameters": rater.parameters,
      "sequence_length": rater.config.sequence_length,
    },
    "tokenizer": {
      "name": rater.config.tokenizer,
      "fingerprint": rater.tokenizer.fingerprint,
      "entries": rater.tokenizer.vocab_size,
    },
  }
