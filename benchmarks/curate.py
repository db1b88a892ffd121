"""Throughput of scoring: curate.py's buckets and read-ahead against the plain loop, side by side.

  python benchmarks/curate.py --rater=runs/demo

Two corpora from the demo's: its documents, and its lines as documents of their own (short ones).
plain is train.score_documents: batches of 64 padded to S, tokenised between two batches. bucketed
is what curate.py runs: four lengths, tokens of a batch constant, a thread that tokenises ahead.
Both score the same documents, in turn; the first round compiles and is not timed. The last columns
are the host's part alone (JSON, tokens, batches, coins) and the device's alone, in seconds a round.
"""

import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cpu

cpu.keep_freed_memory()

import jax
import numpy as np
from absl import app, flags, logging

import curate
import data
import demo_corpus
import scoring
import train

FLAGS = flags.FLAGS
flags.DEFINE_string("rater", "runs/demo", "workdir of train.py")
flags.DEFINE_integer("documents", 1024, "documents of each corpus")
flags.DEFINE_integer("rounds", 3, "timed rounds; the median counts")


def main(_):
  logging.set_verbosity(logging.WARNING)
  rater = train.open_rater(FLAGS.rater)
  S = rater.config.sequence_length
  print(f"rater {rater.config.rater}, S = {S}, {jax.devices()[0].device_kind}")
  print(
    f"{'corpus':10} {'loop':10} {'documents/s':>12} {'tokens/s':>12} {'host s':>9} {'device s':>9}"
  )
  for name, texts in corpora(FLAGS.documents):
    compare(name, [json.dumps({"text": text}) for text in texts], rater)


def compare(name: str, lines: list[str], rater: train.TrainedRater) -> None:
  S, tokenizer = rater.config.sequence_length, rater.tokenizer
  quarter = -(-len(lines) // 4)
  shards = [lines[i : i + quarter] for i in range(0, len(lines), quarter)]

  def prepare(shard):
    texts = [json.loads(line)["text"] for line in shard]
    coins = [scoring.coin(0, text) for text in texts]
    return scoring.batches(texts, tokenizer, S, 64), coins

  def bucketed(prepared):
    return np.concatenate([scoring.score(rater, rows, len(coins)) for rows, coins in prepared])

  def plain():
    documents = [data.Document(json.loads(line)["text"], "", "") for line in lines]
    return train.score_documents(rater.score, rater.eta, documents, tokenizer, rater.config)

  ready = [prepare(shard) for shard in shards]
  tokens = sum(int(x.tokens.sum()) for rows, _ in ready for x in rows)
  loops = {
    "plain": plain,
    "bucketed": lambda: bucketed(curate.ahead(map(prepare, shards))),
    "host": lambda: list(map(prepare, shards)),
    "device": lambda: bucketed(ready),
  }
  np.testing.assert_allclose(plain(), bucketed(ready), rtol=1e-4, atol=1e-5)
  seconds = {loop: [] for loop in loops}
  for _ in range(FLAGS.rounds):  # in turn: other work on the machine meets all alike
    for loop, function in loops.items():
      start = time.perf_counter()
      function()
      seconds[loop].append(time.perf_counter() - start)
  seconds = {loop: statistics.median(values) for loop, values in seconds.items()}
  for loop in ("plain", "bucketed"):
    rates = [f"{count / seconds[loop]:12,.0f}" for count in (len(lines), tokens)]
    parts = [f"{seconds[part]:9.2f}" for part in ("host", "device") if loop == "bucketed"]
    print(f"{name:10} {loop:10}", *rates, *parts, flush=True)


def corpora(count):
  with open(demo_corpus.build(), encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
  texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
  yield "documents", texts[:count]
  lines = [line for text in texts for line in text.split("\n") if line.strip()]
  yield "lines", lines[: 8 * count]


if __name__ == "__main__":
  app.run(main)
