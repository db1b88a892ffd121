"""Time to build a corpus from JSONL: by tokenizer, packing and phase, with a floor in numpy.

  python -m benchmarks.corpus                   # about a minute
  python -m benchmarks.corpus --megabytes=200

The input is the demo's documents, repeated. `read` parses records, `split` hashes texts, `encode`
makes tokens. `build` is all of `load_corpus`; `rows` is the rest of it: cutting, packing, writing.
`floor` cuts the rows of packing=document, an array per document, and neither joins nor writes them.

At least each byte of JSONL is read once and each row written once: 3 bytes per token (uint16 token,
uint8 segment) and 8 per row, so that bytes as tokens with S = 128 move 4 bytes per byte of JSONL.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from corpus import demo
from corpus.batches import load_corpus
from corpus.documents import DataConfig, read_documents, split_of
from corpus.packing import cut
from corpus.tokenizer import load_tokenizer
from runtime import cli
from runtime.cli import option


@dataclasses.dataclass(frozen=True)
class Settings:
  megabytes: int = option(20, "size of the JSONL file", at_least=1)
  sequence_length: int = option(128, "S, tokens per sequence", at_least=2)
  vocabulary: int = option(2048, "entries of the BPE tokenizer", at_least=256)


def main() -> None:
  settings = cli.read(Settings)
  with tempfile.TemporaryDirectory() as temp:
    data, bpe = Path(temp, "corpus.jsonl"), Path(temp, "bpe.json")
    write_jsonl(data, settings.megabytes * 1e6)
    config = DataConfig(data=(str(data),), sequence_length=settings.sequence_length)
    train_bpe(config, settings.vocabulary, bpe)
    megabytes = data.stat().st_size / 1e6
    print(f"{megabytes:.1f} MB of JSONL, S = {config.sequence_length}")
    print(f"{'tokenizer':10} {'phase':15} {'CPU s':>8} {'wall s':>8} {'MB per CPU s':>13}")
    for tokenizer in ("bytes", str(bpe)):
      seconds = phases(dataclasses.replace(config, tokenizer=tokenizer))
      before = seconds["read"] + seconds["split"] + seconds["encode"]
      for packing in ("document", "pack"):
        with timed(seconds, f"build {packing}"):
          built = dataclasses.replace(config, tokenizer=tokenizer, packing=packing)
          load_corpus(built, Path(temp, "cache"), progress=False)
        if tokenizer == "bytes":  # BPE takes so long that the difference is noise
          seconds[f"rows {packing}"] = seconds[f"build {packing}"] - before
      for name, (cpu, wall) in seconds.items():
        columns = f"{cpu:8.2f} {wall:8.2f} {megabytes / cpu:13.1f}"
        print(f"{Path(tokenizer).stem:10} {name:15} {columns}", flush=True)


@contextlib.contextmanager
def timed(seconds: dict[str, np.ndarray], name: str) -> Iterator[None]:
  """Adds [CPU, wall] seconds to `seconds[name]`; CPU seconds are those of all threads."""
  now = lambda: np.array([time.process_time(), time.perf_counter()])
  start = now()
  yield
  seconds[name] = seconds.get(name, 0) + now() - start


def phases(config: DataConfig) -> dict[str, np.ndarray]:
  """Seconds of each phase before packing, and of the floor."""
  tokenizer, documents, seconds = load_tokenizer(config.tokenizer), read_documents(config), {}
  while True:
    with timed(seconds, "read"):
      texts = [document.text for document in itertools.islice(documents, 256)]
    if not texts:
      return seconds
    with timed(seconds, "split"):
      [split_of(text, config) for text in texts]
    with timed(seconds, "encode"):
      encoded = tokenizer.encode(texts)
    kept = [sum(map(len, cut(tokens, config.sequence_length))) for tokens in encoded]
    with timed(seconds, "floor"):
      for tokens, count in zip(encoded, kept, strict=True):
        cut_rows(tokens[:count], config.sequence_length, tokenizer.pad)


def cut_rows(tokens: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and segments [R, S] of one document."""
  shape = -(-len(tokens) // length), length
  tokens_RS, segments_RS = np.full(shape, pad, np.uint16), np.zeros(shape, np.uint8)
  tokens_RS.reshape(-1)[: len(tokens)] = tokens
  segments_RS.reshape(-1)[: len(tokens)] = 1
  return tokens_RS, segments_RS


def write_jsonl(path: Path, size: float) -> None:
  with open(path, "wb") as file:
    for line in itertools.cycle(demo.build().read_bytes().splitlines(keepends=True)):
      if file.tell() >= size:
        return
      file.write(line)


def train_bpe(config: DataConfig, vocabulary: int, path: Path) -> None:
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocabulary,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  sample = itertools.islice(read_documents(config), 0, 9000, 9)
  bpe.train_from_iterator((document.text for document in sample), trainer)
  bpe.save(str(path))


if __name__ == "__main__":
  cli.run(main, Settings)
