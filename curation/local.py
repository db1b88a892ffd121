"""Curates on one host or on several that share a folder: score, select, write, resume.

Pass 1: shards of at most --shard_records and SHARD_BYTES are assigned round-robin; each host reads
all records but tokenizes and scores only its own shards. Pass 2: each host writes a contiguous
range of parts, reading from the first of them. The output is byte-identical for any number of
hosts, and a different number may resume a run.
"""

import concurrent.futures
import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import rating
import selection
from corpus.documents import Record, Report
from curation import records
from curation.job import Config, Job, finish, open_job, select, summary
from runtime import hosts
from runtime.cli import check
from runtime.files import UNFINISHED, write_atomically
from runtime.workdir import StopSignal

SHARD_BYTES = 2**22  # of its records; a larger record is a shard by itself. Bounds the memory


def curate(config: Config, output: Path) -> None:
  """Scores, selects and writes; resumes an interrupted run."""
  job = open_job(config, output)
  if hosts.is_leader():
    for unfinished in output.rglob(f"{UNFINISHED}*"):
      unfinished.unlink()
  if not hosts.as_leader((output / "manifest.json").exists()):
    stop = StopSignal()
    try:
      score(job, output, stop)
      write(job, output, stop)
    except Stopped:
      hosts.say("stopped: start again to resume")
      return
  if hosts.is_leader():
    shutil.rmtree(output / "scores", ignore_errors=True)
    print(summary(output), flush=True)
  hosts.wait_for_all("curated")


class Stopped(Exception):
  """A host received SIGTERM or Ctrl-C; the next call resumes from the files written so far."""


# Pass 1: scores of each shard, in scores/00000.npz, ...; in rounds of one shard per host.


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
  read: float  # share of the input's bytes up to the shard's end; nan if unknown
  schema: str | None  # of the records of other formats than Parquet, in hexadecimal
  tokens: int  # scored


class Scored(NamedTuple):
  """A scored shard of the input."""

  scores: np.ndarray  # [documents] float32
  coins: np.ndarray  # [documents] float64
  about: About


def score(job: Job, output: Path, stop: StopSignal) -> None:
  """Scores the missing shards. A batch holds documents of one shard only, so that scores depend
  neither on interruptions nor on the number of hosts."""
  folder = output / "scores"
  folder.mkdir(exist_ok=True)
  done = scored(output)
  hosts.agree_on(output, list(done))
  start = unbroken(done)
  if start and start[-1].about.next is None:
    return
  before = start[-1].about.documents if start else 0
  devices = list(jax.tree.leaves(job.rater.eta)[0].devices())
  where = f"{devices[0].device_kind} x {len(devices)}"
  where += f" on each of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
  earlier = sum(len(shard.scores) for shard in done.values())
  hosts.say(f"device {where}, {earlier} documents scored before")
  began, tokens = time.monotonic(), 0
  with hosts.progress("scoring", before, unit=" documents") as bar:
    for own_shards, after in ahead(prepared(job, done, start)):
      for number, texts, coins, about in own_shards:
        if about.read > 0:  # an estimate; the hub gives none
          total = round(about.documents / about.read)
          bar.total = min(total, job.config.max_documents or total)
        scored_before, per_document = tokens, (after - before) / max(len(texts), 1)

        def progress(batch, before=before, per_document=per_document):
          nonlocal tokens
          tokens += int(batch.tokens.sum())
          reached = before + round(per_document * (int(batch.index.max()) + 1))
          bar.update(max(reached - bar.n, 0))
          bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
          if stop.requested:
            raise Stopped

        with contextlib.suppress(Stopped):  # all hosts stop at the end of the round
          rows = rating.make_rows(texts, job.rater.tokenizer, job.rater.config.sequence_length)
          scores = rating.score_rows(job.rater.score, rows, len(texts), progress)
          finite = bool(np.isfinite(scores).all())
          check(finite, f"the rater of {job.config.rater} diverged: its scores are not finite")
          about = about._replace(tokens=tokens - scored_before)
          contents = dict(scores=scores, coins=coins, about=np.array(json.dumps(about)))
          write_atomically(folder / f"{number:05d}.npz", partial(np.savez, **contents))
      if hosts.any_host(stop.requested):
        raise Stopped
      bar.update(after - bar.n)
      before = after


def scored(output: Path) -> dict[int, Scored]:
  """The scored shards by number; there may be gaps."""
  shards = {}
  for path in sorted((output / "scores").glob("*.npz"), key=lambda path: int(path.stem)):
    with np.load(path) as file:
      about = About(*json.loads(str(file["about"])))
      shards[int(path.stem)] = Scored(file["scores"], file["coins"], about)
  return shards


def unbroken(done: dict[int, Scored]) -> list[Scored]:
  """The scored shards before the first gap."""
  return [done[i] for i in itertools.takewhile(done.__contains__, itertools.count())]


def prepared(
  job: Job, done: dict[int, Scored], start: list[Scored]
) -> Iterator[tuple[list[tuple], int]]:
  """Yields for each round this host's shards [(number, texts, coins, about)], at most one, and
  the number of documents from the start of the input to the end of the round."""
  n, host = jax.process_count(), jax.process_index()
  wanted = lambda number: number not in done and (number - len(start)) % n == host
  own = lambda shard: [(shard.number, *prepare(job, shard))] if shard.records else []
  shards = map(lambda shard: (own(shard), shard.documents), read(job, start, wanted))
  while turn := list(itertools.islice(shards, n)):  # without the records, which are freed
    yield [shard for own, _ in turn for shard in own], turn[-1][1]


