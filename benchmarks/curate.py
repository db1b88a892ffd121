"""Throughput and memory of scoring.

  python -m benchmarks.curate --rater=runs/demo
  python -m benchmarks.curate --rater=runs/demo --memory

Throughput: curate.py's and evaluate.py's loops against `plain N`, a loop over ready batches of N
tokens, sorted by length and padded to a multiple of S/8. curate.py's also parses JSON, tokenizes,
cuts, pads and computes coins, of the demo's documents and of its single lines. `sequences` are full
rows; `mean NLL` evaluates a language model of the rater's size. The loops of a table take turns
after an untimed round that compiles; the best round counts, by seconds and by CPU seconds. Ratios
are to the best plain loop: quote those by CPU seconds from a busy machine.

Memory: peak resident memory of curate.py, on larger corpora and on longer documents.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

import rating
import selection
import transformer
from corpus import demo
from corpus.packing import cut
from curation.local import ahead
from evaluation import pretrain
from runtime import cli, cpu
from runtime.cli import option
from transformer import Batch

PLAIN = (512, 1024, 2048, 4096, 8192, 16384)  # tokens of a batch


@dataclasses.dataclass(frozen=True)
class Settings:
  rater: str = option("runs/demo", "workdir of train.py")
  documents: int = option(256, "documents of the demo corpus", at_least=1)
  rounds: int = option(3, "timed rounds; the best counts", at_least=1)
  memory: bool = option(False, "measure memory instead")
  megabytes: int = option(8, "the smallest corpus of --memory", at_least=1)


def main() -> None:
  settings = cli.read(Settings)
  if settings.memory:
    return memory(settings)
  cpu.keep_freed_memory()
  rater = rating.open_rater(settings.rater)
  S, tokenizer, rounds = rater.config.sequence_length, rater.tokenizer, settings.rounds
  print(f"rater {rater.config.rater}, S = {S}, {os.cpu_count()} x {jax.devices()[0].device_kind}")
  print(f"{'':10} {'loop':12} {'tokens/s':>10} {'ratio':>6} {'per CPU s':>10} {'ratio':>6}")
  documents = demo_texts()[: settings.documents]
  lines = [line for text in documents for line in text.split("\n") if line.strip()]
  for name, texts in (("documents", documents), ("lines", lines[: 16 * settings.documents])):
    pieces = [piece for tokens in tokenizer.encode(texts) for piece in cut(tokens, S)]
    loops = {f"plain {n}": plain(rater.score, pieces, n, S, tokenizer.pad) for n in PLAIN}
    loops["curate.py"] = partial(curate, rater, [json.dumps({"text": text}) for text in texts])
    compare(name, sum(map(len, pieces)), loops, rounds)
  pieces = [piece for tokens in tokenizer.encode(documents) for piece in cut(tokens, S)]
  tokens_RS = np.stack([piece for piece in pieces if len(piece) == S])
  rows = Batch(tokens_RS, np.ones_like(tokens_RS))
  model = transformer.language_model(transformer.preset(rater.config.rater, tokenizer.vocab_size))
  params = jax.jit(model.init)(jax.random.PRNGKey(0))
  score = partial(rating.score_sequences, rater.score, rows, np.arange(len(tokens_RS)))
  for name, function, loop in (
    ("sequences", rater.score, score),
    (
      "mean NLL",
      pretrain.sequence_nll(model, params),
      partial(pretrain.mean_nll, model, params, rows),
    ),
  ):
    loops = {f"plain {n}": plain(function, tokens_RS, n, S, tokenizer.pad) for n in PLAIN}
    compare(name, tokens_RS.size, loops | {"evaluate.py": loop}, rounds)


def demo_texts() -> list[str]:
  with open(demo.build(), encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
  return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def plain(score: rating.Score, pieces, tokens: int, S: int, pad: int) -> Callable[[], None]:
  """A loop over batches of so many tokens; reads each result two batches late."""
  by_length = {}
  for piece in pieces:
    by_length.setdefault(min(S, -(-len(piece) * 8 // S) * -(-S // 8)), []).append((0, piece))
  batches = []
  for length, group in sorted(by_length.items()):
    size = max(1, tokens // length)
    for start in range(0, len(group), size):
      batches.append(rating.pad_pieces(group[start : start + size], size, length, pad).batch)

  def loop():
    pending = []
    for batch in batches:
      pending.append(score(batch))
      if len(pending) > 2:
        np.asarray(pending.pop(0))
    jax.block_until_ready(pending)

  return loop


def curate(rater: rating.TrainedRater, lines: list[str]) -> None:
  """The first pass of curate.py, in shards."""

  def read(start):
    texts = [json.loads(line)["text"] for line in lines[start : start + 4096]]
    return texts, [selection.coin(0, text) for text in texts]

  shards = map(read, range(0, len(lines), 4096))
  for texts, _ in ahead(shards):
    rating.score_texts(rater.score, texts, rater.tokenizer, rater.config.sequence_length)


def compare(name: str, tokens: int, loops: dict[str, Callable[[], None]], rounds: int) -> None:
  best = {}
  for number in range(rounds + 1):
    for loop, function in loops.items():
      start = np.array([time.perf_counter(), time.process_time()])
      function()
      rates = tokens / (np.array([time.perf_counter(), time.process_time()]) - start)
      if number:
        best[loop] = np.maximum(best.get(loop, 0), rates)
  top = np.max([rates for loop, rates in best.items() if loop.startswith("plain")], axis=0)
  for loop, rates in best.items():
    cells = [f"{rate:10,.0f} {ratio:6.2f}" for rate, ratio in zip(rates, rates / top, strict=True)]
    print(f"{name:10} {loop:12}", *cells, flush=True)


def memory(settings: Settings) -> None:
  text = "\n".join(demo_texts())
  print(f"{'corpus':>8} {'document':>10} {'peak':>10}")
  with tempfile.TemporaryDirectory() as folder:
    for times, length in ((1, 3_000), (4, 3_000), (16, 3_000), (4, 50_000), (4, 200_000)):
      path, output = Path(folder) / "corpus.jsonl", Path(folder) / f"{times}x{length}"
      with open(path, "w", encoding="utf-8") as file:
        for i in range(times * settings.megabytes * 10**6 // length):
          start = i * length % (len(text) - length)
          file.write(json.dumps({"id": i, "text": text[start : start + length]}) + "\n")
      command = [sys.executable, "curate.py", f"--rater={settings.rater}", f"--data={path}"]
      process = subprocess.Popen(
        [*command, f"--output={output}", "--score_only"], stderr=subprocess.DEVNULL
      )
      _, status, usage = os.wait4(process.pid, 0)
      cli.check(status == 0, f"curate.py failed with status {status}")
      size, peak = path.stat().st_size / 1e6, usage.ru_maxrss / 1e3
      print(f"{size:5.0f} MB {length / 1e3:7.0f} kB {peak:7,.0f} MB", flush=True)


if __name__ == "__main__":
  cli.run(main, Settings)
