"""Scores a corpus with a trained rater and marks what to keep: the paper's filtering.

  python curate.py --rater=runs/mine --data='texts/*.jsonl.gz' --output=curated --discard=0.5
  python curate.py --rater=runs/mine --data=crawl.parquet --output=curated --discard=0.5 \\
    --selection=top_k --batch_size=256
  python curate.py --rater=runs/mine --data=crawl.parquet --output=scored --score_only

The output has the records of the input, in order, in files part-00000.jsonl (or .parquet), ...:
every field as it was, then datarater_score phi_eta(x), datarater_quantile F(phi(x)), the share of
documents with a score <= this one, and datarater_keep. manifest.json tells what was done,
rejects.jsonl which records are not there (numbers from 1; of JSONL, the line) and why.

Selection, with B = --batch_size, the oversampled batch, and K = round((1 - discard) B):
  pointwise  a document is kept if a coin, a hash of (--seed, its text), falls below P_accept of its
             quantile. Any split of the work keeps the same documents; copies share their fate.
  top_k      all documents are permuted and cut into batches of B; each keeps its best K.

Started again with the same command it goes on where it stopped, and the output is the same bytes.
--data=demo is the demo corpus as it is, without the corruption that train.py adds.

All devices of a host share each batch; of another number of devices, scores may round otherwise.
Several hosts run the same command with --coordinator (hosts.py) and share the output folder; the
output is the bytes of one host. Shards of --shard_records are scored in rounds, of which each host
takes one: it reads through all records, and tokenises and scores its own. Then each host writes a
run of the parts, and reads from the place of its first. Another number of hosts may go on with what
some have begun. With --runner it is an Apache Beam pipeline: curate_beam.py.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import tqdm
from absl import flags

import cli
import cpu
import data
import hosts
import mesh
import report
import scoring
import shards
import train
from cli import check, option
from documents import Record, find_inputs
from workdir import StopSignal, open_workdir

FORMAT = 1  # of the output; raise it when what is written changes


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines the output. Every field is a flag."""

  rater: str | None = option(None, "workdir of train.py whose rater scores")
  data: tuple[str, ...] = option((), "what to curate, as in train.py: files, globs, hf:NAME, demo")
  discard: float | None = option(None, "share of the documents to drop, in [0, 1)")
  selection: str = option("pointwise", "pointwise: P_accept(F(score)); top_k: the best of a batch")
  batch_size: int = option(256, "B, documents in the batch that the selection acts on or emulates")
  score_only: bool = option(False, "scores and quantiles, no datarater_keep")
  seed: int = option(0, "of the coins and of the order of top_k")
  format: str | None = option(
    None, "jsonl or parquet; default parquet if all inputs are, else jsonl"
  )
  text_field: str | None = option(
    None, "field of a record that holds its text; default the rater's"
  )
  max_documents: int | None = option(None, "read so many documents at most")
  max_bad_fraction: float = option(0.1, "share of unusable records beyond which the run stops")
  shard_records: int = option(
    4096, "records of the input for an output file; the grain of a restart"
  )
  score_batch: int = option(64, "sequences of full length scored at once; more if shorter")
  runner: str | None = option(None, "of Apache Beam: DirectRunner, Dataflow, Flink, Spark, ...")
  beam_options: tuple[str, ...] = option((), "further flags of that runner: --project=x,--region=y")

  def __post_init__(self):
    check(self.rater is not None, "name the workdir of a trained rater with --rater")
    check(len(self.data) > 0, "name what to curate with --data")
    for name in ("batch_size", "shard_records", "score_batch"):
      check(getattr(self, name) >= 1, f"--{name}={getattr(self, name)} must be at least 1")
    for name, choices in (("selection", ("pointwise", "top_k")), ("format", shards.FORMATS)):
      value = getattr(self, name)
      check(
        value is None or value in choices,
        f"--{name}={value} is unknown: choose one of {', '.join(choices)}",
      )
    if self.score_only:
      return
    check(self.discard is not None, "give the share to drop with --discard=0.5, or --score_only")
    check(0 <= self.discard < 1, f"--discard={self.discard} must lie in [0, 1)")
    keep = round((1 - self.discard) * self.batch_size)
    check(keep >= 1, f"--discard={self.discard} keeps none of a batch of {self.batch_size}")
    check(self.batch_size <= 2**20, f"--batch_size={self.batch_size} must be at most 2^20")


