"""rating.py: texts as rows of pieces, sums and order of their scores."""

import threading
import time

import numpy as np
import pytest

from corpus.tokenizer import load_tokenizer
from rating import Rows, make_rows, piece_lengths, results, score_rows
from transformer import Batch


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


def test_lengths_are_eighths_then_halve_in_two_steps_down_to_16_tokens():
  assert piece_lengths(128) == [16, 24, 32, 48, 64, 80, 96, 112, 128]
  assert piece_lengths(33) == [17, 21, 25, 29, 33]
  assert piece_lengths(8) == [8]


def test_a_score_does_not_depend_on_which_batch_is_full_first():
  rows = lambda length, values: Rows(
    Batch(np.tile(np.float32(values)[:, None], length), np.ones((len(values), length))),
    index=np.zeros(len(values), int),
    tokens=np.ones(len(values), int),
  )
  score = lambda batch: batch.tokens[:, 0]
  wide, narrow = rows(8, [1e17, -1e17]), rows(4, [3])  # 3 is lost in a sum that starts with 1e17
  assert [score_rows(score, parts, 1) for parts in ([wide, narrow], [narrow, wide])] == [1, 1]


def test_results_come_in_order_from_several_threads_and_errors_are_raised():
  threads = set()

  def function(batch):
    threads.add(threading.get_ident())
    time.sleep(0.002 * (batch[0] % 3))
    if batch[0] == 99:
      raise FloatingPointError
    return batch * 2

  values = list(results(function, (np.full(2 + i % 2, i) for i in range(40))))
  assert [value[0] for value in values] == [2 * i for i in range(40)]
  assert threading.get_ident() in threads and len(threads) > 1  # the first of a shape, the others
  with pytest.raises(FloatingPointError):
    list(results(function, (np.full(2, i) for i in range(98, 102))))
