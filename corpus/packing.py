"""Documents cut into pieces of at most S tokens, and pieces packed into rows of S tokens.

Axes: D documents, P pieces, N tokens, R rows, S tokens of a row.
"""

from typing import Any

import numpy as np

from corpus.documents import Document

MIN_REMAINDER = 16  # tokens; a shorter last piece of a longer document is dropped
MAX_SEGMENTS = 255  # of a row: they are uint8
WINDOW = 512  # rows that first fit fills at once
PIECE = np.dtype([("length", "<i4"), ("source", "<i4"), ("noise", "<f4")])


def cut(tokens: np.ndarray, length: int) -> list[np.ndarray]:
  """Pieces of at most `length` tokens; a short last piece of a longer document is dropped."""
  return [tokens[start : start + length] for start in range(0, _kept(len(tokens), length), length)]


def _kept(count: Any, length: int) -> Any:
  """How many of a document's `count` tokens, an int or an array, are in the pieces of `cut`."""
  rest = count % length
  return count - rest * ((count > length) & (rest < min(MIN_REMAINDER, length // 2)))


def pieces(
  documents: list[tuple[Document, np.ndarray]], sources: dict[str, int], length: int, row: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """The pieces that `cut` makes of documents: their tokens [N] joined, and a PIECE for each."""
  kept_D = _kept(np.array([len(tokens) for _, tokens in documents]), length)
  count_D = -(-kept_D // length)
  pieces_P = np.zeros(count_D.sum(), PIECE)
  pieces_P["length"] = length
  pieces_P["length"][np.cumsum(count_D) - 1] = kept_D - (count_D - 1) * length
  pieces_P["source"] = np.repeat([sources[each.source] for each, _ in documents], count_D)
  pieces_P["noise"] = np.repeat([each.noise for each, _ in documents], count_D)
  parts = [tokens[:n] for (_, tokens), n in zip(documents, kept_D.tolist(), strict=True)]
  return np.concatenate(parts, dtype=row["tokens"].base, casting="unsafe"), pieces_P


def pack(
  tokens_N: np.ndarray, pieces_P: np.ndarray, row: np.dtype, pad: int, first_fit: bool, end: bool
) -> tuple[np.ndarray, int]:
  """Packs pieces into rows [R], several by first fit or one each; returns the rows, and how many of
  the pieces they hold.

  Unless at the `end`, first fit leaves the last window out: later pieces may fit in its rows.
  """
  S, row_P = row["tokens"].shape[0], np.arange(len(pieces_P))
  if first_fit:
    row_P = _first_fit(pieces_P["length"].tolist(), S)
    if not end:
      row_P = row_P[row_P < row_P[-1] // WINDOW * WINDOW]
    order_P = np.argsort(row_P, kind="stable")
    ends_P = np.cumsum(pieces_P["length"], dtype=np.int64)
    pieces_P, row_P, ends_P = pieces_P[order_P], row_P[order_P], ends_P[order_P]
    starts_P = ends_P - pieces_P["length"]
    places = zip(starts_P.tolist(), ends_P.tolist(), strict=True)
    tokens_N = np.concatenate([tokens_N[start:end] for start, end in places])
  length_P = pieces_P["length"]
  first_R = np.flatnonzero(np.diff(row_P, prepend=-1))
  longest_R = np.lexsort((-length_P, row_P))[first_R]
  filled_R = np.add.reduceat(length_P, first_R, dtype=np.int32)
  filled_RS = np.arange(S, dtype=np.int32) < filled_R[:, None]
  segment_P = (np.arange(len(row_P)) - first_R[row_P] + 1).astype(np.uint8)
  rows_R = np.zeros(len(first_R), row)
  rows_R["tokens"] = pad
  rows_R["tokens"][filled_RS] = tokens_N
  rows_R["segments"][filled_RS] = np.repeat(segment_P, length_P)
  rows_R["source"], rows_R["noise"] = pieces_P["source"][longest_R], pieces_P["noise"][longest_R]
  return rows_R, len(pieces_P)


def _first_fit(lengths: list[int], sequence_length: int) -> np.ndarray:
  """The row of each piece: the first with room. If none of WINDOW rows has, WINDOW more begin."""
  rows, base = [], -WINDOW
  free, count, start = [-1] * WINDOW + [sequence_length], [], [0] * (sequence_length + 1)
  for length in lengths:
    i = start[length]  # rows before it lack the room
    while free[i] < length:
      i += 1
    if i == WINDOW:
      i, base = 0, base + WINDOW
      free, count = [sequence_length] * (WINDOW + 1), [0] * WINDOW
      start = [0] * (sequence_length + 1)
    start[length] = i
    count[i] += 1
    free[i] = free[i] - length if count[i] < MAX_SEGMENTS else 0
    rows.append(base + i)
  return np.array(rows)