def main():
  FLAGS = flags.FLAGS
  check(FLAGS.output is not None, "name a folder for the result with --output")
  config, output = cli.config_from_flags(Config), Path(FLAGS.output)
  check(
    config.runner is None or FLAGS.coordinator is None,
    f"--runner={config.runner} and --coordinator are two ways to many machines: leave one out",
  )
  cpu.keep_freed_memory()
  hosts.start_by_flags()
  if config.runner is None:
    devices = mesh.of_this_host(mesh.make_data_mesh(FLAGS.mesh))
    check(
      config.score_batch % devices.shape["data"] == 0,
      f"--score_batch={config.score_batch} is not a multiple of the {devices.shape['data']} "
      "devices of a host: change it, or give another --mesh=data=...",
    )
    with hosts.stop_together(), mesh.use(devices):
      return curate(config, output)
  try:
    import curate_beam
  except ImportError as error:
    raise cli.UserError(f"--runner needs Apache Beam ({error}): pip install -e '.[beam]'") from None
  curate_beam.curate(config, output)


class Job(NamedTuple):
  """A configuration with what it names."""

  config: Config
  rater: train.TrainedRater
  inputs: list  # find_inputs(config.data)
  reading: data.DataConfig
  format: str


def open_job(config: Config, output: Path) -> Job:
  """Opens the rater and prepares the output folder.

  Raises:
    UserError, DataError: no rater there; nothing to read; the folder holds another run.
  """
  inputs = find_inputs(config.data)
  folder = output.resolve()
  for path in map(Path, (*config.data, *(item.path for item in inputs))):
    apart = not (path.is_dir() and folder.is_relative_to(path.resolve()))
    apart = apart and not path.resolve().is_relative_to(folder)
    check(apart, f"--output={output} and the input {path} overlap: name a folder apart from it")
  rater = train.open_rater(config.rater)
  reading = data.DataConfig(
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
  if not (output / "config.json").exists():  # mistakes that show at once leave no folder behind
    output_schema(job, [])
    collections.deque(itertools.islice(shards.checked(reading, format), 1001), maxlen=0)
  hosts.leader_first(lambda: open_workdir(output, config, fingerprint, flag="output"))
  return job


def curate(config: Config, output: Path) -> None:
  """Scores, selects and writes, from where an earlier call was interrupted."""
  job = open_job(config, output)
  if hosts.leader():
    for unfinished in output.rglob(".writing-*"):
      unfinished.unlink()
  if not hosts.as_leader((output / "manifest.json").exists()):
    stop = StopSignal()
    try:
      score(job, output, stop)
      write(job, output, stop)
    except Stopped:
      hosts.say("stopped: start again to go on")
      return
  if hosts.leader():
    shutil.rmtree(output / "scores", ignore_errors=True)
    print(shards.summary(json.loads((output / "manifest.json").read_text())), flush=True)
  hosts.wait_for_all("curated")


class Stopped(Exception):
  """SIGTERM or Ctrl-C came, to any host; what is written so far is of use to the next call."""


# First pass: the scores of every `shard_records` records, in scores/00000.npz, ...; in rounds, of
# which each host scores one shard.


class Scored(NamedTuple):
  """A shard of the input, scored."""

  scores: np.ndarray  # [documents] float32
  coins: np.ndarray  # [documents] float64
  about: dict[str, Any]  # see shards.facts; and the number of tokens


def score(job: Job, output: Path, stop: StopSignal) -> None:
  """Scores what is not scored yet. The documents of a batch are all of one shard, so that scores
  don't depend on where a run was interrupted, nor on the hosts."""
  folder = output / "scores"
  folder.mkdir(exist_ok=True)
  done = scored(output)
  hosts.agree_on(output, list(done))
  start = unbroken(done)
  if start and start[-1].about["next"] is None:
    return
  before = sum(len(shard.scores) for shard in start)
  count = sum(len(shard.scores) for shard in done.values())
  devices = sorted(jax.tree.leaves(job.rater.eta)[0].devices(), key=lambda device: device.id)
  where = f"{devices[0].device_kind} x {len(devices)}"
  where += f" on each of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
  hosts.say(f"device {where}, {count} documents scored before")
  began, tokens_here = time.monotonic(), 0
  with progress_bar("scoring", before, unit=" documents", smoothing=0.1) as bar:
    for mine, after in ahead(prepared(job, done, start)):
      for number, rows, coins, about in mine:
        tokens = 0

        def progress(batch, total=about["tokens"], before=before, documents=after - before):
          nonlocal tokens, tokens_here
          tokens, tokens_here = (x + int(batch.tokens.sum()) for x in (tokens, tokens_here))
          rate = tokens_here / (time.monotonic() - began)
          bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
          bar.update(before + documents * tokens // total - bar.n)
          if stop.requested:
            raise Stopped

        if about["read"]:  # an estimate; of the hub, not even that
          total = round(about["documents"] / about["read"])
          bar.total = min(total, job.config.max_documents or total)
        with contextlib.suppress(Stopped):  # all hosts hear of it at the end of the round
          scores = scoring.score(job.rater, rows, len(coins), progress)
          check(
            bool(np.isfinite(scores).all()),
            f"the rater of {job.config.rater} gives scores that are not finite: its training "
            "diverged",
          )
          contents = {"scores": scores, "coins": coins, "about": np.array(json.dumps(about))}
          path = folder / f"{number:05d}.npz"
          report.write_atomically(path, lambda f, c=contents: np.savez(f, **c))
      if hosts.any_host(stop.requested):
        raise Stopped
      bar.update(after - bar.n)
      before = after


def scored(output: Path) -> dict[int, Scored]:
  """The shards that are scored, by their numbers: not all before the last need be."""
  shards = {}
  for path in sorted((output / "scores").glob("*.npz"), key=lambda path: int(path.stem)):
    with np.load(path) as file:
      about = json.loads(str(file["about"]))
      shards[int(path.stem)] = Scored(file["scores"], file["coins"], about)
  return shards


def unbroken(done: dict[int, Scored]) -> list[Scored]:
  """The scored shards before the first that is not."""
  return [done[i] for i in itertools.takewhile(done.__contains__, itertools.count())]


def prepared(
  job: Job, done: dict[int, Scored], start: list[Scored]
) -> Iterator[tuple[list[tuple], int]]:
  """Of each round, what this host is to score: [(number, batches, coins, facts)], or [] if that is
  done or past the end; and how many documents the input has up to the end of the round."""
  n, own = jax.process_count(), jax.process_index()
  kept = lambda number: number not in done and (number - len(start)) % n == own
  following = read(job, start, kept)
  while of_round := list(itertools.islice(following, n)):
    mine = [(shard.number, *prepare(job, shard)) for shard in of_round if shard.records]
    yield mine, of_round[-1].documents


def read(job: Job, done: list[Scored], kept: Callable[[int], bool]) -> Iterator[shards.Shard]:
  """The shards of the input after those `done`."""
  abouts = [shard.about for shard in done]
  return shards.read(job.reading, job.format, job.config.shard_records, abouts, kept)


def prepare(job: Job, shard: shards.Shard) -> tuple[list[scoring.Rows], np.ndarray, dict[str, Any]]:
  """The batches, coins and facts of a shard."""
  rater, config = job.rater, job.config
  texts = [record.document.text for record in shard.usable]
  rows = scoring.batches(texts, rater.tokenizer, rater.config.sequence_length, config.score_batch)
  coins = np.array([scoring.coin(config.seed, text) for text in texts])
  about = shards.facts(shard, job.inputs, job.format)
  return rows, coins, about | {"tokens": sum(int(batch.tokens.sum()) for batch in rows)}


def ahead(iterator: Iterator) -> Iterator:
  """The same items; a thread makes the next one while one is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    future = pool.submit(next, iterator, None)
    while (item := future.result()) is not None:
      future = pool.submit(next, iterator, None)
      yield item


def progress_bar(name: str, before: int, **options) -> tqdm.tqdm:
  return tqdm.tqdm(desc=name, initial=before, disable=not hosts.leader(), **options)


# Second pass: selection, then the records with their fields.


def write(job: Job, output: Path, stop: StopSignal) -> None:
  """Writes the parts that are not there yet, each host a run of them; the leader then the rejects
  and the manifest."""
  found = scored(output)
  done = list(found.values())
  paths = [output / f"part-{i:05d}.{job.format}" for i in range(len(done))]
  missing = [i for i, path in enumerate(paths) if not path.exists()]
  hosts.agree_on(output, [list(found), missing])
  scores, coins = (np.concatenate([shard[i] for shard in done]) for i in (0, 1))
  ends = np.cumsum([len(shard.scores) for shard in done])
  ordered = np.sort(scores)
  columns = dict(zip(shards.FIELDS, select(job.config, scores, coins, ordered), strict=False))
  if (tied := np.unique(ordered, return_counts=True)[1].max()) > max(1, len(ordered) / 100):
    hosts.say(
      f"note: {tied} of {len(ordered)} documents have one score: selected by it, all are alike"
    )
  schema = output_schema(job, done)
  parts = [
    {name: values[end - len(shard.scores) : end] for name, values in columns.items()}
    for shard, end in zip(done, ends, strict=True)
  ]
  size = lambda numbers: sum(len(done[i].scores) for i in numbers)
  turns = -(-len(missing) // jax.process_count())
  mine = missing[jax.process_index() * turns :][:turns]
  records = read_again(job, done, mine)
  with progress_bar("writing", len(scores) - size(missing), total=len(scores)) as bar:
    for turn in range(turns):  # as many on each host, which may have no part left to write
      for part in mine[turn : turn + 1]:
        shards.write(paths[part], next(records), parts[part], schema)
      bar.update(size(missing[turn::turns]))
      if hosts.any_host(stop.requested):
        raise Stopped
  if not hosts.leader():
    return
  rejects = [reject for shard in done for reject in shard.about["rejects"]]
  lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
  report.write_atomically(output / "rejects.jsonl", lambda file: file.write(lines.encode()))
  files = [
    {"file": path.name} | shards.counts(columns) for path, columns in zip(paths, parts, strict=True)
  ]
  reasons = collections.Counter(reject["reason"] for reject in rejects)
  tokens = sum(shard.about["tokens"] for shard in done)
  manifest = {"records": sum(shard.about["records"] for shard in done)} | shards.counts(columns)
  manifest |= {"tokens": tokens, "rejected": reasons, "files": files} | origin(job)
  shards.write_manifest(output, manifest | {"cdf": shards.cdf(ordered)})


def read_again(job: Job, done: list[Scored], parts: list[int]) -> Iterator[list[Record]]:
  """The documents of these parts, in order; they must be where they were when they were scored."""
  ends = np.cumsum([len(shard.scores) for shard in done])
  rest = read(job, done[: parts[0]], set(parts).__contains__)
  for number in range(parts[0], parts[-1] + 1):
    shard, place = next(rest, None), done[number].about["next"]
    check(
      shard is not None and shard.next == place and shard.documents == ends[number],
      f"{', '.join(job.config.data)} changed while it was read: start afresh with another --output",
    )
    if shard.records:
      yield shard.usable


def select(config: Config, scores, coins, ordered) -> tuple[np.ndarray, ...]:
  """The new fields of the documents [n]: score, quantile and, unless --score_only, whether kept."""
  quantiles = scoring.quantiles(scores, ordered)
  if config.score_only:
    return scores, quantiles
  if config.selection == "top_k":
    return scores, quantiles, scoring.top_k(scores, config.batch_size, config.discard, config.seed)
  return scores, quantiles, scoring.accepted(quantiles, coins, config.batch_size, config.discard)


def output_schema(job: Job, done: list[Scored]) -> pa.Schema | None:
  """The columns of the input, if the output is Parquet."""
  if job.format == "jsonl":
    return None
  found = [shards.file_schema(item.path) for item in job.inputs if item.kind == "parquet"]
  hexes = dict.fromkeys(shard.about["schema"] for shard in done if shard.about["schema"])
  found += [pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(x))) for x in hexes]
  return shards.common_schema(found)


def origin(job: Job) -> dict[str, Any]:
  """What the output was made from and how, for the manifest."""
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


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "folder of the result; one that was interrupted is resumed")
  flags.DEFINE_string("mesh", None, "data=N: devices that share each batch; default all")
  hosts.define_flags()
  cli.define_flags(Config)
  cli.run(main)
