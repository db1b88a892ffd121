"""Scores texts with a trained rater: phi_eta of a text.

  score = load_rater("runs/demo")
  score(["A text to rate."])     # [1] float32

A document is cut into pieces of at most S tokens as for training (a short last piece of a longer
document is dropped). Its score is the mean of phi_eta over the pieces, weighted by their tokens.
Pieces are padded to one of a few lengths, in batches of a fixed number of tokens: one compiled
program for each length in use, little padding. A score does not depend on the other documents.

Axes: n documents, B rows of a batch, R rows of a split.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from config import Config, make_rater
from corpus.batches import Split
from corpus.packing import cut
from corpus.tokenizer import Tokenizer, load_tokenizer
from kernels import attention
from runtime import cli, cpu, sharding
from runtime.cli import check
from runtime.workdir import FORMAT, Checkpoints
from transformer import Batch, parameter_count

Score = Callable[[Batch], jax.Array]  # phi_eta: [B, S] -> [B] float32


class TrainedRater(NamedTuple):
  """The rater of a workdir, with the tokenizer and the settings of its training."""

  config: Config  # of the run that trained it
  tokenizer: Tokenizer
  eta: Any
  apply: Callable[[Any, Batch], jax.Array]  # jitted: (eta, [B, S]) -> [B] float32
  parameters: int
  fingerprint: str  # of eta, its architecture and its tokenizer

  def score(self, batch: Batch) -> jax.Array:
    """phi_eta [B] float32."""
    return self.apply(self.eta, sharding.shard(batch, "data"))


def load_rater(workdir: str | os.PathLike) -> Callable[[Iterable[str]], np.ndarray]:
  """The rater of a workdir as a function: texts -> scores [n] float32."""
  rater = open_rater(workdir)

  def score(texts: Iterable[str]) -> np.ndarray:
    if isinstance(texts, str):
      raise TypeError("give a list of texts: score([text])")
    return score_texts(rater.score, list(texts), rater.tokenizer, rater.config.sequence_length)[0]

  return score


def open_rater(workdir: str | os.PathLike) -> TrainedRater:
  """The rater of a workdir's last checkpoint, on every device of the mesh; it may still train.

  Raises:
    UserError: the folder holds no run, one of an earlier version, or no checkpoint yet.
  """
  workdir, config = Path(workdir), rater_config(workdir)
  tokenizer = load_tokenizer(config.tokenizer)
  if not attention.runs_here(config.attention_backend):  # trained on another kind of device
    config = dataclasses.replace(config, attention_backend="xla")
  rater = make_rater(config, tokenizer.vocab_size)
  template = jax.eval_shape(rater.init, jax.random.PRNGKey(0))
  eta = Checkpoints(workdir).restore_field("eta", template)
  digest = hashlib.blake2b(f"{config.rater} {config.dtype} {tokenizer.fingerprint}".encode())
  for leaf in jax.tree.leaves(jax.device_get(eta)):
    digest.update(np.ascontiguousarray(leaf))
  apply = jax.jit(lambda eta, batch: sharding.replicate(rater.score(eta, batch)))
  size, fingerprint = parameter_count(eta), digest.hexdigest()[:16]
  return TrainedRater(config, tokenizer, sharding.shard(eta), apply, size, fingerprint)


def rater_config(workdir: str | os.PathLike) -> Config:
  """The settings of the run in a workdir."""
  path = Path(workdir) / "config.json"
  check(path.exists(), f"{workdir} holds no run of train.py: no config.json in it")
  saved = json.loads(path.read_text())
  check(
    saved.get("format") == FORMAT,
    f"{workdir} holds a rater of an earlier version: train it again",
  )
  return cli.from_values(Config, saved["config"])


def score_texts(
  score: Score,
  texts: list[str],
  tokenizer: Tokenizer,
  sequence_length: int,
  lengths: list[int] | None = None,
) -> tuple[np.ndarray, int]:
  """(scores [n] float32, the number of tokens scored). For `lengths` see `make_rows`."""
  counts = []
  rows = make_rows(texts, tokenizer, sequence_length, lengths)
  scores = score_rows(score, rows, len(texts), lambda part: counts.append(int(part.tokens.sum())))
  return scores, sum(counts)


class Rows(NamedTuple):
  """One batch of pieces, padded to one of the lengths."""

  batch: Batch  # [B, length] int32
  index: np.ndarray  # [B] int32: the document of each piece; -1 for a row of padding
  tokens: np.ndarray  # [B] int32: tokens of the piece


def make_rows(
  texts: list[str],
  tokenizer: Tokenizer,
  sequence_length: int,
  lengths: list[int] | None = None,
) -> Iterator[Rows]:
  """Yields all pieces of the texts in batches, each as soon as it is full. Pieces of one length
  keep the order of the texts.

  lengths: what pieces are padded to, ascending to S; default `piece_lengths`.
  """
  buckets = {length: [] for length in lengths or piece_lengths(sequence_length)}
  for start in range(0, len(texts), 8):  # few at a time: their tokens take memory
    for index, tokens in enumerate(tokenizer.encode(texts[start : start + 8]), start):
      for piece in cut(tokens, sequence_length):
        length = next(length for length in buckets if len(piece) <= length)
        pieces, rows = buckets[length], batch_rows(length)
        pieces.append((index, piece))
        if len(pieces) == rows:
          yield pad_pieces(pieces, rows, length, tokenizer.pad)
          pieces.clear()
  for length, pieces in buckets.items():
    if pieces:
      yield pad_pieces(pieces, batch_rows(length), length, tokenizer.pad)


def piece_lengths(sequence_length: int) -> list[int]:
  """Multiples of S/8 down to 3/8 S, then S/4, 3/16 S, S/8, ... down to 16 tokens; ascending. Each
  in use costs a compilation; short texts are padded by about a tenth."""
  eighths = [(n, 8) for n in range(3, 9)] + [(n, 8 << k) for n in (2, 3) for k in range(24)]
  lengths = {-(-sequence_length * n // parts) for n, parts in eighths}
  return sorted(n for n in lengths if 16 <= n < sequence_length) + [sequence_length]


def batch_rows(length: int) -> int:
  """Rows of a batch for the devices in use. On a CPU the activations of 1,024 tokens stay in the
  caches; larger batches take up to 1.8 times as long per token."""
  tokens = 1024 if jax.default_backend() == "cpu" else 2**15
  return max(1, tokens // length) * sharding.axis_size("data")


def score_rows(
  score: Score,
  rows: Iterable[Rows],
  documents: int,
  scored: Callable[[Rows], None] = lambda rows: None,
) -> np.ndarray:
  """Scores [n] float32 of documents from all their pieces; calls `scored` after each batch."""
  # Summed by length: which length's batch is full first depends on the other documents.
  totals = collections.defaultdict(lambda: np.zeros(documents))
  count, parts = np.zeros(documents), collections.deque()

  def batches():
    for part in rows:
      parts.append(part)
      yield part.batch

  for scores in results(score, batches()):
    part = parts.popleft()
    real = part.index >= 0
    index, tokens = part.index[real], part.tokens[real].astype(np.float64)
    np.add.at(totals[part.batch.tokens.shape[1]], index, scores[real] * tokens)
    np.add.at(count, index, tokens)
    scored(part)
  total = sum(totals[length] for length in sorted(totals))
  return (total / np.maximum(count, 1)).astype(np.float32)


def score_sequences(
  score: Score, split: Split | Batch, rows: np.ndarray, progress: str | None = None
) -> np.ndarray:
  """Scores [R] float32 of these rows of a split, with a progress bar of that title, if any."""
  size = batch_rows(split.tokens.shape[1])
  starts = range(0, len(rows), size)

  def batches():
    for start in tqdm.tqdm(starts, progress, unit=" batches", disable=progress is None):
      padded = np.resize(rows[start : start + size], size)  # one shape, one compiled program
      yield Batch(*(np.asarray(x[padded], np.int32) for x in (split.tokens, split.segments)))

  scores = list(results(score, batches()))
  return np.concatenate([np.zeros(0, np.float32), *scores])[: len(rows)]


def results(function: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[np.ndarray]:
  """Yields function(batch) of each batch, in order, while the next batches are under way.

  On one CPU device each core computes a batch of its own: the matmuls of a small batch are too
  small to be shared. Elsewhere the device works through a queue, in one order on all devices.
  """
  alone = jax.default_backend() == "cpu" and jax.sharding.get_mesh().size <= 1
  threads = cpu.cores() if alone else 1
  value = lambda batch: np.asarray(function(batch))
  pending, shapes = collections.deque(), set()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for batch in batches:
      shape = tuple(x.shape for x in jax.tree.leaves(batch))
      if alone and shape in shapes:
        pending.append(pool.submit(value, batch).result)
      else:  # the first call of a shape compiles: only one thread does
        pending.append(partial(np.asarray, function(batch)))
        shapes.add(shape)
      if len(pending) > 2 * threads:
        yield pending.popleft()()
    while pending:
      yield pending.popleft()()


def pad_pieces(pieces: list[tuple[int, np.ndarray]], rows: int, length: int, pad: int) -> Rows:
  """Pieces [(document, tokens)] as one batch [rows, length]."""
  tokens = np.full((rows, length), pad, np.int32)
  index, count = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
  for row, (document, piece) in enumerate(pieces):
    tokens[row, : len(piece)], index[row], count[row] = piece, document, len(piece)
  segments = (np.arange(length) < count[:, None]).astype(np.int32)
  return Rows(Batch(tokens, segments), index, count)
