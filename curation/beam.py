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

import collections
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
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
from runtime.cli import check, user_error


def curate(config: jobs.Config, output: Path) -> None:
  """Runs the pipeline to its end and writes the manifest."""
  check(
    config.score_only or config.selection == "pointwise",
    "--selection=top_k needs all documents in one order: with --runner use pointwise",
  )
  check(config.max_documents is None, "--max_documents needs an order: leave it out with --runner")
  with user_error((ValueError, ImportError), f"--runner={config.runner} cannot be used"):
    options = PipelineOptions(list(config.beam_options))
    # Beam's DirectRunner would first download another runner, Prism.
    runner = FnApiRunner() if config.runner == "DirectRunner" else config.runner
    pipeline = beam.Pipeline(runner, options)
  job = jobs.open_job(config, output)
  if not (output / "manifest.json").exists():
    for path in output.glob("*-*-of-*"):
      path.unlink()  # left by a failed pipeline
    for path in output.glob("beam-temp-*"):
      shutil.rmtree(path)
    build(pipeline, job, output)
    pipeline.run().wait_until_finish()
    finish(job, output)
  print(jobs.summary(output), flush=True)


def build(pipeline: beam.Pipeline, job: jobs.Job, output: Path) -> None:
  """Adds the steps to the pipeline."""
  config, schema, part = job.config, records.output_schema(job.inputs, job.format), output / "part"
  check(
    job.format == "jsonl" or all(item.kind == "parquet" for item in job.inputs),
    "--format=parquet of other inputs: leave --runner out, or use jsonl",
  )
  texts, rejects = (
    pipeline
    | "inputs" >> beam.Create(list(enumerate(job.inputs)))
    | beam.Reshuffle()
    | "read" >> beam.FlatMap(read, job.reading, job.format).with_outputs("rejects", main="texts")
  )
  batches, scores, counts = (
    texts
    | "spread" >> beam.Reshuffle()  # else the worker that reads a file scores it
    | beam.BatchElements(min_batch_size=256, max_batch_size=4096)
    | "score" >> beam.ParDo(Score(config)).with_outputs("scores", "counts", main="batches")
  )
  ordered = scores | beam.combiners.ToList() | "sort" >> beam.Map(sort)
  keep = beam.FlatMap(select, config, AsSingleton(ordered))
  selected, kept = batches | "select" >> keep.with_outputs("kept", main="records")
  if schema is None:
    lines = beam.coders.BytesCoder()
    write = beam.io.WriteToText(str(part), file_name_suffix=".jsonl", coder=lines)
  else:
    for field in list(records.FIELDS.items())[: 2 if config.score_only else 3]:
      schema = schema.append(pa.field(*field))
    write = beam.io.WriteToParquet(str(part), schema, codec="zstd", file_name_suffix=".parquet")
  selected | "write" >> write  # noqa: B018 (adds a step to the pipeline)
  for name, facts in (
    ("rejects", rejects),
    ("cdf", ordered | "CDF" >> beam.Map(lambda x: records.cdf(x) if len(x) else {})),
    ("counts", (counts, kept) | beam.Flatten() | "count" >> beam.CombinePerKey(sum)),
  ):
    lines = facts | f"{name} lines" >> beam.Map(json.dumps)
    lines | f"write {name}" >> beam.io.WriteToText(str(output / name))  # noqa: B018


def read(item: tuple[int, Any], reading: DataConfig, format: str) -> Iterator[Any]:
  """Yields (text in UTF-8, JSON line or fields) of an input's documents."""
  index, source = item
  for record in input_records(source, index, reading, Report()):
    if problem := record.problem or records.unwritable(record, format):
      reject = {"file": source.path, "record": record.number, "reason": problem}
      yield TaggedOutput("rejects", reject)
    else:
      body = records.json_line(record) if format == "jsonl" else record.value
      yield record.document.text.encode("utf-8", "surrogatepass"), body


class Score(beam.DoFn):
  """Batches of (text, body) -> (bodies, scores [n], coins [n])."""

  def __init__(self, config: jobs.Config):
    self.config, self.shared = config, Shared()

  def setup(self):  # once per process: its workers share the rater
    self.score = self.shared.acquire(lambda: scorer(self.config), tag=self.config.rater)

  def process(self, batch):
    texts, bodies = zip(*batch, strict=True)
    texts = [text.decode("utf-8", "surrogatepass") for text in texts]
    scores, tokens = self.score(texts)
    if not np.isfinite(scores).all():
      raise ValueError("the rater gives non-finite scores: its training diverged")
    yield bodies, scores, np.array([selection.coin(self.config.seed, text) for text in texts])
    yield TaggedOutput("scores", scores)
    yield TaggedOutput("counts", ("documents", len(scores)))
    yield TaggedOutput("counts", ("tokens", tokens))


def scorer(config: jobs.Config) -> Callable[[list[str]], tuple[np.ndarray, int]]:
  """texts -> (scores [n], tokens)."""
  rater = rating.open_rater(config.rater)
  how = rater.tokenizer, rater.config.sequence_length
  return lambda texts: rating.score_texts(rater.score, texts, *how)


def sort(arrays: list[np.ndarray]) -> np.ndarray:
  return np.sort(np.concatenate([[], *arrays], dtype=np.float32))


def select(batch, config: jobs.Config, ordered: np.ndarray) -> Iterator[Any]:
  """The bodies with their new fields."""
  bodies, scores, coins = batch
  columns = jobs.select(config, scores, coins, ordered)
  if not config.score_only:
    yield TaggedOutput("kept", ("kept", int(columns["datarater_keep"].sum())))
  for body, *values in zip(bodies, *columns.values(), strict=True):
    fields = dict(zip(columns, values, strict=True))
    if isinstance(body, bytes):
      yield records.with_fields(body, fields).rstrip(b"\n")
    else:
      yield body | fields


def finish(job: jobs.Job, output: Path) -> None:
  """Checks the share of rejects and writes the manifest from the pipeline's counts."""
  paths = {name: sorted(output.glob(f"{name}-*-of-*")) for name in ("rejects", "cdf", "counts")}
  read = lambda name: [json.loads(x) for path in paths[name] for x in path.read_text().splitlines()]
  rejects, counts = read("rejects"), dict(read("counts"))
  total = counts.get("documents", 0) + len(rejects)
  skipped = collections.Counter(reject["reason"] for reject in rejects)
  check_quality(job.reading, Report(total, skipped), ())
  check(len(counts) > 0, f"{', '.join(job.config.data)} holds no documents")
  files = [{"file": path.name} for path in sorted(output.glob("part-*"))]
  (cdf,) = read("cdf")
  jobs.finish(job, output, {"records": total} | counts, rejects, files, cdf)
  for path in itertools.chain(*paths.values()):
    path.unlink()
