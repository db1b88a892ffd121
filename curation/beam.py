"""Curates on Apache Beam: the selection of curate.py as a pipeline on many machines.

  python curate.py --rater=runs/demo --data='texts/*.jsonl' --output=curated --discard=0.5 \\
    --runner=DirectRunner
  python curate.py ... --runner=Flink --beam_options=--flink_master=host:8081

  inputs -> records -> batches of documents -> scores -> CDF (a side input) -> selection -> files

One worker reads an input file. Each process loads the rater once. All workers need the project on
their path, and the rater, the input and the output under the same paths. The selection is the same
as on one machine; the records come in any order, and only the runner's own retries resume a run.
Needs pip install -e '.[beam]'.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsSingleton, TaggedOutput
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.utils.shared import Shared

import rating
import selection
from corpus.documents import DataConfig, Report, check_quality, input_records
from curation import job as jobs
from curation import records
from runtime.cli import UserError, check, one_line
from runtime.files import write_text


def curate(config: jobs.Config, output: Path) -> None:
  """Runs the pipeline to its end and writes the manifest."""
  check(
    config.score_only or config.selection == "pointwise",
    "--selection=top_k needs all documents in one order: with --runner use pointwise",
  )
  check(config.max_documents is None, "--max_documents needs an order: leave it out with --runner")
  try:
    options = PipelineOptions(list(config.beam_options))
    # Beam's DirectRunner would first download another runner, Prism.
    runner = FnApiRunner() if config.runner == "DirectRunner" else config.runner
    pipeline = beam.Pipeline(runner, options)
  except (ValueError, ImportError) as error:
    raise UserError(f"--runner={config.runner}: {one_line(error)}") from None
  job = jobs.open_job(config, output)
  if not (output / "manifest.json").exists():
    for path in output.glob("*-*-of-*"):
      path.unlink()  # left by a failed pipeline
    for path in output.glob("beam-temp-*"):
      shutil.rmtree(path)
    build(pipeline, job, output)
    pipeline.run().wait_until_finish()
    finish(job, output)
  print(records.summary(json.loads((output / "manifest.json").read_text())), flush=True)


def build(pipeline: beam.Pipeline, job: jobs.Job, output: Path) -> None:
  """Adds the steps to the pipeline."""
  config, schema = job.config, jobs.output_schema(job, [])
  check(
    job.format == "jsonl" or all(item.kind == "parquet" for item in job.inputs),
    "--format=parquet of other inputs: leave --runner out, or use jsonl",
  )
  read_inputs = (
    pipeline
    | "inputs" >> beam.Create(list(enumerate(job.inputs)))
    | beam.Reshuffle()
    | "read" >> beam.FlatMap(read, job.reading, job.format).with_outputs("rejects", main="texts")
  )
  scored = (
    read_inputs.texts
    | "spread" >> beam.Reshuffle()  # else the worker that reads a file scores it
    | beam.BatchElements(min_batch_size=256, max_batch_size=4096)
    | "score"
    >> beam.ParDo(Score(config.rater, config.score_batch, config.seed)).with_outputs(
      "scores", "counts", main="batches"
    )
  )
  ordered = scored.scores | "CDF" >> beam.CombineGlobally(Sorted())
  discard = None if config.score_only else config.discard
  selected = scored.batches | "select" >> beam.FlatMap(
    select, AsSingleton(ordered), config.batch_size, discard
  ).with_outputs("counts", main="records")
  if schema is None:
    write = beam.io.WriteToText(
      str(output / "part"), file_name_suffix=".jsonl", coder=beam.coders.BytesCoder()
    )
  else:
    for name, kind in zip(records.FIELDS, (pa.float32(), pa.float32(), pa.bool_()), strict=True):
      if discard is not None or name != "datarater_keep":
        schema = schema.append(pa.field(name, kind))
    write = beam.io.WriteToParquet(
      str(output / "part"), schema, codec="zstd", file_name_suffix=".parquet"
    )
  selected.records | "write" >> write  # noqa: B018 (adds a step to the pipeline)
  for name, lines in (
    ("rejects", read_inputs.rejects | "reject lines" >> beam.Map(json.dumps)),
    (
      "cdf",
      ordered | "CDF lines" >> beam.Map(lambda x: json.dumps(records.cdf(x) if len(x) else {})),
    ),
    (
      "counts",
      (scored.counts, selected.counts)
      | beam.Flatten()
      | "count" >> beam.CombinePerKey(sum)
      | "count lines" >> beam.Map(json.dumps),
    ),
  ):
    lines | f"write {name}" >> beam.io.WriteToText(str(output / name))  # noqa: B018


def read(item: tuple[int, Any], reading: DataConfig, format: str) -> Iterator[Any]:
  """Yields (text in UTF-8, JSON line or fields) of an input's documents."""
  index, source = item
  for record in input_records(source, index, reading, Report()):
    problem = record.problem or records.unwritable(record, format)
    if problem:
      reject = {"file": source.path, "record": record.number, "reason": problem}
      yield TaggedOutput("rejects", reject)
    else:
      body = records.json_line(record) if format == "jsonl" else record.value
      yield record.document.text.encode("utf-8", "surrogatepass"), body


