"""Throughput of scoring: curate.py's length buckets and read-ahead against a plain loop, in turn.

  python -m benchmarks.curate --rater=runs/demo

Two corpora from the demo's: its documents, and its single lines (short documents). `plain` scores
batches of 64 rows padded to S. `bucketed` is curate.py's loop: four lengths, batches of a constant
number of tokens, a thread that tokenizes ahead. Both score the same documents; the first, untimed
round compiles. The last columns are seconds per round of the host alone (JSON, tokens, batches,
coins) and of the device alone.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np

import rating
import selection
from corpus import demo
from corpus.batches import cut
from curation.local import ahead
from runtime import cli, cpu
from runtime.cli import option


@dataclasses.dataclass(frozen=True)
class Settings:
  rater: str = option("runs/demo", "workdir of train.py")
  documents: int = option(1024, "documents of each corpus", at_least=1)
  rounds: int = option(3, "timed rounds; the median counts", at_least=1)


def main() -> None:
  settings = cli.read(Settings)
  cpu.keep_freed_memory()
  rater = rating.open_rater(settings.rater)
  S = rater.config.sequence_length
  print(f"rater {rater.config.rater}, S = {S}, {jax.devices()[0].device_kind}")
  print(
    f"{'corpus':10} {'loop':10} {'documents/s':>12} {'tokens/s':>12} {'host s':>9} {'device s':>9}"
  )
  for name, texts in corpora(settings.documents):
    compare(name, [json.dumps({"text": text}) for text in texts], rater, settings.rounds)


def compare(name: str, lines: list[str], rater: rating.TrainedRater, rounds: int) -> None:
  S, tokenizer = rater.config.sequence_length, rater.tokenizer
  quarter = -(-len(lines) // 4)
  shards = [lines[i : i + quarter] for i in range(0, len(lines), quarter)]

  def prepare(shard):
    texts = [json.loads(line)["text"] for line in shard]
    coins = [selection.coin(0, text) for text in texts]
    return rating.make_rows(texts, tokenizer, S, 64), coins

  def bucketed(prepared):
    scores = [rating.score_rows(rater.score, rows, len(coins)) for rows, coins in prepared]
    return np.concatenate(scores)

  def plain():
    encoded = tokenizer.encode([json.loads(line)["text"] for line in lines])
    pieces = [(i, piece) for i, tokens in enumerate(encoded) for piece in cut(tokens, S)]
    parts = [pieces[i : i + 64] for i in range(0, len(pieces), 64)]
    rows = [rating.pad_pieces(part, 64, S, tokenizer.pad) for part in parts]
    return rating.score_rows(rater.score, rows, len(lines))

  ready = [prepare(shard) for shard in shards]
  tokens = sum(int(x.tokens.sum()) for rows, _ in ready for x in rows)
  loops = {
    "plain": plain,
    "bucketed": lambda: bucketed(ahead(map(prepare, shards))),
    "host": lambda: list(map(prepare, shards)),
    "device": lambda: bucketed(ready),
  }
  np.testing.assert_allclose(plain(), bucketed(ready), rtol=1e-4, atol=1e-5)
  seconds = {loop: [] for loop in loops}
  for _ in range(rounds):  # in turn: other work on the machine slows all of them
    for loop, function in loops.items():
      start = time.perf_counter()
      function()
      seconds[loop].append(time.perf_counter() - start)
  seconds = {loop: statistics.median(values) for loop, values in seconds.items()}
  for loop in ("plain", "bucketed"):
    rates = [f"{count / seconds[loop]:12,.0f}" for count in (len(lines), tokens)]
    parts = [f"{seconds[part]:9.2f}" for part in ("host", "device") if loop == "bucketed"]
    print(f"{name:10} {loop:10}", *rates, *parts, flush=True)


def corpora(count: int) -> Iterator[tuple[str, list[str]]]:
  """Yields (name, texts)."""
  with open(demo.build(), encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
  texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
  yield "documents", texts[:count]
  lines = [line for text in texts for line in text.split("\n") if line.strip()]
  yield "lines", lines[: 8 * count]


if __name__ == "__main__":
  cli.run(main, Settings)
