"""rating.py: texts as rows of pieces."""

import numpy as np

from corpus.tokenizer import load_tokenizer
from rating import make_rows


def test_rows_hold_the_pieces_of_the_texts_in_order():
  tokenizer = load_tokenizer("bytes")
  texts = ["short", "x" * 63, "y" * 64, "z" * 300, "last"]
  rows = make_rows(texts, tokenizer, 64, 4)
  assert [part.batch.tokens.shape for part in rows] == [(4, 64), (4, 64), (32, 8)]
  index = np.concatenate([part.index for part in rows])
  assert index.tolist() == [1, 2, 3, 3, 3, 3, 3, -1, 0, 4, *[-1] * 30]
  count = np.concatenate([part.tokens for part in rows])
  assert count.tolist() == [64, 64, 64, 64, 64, 64, 45, 0, 6, 5, *[0] * 30]
  for part in rows:
    assert np.array_equal(part.batch.segments.sum(1), part.tokens)
    assert part.batch.segments.max() == 1
    assert (part.batch.tokens[part.batch.segments == 0] == tokenizer.pad).all()
  long = np.concatenate([part.batch.tokens for part in rows[:2]])
  assert tokenizer.decode(long[2:].ravel()) == texts[3]
  assert make_rows([], tokenizer, 64, 4) == []