class Score(beam.DoFn):
  """Batches of (text, body) -> (bodies, scores [n], coins [n])."""

  def __init__(self, workdir: str, score_batch: int, seed: int):
    self.workdir, self.score_batch, self.seed = workdir, score_batch, seed
    self.shared = Shared()

  def setup(self):
    self.rater = self.shared.acquire(lambda: _Rater(self.workdir), tag=self.workdir)

  def process(self, batch):
    texts, bodies = zip(*batch, strict=True)
    texts = [text.decode("utf-8", "surrogatepass") for text in texts]
    rater = self.rater.opened
    scores, tokens = rating.score_texts(
      rater.score, texts, rater.tokenizer, rater.config.sequence_length, self.score_batch
    )
    if not np.isfinite(scores).all():
      raise ValueError("the rater gives non-finite scores: its training diverged")
    yield bodies, scores, np.array([selection.coin(self.seed, text) for text in texts])
    yield TaggedOutput("scores", scores)
    yield TaggedOutput("counts", ("documents", len(scores)))
    yield TaggedOutput("counts", ("tokens", tokens))


class _Rater:
  """Shared by a process's workers. Beam takes weak references, which a NamedTuple lacks."""

  def __init__(self, workdir: str):
    self.opened = rating.open_rater(workdir)


class Sorted(beam.CombineFn):
  """Concatenates and sorts arrays."""

  def create_accumulator(self):
    return []

  def add_input(self, arrays, array):
    return [*arrays, array]

  def merge_accumulators(self, accumulators):
    return [np.concatenate([[], *(x for arrays in accumulators for x in arrays)], dtype=np.float32)]

  def extract_output(self, arrays):
    return np.sort(np.concatenate([[], *arrays], dtype=np.float32))


def select(batch, ordered: np.ndarray, batch_size: int, discard: float | None) -> Iterator[Any]:
  """The bodies with their new fields."""
  bodies, scores, coins = batch
  columns = [scores, selection.quantiles(scores, ordered)]
  if discard is not None:
    columns.append(selection.pointwise(columns[1], coins, batch_size, discard))
    yield TaggedOutput("counts", ("kept", int(columns[2].sum())))
  for body, *values in zip(bodies, *columns, strict=True):
    fields = dict(zip(records.FIELDS, values, strict=False))
    if isinstance(body, bytes):
      yield records.with_fields(body, fields).rstrip(b"\n")
    else:
      yield body | fields


def finish(job: jobs.Job, output: Path) -> None:
  """Checks the share of rejects and writes the manifest from the pipeline's counts."""
  lines, intermediate = {}, []
  for name in ("rejects", "cdf", "counts"):
    paths = sorted(output.glob(f"{name}-*-of-*"))
    lines[name] = [json.loads(x) for path in paths for x in path.read_text().splitlines()]
    intermediate += paths
  counts = dict(lines["counts"])
  rejected = Report().skipped
  for reject in lines["rejects"]:
    rejected[reject["reason"]] += 1
  total = counts.get("documents", 0) + sum(rejected.values())
  check_quality(job.reading, Report(total, rejected), ())
  if not counts:
    raise UserError(f"{', '.join(job.config.data)} holds no documents")
  text = "".join(json.dumps(reject) + "\n" for reject in lines["rejects"])
  write_text(output / "rejects.jsonl", text)
  files = [{"file": path.name} for path in sorted(output.glob("part-*"))]
  manifest = {"records": total} | counts | {"rejected": rejected, "files": files}
  records.write_manifest(output, manifest | jobs.origin(job) | {"cdf": lines["cdf"][0]})
  for path in intermediate:
    path.unlink()