def read(job: Job, done: list[Scored], wanted: Callable[[int], bool]) -> Iterator[Shard]:
  """Yields the shards of the input that follow the first ones, `done`, a function of the input and
  --shard_records alone. A shard whose number is not `wanted` is only counted."""
  counts, start = Report(), (0, 0)
  for about in (shard.about for shard in done):
    counts.records += about.records
    counts.skipped.update(reject["reason"] for reject in about.rejects)
    start = about.next
  unread = records.checked(job.reading, job.format, counts, tuple(start))
  number, first = len(done), next(unread, None)
  while first is not None:
    shard, count, size = [], 0, 0
    while first is not None and count < job.config.shard_records:
      size += record_bytes(first)
      if count > 0 and size > SHARD_BYTES:
        break
      if wanted(number):
        shard.append(first)
      count, documents = count + 1, counts.usable
      first = next(unread, None)  # raises at the end if too many records are unusable
    yield Shard(number, shard, first and list(first[:2]), documents)
    number += 1


def record_bytes(record: Record) -> int:
  """The size of a record: of its line in JSONL, else of its text."""
  if isinstance(record.original, bytes):
    return len(record.original)
  return len(record.document.text.encode("utf-8", "replace")) if record.document else 0


def prepare(job: Job, shard: Shard) -> tuple[list[str], np.ndarray, About]:
  """The texts and coins of a shard's documents, and its description."""
  texts = [record.document.text for record in shard.usable]
  coins = np.array([selection.coin(job.config.seed, text) for text in texts])
  return texts, coins, describe(job, shard)


def describe(job: Job, shard: Shard) -> About:
  """What is kept of a shard; its tokens are counted as they are scored."""
  sizes, last = [item.stamp[0] for item in job.inputs], shard.records[-1]
  read = (sum(sizes[: last.input]) + sizes[last.input] * last.read) / max(sum(sizes), 1)
  rejects = [
    {"file": job.inputs[x.input].path, "record": x.number, "reason": x.problem}
    for x in shard.records
    if x.problem
  ]
  inferred = [
    x for x in shard.usable if job.format == "parquet" and not isinstance(x.original, tuple)
  ]
  schema = records.inferred_schema(inferred).serialize().to_pybytes().hex() if inferred else None
  return About(shard.next, len(shard.records), shard.documents, rejects, read, schema, tokens=0)


def ahead(iterator: Iterator) -> Iterator:
  """Yields the same items; a thread prepares the next one meanwhile."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    future = pool.submit(next, iterator, None)
    while (item := future.result()) is not None:
      future = pool.submit(next, iterator, None)
      yield item


# Pass 2: selection, then the records with their new fields.


def write(job: Job, output: Path, stop: StopSignal) -> None:
  """Writes the missing parts, each host a contiguous range; the leader then writes the rejects and
  the manifest."""
  by_number = scored(output)
  done = list(by_number.values())
  abouts = [shard.about for shard in done]
  paths = [output / f"part-{i:05d}.{job.format}" for i in range(len(done))]
  missing = [i for i, path in enumerate(paths) if not path.exists()]
  hosts.agree_on(output, [list(by_number), missing])
  scores, coins = (np.concatenate([shard[i] for shard in done]) for i in (0, 1))
  ordered = np.sort(scores)
  if (tied := np.unique(ordered, return_counts=True)[1].max()) > max(1, len(ordered) / 100):
    hosts.say(
      f"note: {tied} of {len(ordered)} documents have the same score: the rater cannot rank them"
    )
  columns = select(job.config, scores, coins, ordered)
  ends = np.cumsum([len(shard.scores) for shard in done])
  parts = zip(*(np.split(values, ends[:-1]) for values in columns.values()), strict=True)
  parts = [dict(zip(columns, part, strict=True)) for part in parts]
  schema = records.output_schema(job.inputs, job.format, [about.schema for about in abouts])
  turns = -(-len(missing) // jax.process_count())
  own = missing[jax.process_index() * turns :][:turns]
  to_write = read_again(job, done, own)
  with hosts.progress("writing", len(done) - len(missing), total=len(done), unit=" files") as bar:
    for turn in range(turns):  # as many on each host, though the last may have fewer parts
      for part in own[turn : turn + 1]:
        records.write(paths[part], next(to_write), parts[part], schema)
      bar.update(len(missing[turn::turns]))
      if hosts.any_host(stop.requested):
        raise Stopped
  if hosts.is_leader():
    counts = {"records": sum(about.records for about in abouts)} | records.counts(columns)
    counts["tokens"] = sum(about.tokens for about in abouts)
    files = zip(paths, map(records.counts, parts), strict=True)
    files = [{"file": path.name} | part for path, part in files]
    rejects = [reject for about in abouts for reject in about.rejects]
    finish(job, output, counts, rejects, files, records.cdf(ordered))


def read_again(job: Job, done: list[Scored], parts: list[int]) -> Iterator[list[Record]]:
  """Yields the records of these parts, in order.

  Raises:
    UserError: the input has changed since it was scored.
  """
  shards = read(job, done[: parts[0]], set(parts).__contains__)
  for number in range(parts[0], parts[-1] + 1):
    shard, about = next(shards, None), done[number].about
    check(
      shard is not None and (shard.next, shard.documents) == (about.next, about.documents),
      f"{', '.join(job.config.data)} changed while it was read: start again with another --output",
    )
    if shard.records:
      yield shard.usable
