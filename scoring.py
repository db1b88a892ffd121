"""Scores of many documents, fast, and what is selected by them.

A document's score is phi_eta of its pieces of at most S tokens (cut as train.py cuts them: a last
piece of fewer than 16 tokens is dropped), averaged with the pieces' tokens as weights. The pieces
go to the shortest of four lengths S/8, S/4, S/2, S that holds them, in batches of a fixed number
of tokens: four compiled programs, little padding. A score depends on its document alone, not on
what it is batched with.

Axes: n documents, B rows of a batch.
"""

import collections
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import data
import datarater
import mesh
import train
from transformer import Batch


class Rows(NamedTuple):
  """One batch of pieces, padded to one of the lengths."""

  batch: Batch  # [B, length] int32
  index: np.ndarray  # [B] int32: whose piece it is; -1 of a row that only fills up
  tokens: np.ndarray  # [B] int32: of the piece


def lengths(sequence_length: int) -> list[int]:
  """What pieces are padded to: S/8, S/4, S/2 and S, rounded up."""
  return sorted({-(-sequence_length // part) for part in (8, 4, 2, 1)})


def batches(
  texts: list[str], tokenizer: data.Tokenizer, sequence_length: int, score_batch: int
) -> list[Rows]:
  """All pieces of the texts, in batches of score_batch * S tokens: the longest pieces first, and of
  one length in the order of the texts."""
  buckets = {length: [] for length in lengths(sequence_length)}
  for index, tokens in enumerate(tokenizer.encode(texts)):
    for piece in data.cut(tokens, sequence_length):
      length = next(length for length in buckets if len(piece) <= length)
      buckets[length].append((index, piece))
  result = []
  for length, pieces in reversed(buckets.items()):
    rows = score_batch * sequence_length // length
    for start in range(0, len(pieces), rows):
      result.append(_rows(pieces[start : start + rows], rows, length, tokenizer.pad))
  return result


def _rows(pieces: list[tuple[int, np.ndarray]], rows: int, length: int, pad: int) -> Rows:
  tokens = np.full((rows, length), pad, np.int32)
  index, count = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
  for row, (document, piece) in enumerate(pieces):
    tokens[row, : len(piece)], index[row], count[row] = piece, document, len(piece)
  segments = (np.arange(length) < count[:, None]).astype(np.int32)
  return Rows(Batch(tokens, segments), index, count)


def score(
  rater: train.TrainedRater,
  batches: list[Rows],
  documents: int,
  scored: Callable[[Rows], None] = lambda rows: None,
) -> np.ndarray:
  """Scores [n] float32 of the documents whose pieces are all in `batches`.

  Results are read two batches late, so that the device does not wait for the host; `scored` is
  told each batch that is read.
  """
  total, count = np.zeros((2, documents))
  pending = collections.deque()

  def read():
    rows, scores = pending.popleft()
    real = rows.index >= 0
    index, tokens = rows.index[real], rows.tokens[real].astype(np.float64)
    np.add.at(total, index, np.asarray(scores)[real] * tokens)
    np.add.at(count, index, tokens)
    scored(rows)

  for rows in batches:
    pending.append((rows, rater.score(rater.eta, mesh.put(rows.batch, "data"))))
    if len(pending) > 2:
      read()
  while pending:
    read()
  return (total / np.maximum(count, 1)).astype(np.float32)


def score_texts(
  rater: train.TrainedRater, texts: list[str], score_batch: int
) -> tuple[np.ndarray, int]:
  """Scores [n] float32 of the texts, and the tokens that were scored."""
  rows = batches(texts, rater.tokenizer, rater.config.sequence_length, score_batch)
  return score(rater, rows, len(texts)), sum(int(x.tokens.sum()) for x in rows)


# Selection


def coin(seed: int, text: str) -> float:
  """Uniform in [0, 1), a hash of (seed, text): the same wherever and whenever it is drawn."""
  key = seed.to_bytes(8, "little", signed=True)
  digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
  return (int.from_bytes(digest, "little") >> 11) / 2**53


def quantiles(scores: np.ndarray, ordered: np.ndarray) -> np.ndarray:
  """F(score) [n] float32: the share of the `ordered` scores that are <= each; ties are equal."""
  return (np.searchsorted(ordered, scores, side="right") / len(ordered)).astype(np.float32)


def accepted(
  quantiles: np.ndarray, coins: np.ndarray, batch_size: int, discard: float
) -> np.ndarray:
  """Point-wise selection [n] bool: where the coin lies below P_accept of the quantile."""
  keep = round((1 - discard) * batch_size)
  padded = np.resize(quantiles, -(-len(quantiles) // 1024) * 1024).reshape(-1, 1024)
  chances = [np.asarray(_chance(batch_size, keep)(row)) for row in padded]
  return coins < np.concatenate([np.zeros(0, np.float32), *chances])[: len(quantiles)]


@functools.cache
def _chance(batch_size: int, keep: int):
  """P_accept of [1024] quantiles: one shape, so that each has one value in any company."""
  return jax.jit(lambda p: datarater.acceptance_probability(p, batch_size, keep))


def top_k(scores: np.ndarray, batch_size: int, discard: float, seed: int) -> np.ndarray:
  """Batch-level selection [n] bool.

  The documents are permuted (by seed and n alone) and cut into batches of B; the best
  round((1 - discard) B) of each are kept, ties go to the earlier in that order. The last batch may
  be smaller, and keeps the same share of its size, rounded.
  """
  order = np.random.default_rng(seed).permutation(len(scores))
  full = len(scores) // batch_size * batch_size
  keep = np.zeros(len(scores), bool)
  for start in range(0, full, 4096 * batch_size):
    part = order[start : min(start + 4096 * batch_size, full)]
    mask = datarater.top_k_mask(jnp.asarray(scores[part].reshape(-1, batch_size)), discard)
    keep[part] = np.asarray(mask).reshape(-1)
  rest = order[full:]
  if round((1 - discard) * len(rest)) > 0:
    keep[rest] = np.asarray(datarater.top_k_mask(jnp.asarray(scores[rest]), discard))
  return keep
