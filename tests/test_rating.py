"""rating.py: texts as rows of pieces."""

import numpy as np

from corpus.tokenizer import load_tokenizer
from rating import make_rows, piece_lengths


def test_rows_hold_the_pieces_of_the_texts_in_order():
  tokenizer = load_tokenizer("bytes")
  texts = ["short", "x" * 63, "y" * 64, "z" * 300, *["full" * 15] * 13, "last"]
  rows = list(make_rows(texts, tokenizer, 64))
  assert [part.batch.tokens.shape for part in rows] == [(16, 64), (64, 16), (21, 48), (16, 64)]
  index = [part.index[part.index >= 0].tolist() for part in rows]
  assert index == [[1, 2, 3, 3, 3, 3, *range(4, 14)], [0, 17], [3], [14, 15, 16]]
  count = [part.tokens[part.tokens > 0].tolist() for part in rows]
  assert count == [[64] * 6 + [61] * 10, [6, 5], [45], [61] * 3]
  for part in rows:
    assert np.array_equal(part.batch.segments.sum(1), part.tokens)
    assert part.batch.segments.max() == 1
    assert (part.batch.tokens[part.batch.segments == 0] == tokenizer.pad).all()
  long = [rows[0].batch.tokens[2:6].ravel(), rows[2].batch.tokens[0]]
  assert tokenizer.decode(np.concatenate(long)) == texts[3]
  assert list(make_rows([], tokenizer, 64)) == []


def test_lengths_halve_in_two_steps_down_to_16_tokens():
  assert piece_lengths(128) == [16, 24, 32, 48, 64, 96, 128]
  assert piece_lengths(33) == [17, 25, 33]
  assert piece_lengths(8) == [8]
