"""A curation run: its settings, opened rater, resolved inputs, selection and manifest."""

import collections
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import selection
from corpus.documents import DataConfig, Input, find_inputs
from curation import records
from rating import TrainedRater, open_rater
from runtime import hosts
from runtime.cli import check, check_fields, option
from runtime.files import write_text
from runtime.workdir import open_workdir

FORMAT = 2  # of the output; raise it when the written files change


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines the output. Every field is a flag."""

  rater: str | None = option(None, "workdir of train.py with the trained rater", section="Input")
  data: tuple[str, ...] = option((), "files, globs, folders, hf:NAME[:CONFIG[:SPLIT]] or demo")
  text_field: str | None = option(None, "field with a record's text; default: as in training")
  max_documents: int | None = option(None, "documents to read at most", at_least=1)
  max_bad_fraction: float = option(0.1, "largest allowed share of unusable records", at_least=0)
  discard: float | None = option(
    None, "share of the documents to drop", at_least=0, below=1, section="Selection"
  )
  selection: str = option(
    "pointwise", "by P_accept of the quantile, or the best K of B", choices=("pointwise", "top_k")
  )
  batch_size: int = option(256, "B, the oversampled batch, real (top_k) or emulated", at_least=1)
  score_only: bool = option(False, "write scores and quantiles only; select nothing")
  seed: int = option(0, "for the coins of pointwise and the permutation of top_k", at_least=0)
  format: str | None = option(
    None,
    "of the output; default: parquet if all inputs are, else jsonl",
    choices=records.FORMATS,
    section="Format",
  )
  shard_records: int = option(
    4096, "records per file at most; an interrupted one is redone", at_least=1
  )
  runner: str | None = option(None, "DirectRunner, Dataflow, Flink, ...", section="Apache Beam")
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
    check(self.batch_size <= 2**20, f"--batch_size={self.batch_size} must be at most 2^20")


class Job(NamedTuple):
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
  limits = {name: getattr(config, name) for name in ("max_documents", "max_bad_fraction")}
  reading = DataConfig(
    config.data, text_field=config.text_field or rater.config.text_field, **limits
  )
  digest = hashlib.blake2b(json.dumps([FORMAT, inputs]).encode(), digest_size=8).hexdigest()
  fingerprint = f"{digest} scored by {rater.fingerprint}"
  parquet = all(item.kind == "parquet" for item in inputs)
  format = config.format or ("parquet" if parquet else "jsonl")
  if not (output / "config.json").exists():  # find mistakes before a folder is made
    records.output_schema(inputs, format)
    list(itertools.islice(records.checked(reading, format), 1001))
  hosts.leader_first(lambda: open_workdir(output, config, fingerprint, flag="output"))
  return Job(config, rater, inputs, reading, format)


def select(
  config: Config, scores: np.ndarray, coins: np.ndarray, ordered: np.ndarray
) -> dict[str, np.ndarray]:
  """The new fields [n] of n documents, by name.

  Args:
    scores: float32 [n].
    coins: uniform in [0, 1), float64 [n].
    ordered: the scores of all documents, ascending.
  """
  quantiles, B, discard = selection.quantiles(scores, ordered), config.batch_size, config.discard
  fields = {"datarater_score": scores, "datarater_quantile": quantiles}
  if config.score_only:
    return fields
  if config.selection == "top_k":
    return fields | {"datarater_keep": selection.top_k(scores, B, discard, config.seed)}
  return fields | {"datarater_keep": selection.pointwise(quantiles, coins, B, discard)}


def finish(
  job: Job, output: Path, counts: dict[str, int], rejects: list[dict], files: list[dict], cdf: dict
) -> None:
  """Writes rejects.jsonl, then manifest.json, which marks the run as complete."""
  write_text(output / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
  config, rater = job.config, job.rater
  rule = "score_only"
  if not config.score_only:
    rule = {k: getattr(config, k) for k in ("selection", "discard", "batch_size", "seed")}
    rule["keep_of_batch"] = round((1 - config.discard) * config.batch_size)
  manifest = counts | {
    "rejected": collections.Counter(reject["reason"] for reject in rejects),
    "files": files,
    "format": FORMAT,
    "data": config.data,
    "inputs": [{"file": item.path, "bytes": item.stamp[0]} for item in job.inputs],
    "selection": rule,
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
    "cdf": cdf,
  }
  write_text(output / "manifest.json", json.dumps(manifest, indent=1))


def summary(output: Path) -> str:
  """Two lines about a complete run."""
  manifest = json.loads((output / "manifest.json").read_text())
  line = f"{manifest['documents']} documents, {manifest['tokens']} tokens"
  if "kept" in manifest:
    share = manifest["kept"] / max(manifest["documents"], 1)
    line += f"; kept {manifest['kept']} ({share:.1%})"
  reasons = [f"{count} {reason}" for reason, count in manifest["rejected"].items()]
  return f"{line}\nrecords rejected: {', '.join(reasons) or 'none'}"
