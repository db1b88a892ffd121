"""datarater.py: scores and batch weights.

Axes: B sequences, S tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

import datarater
from transformer import Batch, TransformerConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

B, S, V = 4, 8, 11
CONFIG = TransformerConfig(V, 8, n_layers=2, n_heads=2, head_dim=4, d_ff=12)


@pytest.fixture(scope="module")
def rater():
  """(eta as initialized, eta with a head that is not zero, score)."""
  rater = datarater.rater(CONFIG)
  fresh = jax.jit(rater.init)(jax.random.key(0))
  head = jnp.asarray(np.random.default_rng(1).normal(size=CONFIG.d_model), jnp.float32)
  (name,) = (n for n, p in fresh.items() if "score_head" in p)
  return fresh, fresh | {name: fresh[name] | {"score_head": head}}, jax.jit(rater.score)


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  segments = jnp.array([[1] * S, [1, 1, 1, 2, 2, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [1] + 7 * [0]])
  return Batch(jnp.asarray(rng.integers(V, size=(B, S)), jnp.int32), segments)


def test_scores_start_at_zero_and_weights_uniform(rater):
  fresh, trained, score = rater
  head = datarater.rater(CONFIG).head
  assert not head(fresh).any() and head(trained).all()
  scores = score(fresh, _batch())
  assert scores.dtype == jnp.float32 and scores.tolist() == [0] * B
  assert datarater.batch_weights(scores).tolist() == [1 / B] * B


def test_scores_ignore_the_content_and_the_length_of_padding(rater):
  _, eta, score = rater
  batch = _batch()
  scores = score(eta, batch)
  assert len(set(np.round(scores, 3).tolist())) == B
  other = jnp.where(batch.segments > 0, batch.tokens, (batch.tokens + 3) % V)
  assert score(eta, batch._replace(tokens=other)).tolist() == scores.tolist()
  longer = Batch(*(jnp.pad(x, [(0, 0), (0, 5)]) for x in batch))
  assert_close(score(eta, longer), scores, 1e-5)
  short = Batch(*(x[2:3, 2:7] for x in batch))
  assert_close(score(eta, short)[0], scores[2], 1e-5)


def test_score_reads_every_token_but_padding(rater):
  _, eta, score = rater
  batch = _batch()
  scores = score(eta, batch)
  for s in range(S):
    tokens = batch.tokens.at[:, s].set((batch.tokens[:, s] + 1) % V)
    moved = score(eta, batch._replace(tokens=tokens)) != scores
    assert moved.tolist() == (batch.segments[:, s] > 0).tolist()


def test_body_is_not_causal(rater):
  """With queries and keys of 0, only a causal mask could make a score depend on token order."""
  _, eta, score = rater

  def without_queries_and_keys(path, x):
    if path[-1].key != "qkv":
      return x
    return x.at[:, : 2 * CONFIG.n_heads * CONFIG.head_dim].set(0)

  blind = jax.tree.map_with_path(without_queries_and_keys, eta)
  tokens, segments = jnp.arange(S)[None], jnp.ones((1, S), jnp.int32)
  forward, backward = Batch(tokens, segments), Batch(tokens[:, ::-1], segments)
  assert_close(score(blind, forward), score(blind, backward), 1e-5)
  assert abs(score(eta, forward) - score(eta, backward)) > 1e-3


def test_a_sequence_of_padding_alone_scores_zero(rater):
  _, eta, score = rater
  batch = _batch()._replace(segments=jnp.zeros((B, S), jnp.int32))
  assert score(eta, batch).tolist() == [0] * B


def test_weights_are_the_softmax_over_the_last_axis():
  scores = np.random.default_rng(0).normal(size=(3, 2, B)) * 5
  expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  weights = datarater.batch_weights(jnp.asarray(scores, jnp.float32))
  assert_close(weights, expected, 1e-6)
  assert_close(weights.sum(-1), np.ones((3, 2)), 1e-6)
  assert np.isfinite(datarater.batch_weights(jnp.array([1e30, -1e30, 0.0]))).all()
