"""datarater.py: scores, batch weights, top-K and its point-wise equivalent.

Axes: B sequences, S tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from scipy import stats

import datarater
from transformer import Batch, TransformerConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

B, S, V = 4, 8, 11
CONFIG = TransformerConfig(V, 8, n_layers=2, n_heads=2, head_dim=4, d_ff=12)


@pytest.fixture(scope="module")
def rater():
  """(eta as initialised, eta with a head that is not zero, score)."""
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
  fresh, _, score = rater
  scores = score(fresh, _batch())
  assert scores.dtype == jnp.float32 and scores.tolist() == [0] * B
  assert datarater.batch_weights(scores).tolist() == [1 / B] * B


def test_scores_ignore_what_padding_holds_and_how_much_there_is(rater):
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
  """Where all queries and keys are 0 nothing but a causal mask can tell the order of tokens."""
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


@pytest.mark.parametrize(
  "batch, discard, keep",
  [(8, 0.0, 8), (8, 0.5, 4), (128, 0.75, 32), (128, 0.1, 115), (10, 0.9, 1), (3, 0.34, 2)],
)
def test_top_k_keeps_the_best(batch, discard, keep):
  scores = np.random.default_rng(0).normal(size=(2, batch))
  mask = np.asarray(datarater.top_k_mask(jnp.asarray(scores), discard))
  assert mask.sum(-1).tolist() == [keep, keep]
  for row, kept in zip(scores, mask, strict=True):
    assert set(row[kept]) == set(np.sort(row)[batch - keep :])


def test_top_k_breaks_ties_in_favour_of_the_earlier():
  assert datarater.top_k_mask(jnp.zeros(5), 0.6).tolist() == [True, True, False, False, False]
  scores = jnp.array([1.0, 2.0, 1.0, 3.0, 1.0])
  assert datarater.top_k_mask(scores, 0.4).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("batch, discard", [(8, 1.0), (8, -0.1), (8, 0.99), (8, 1.5)])
def test_top_k_that_cannot_be_is_named(batch, discard):
  with pytest.raises(ValueError, match=f"discard={discard} of a batch of {batch}"):
    datarater.top_k_mask(jnp.zeros(batch), discard)


SIZES = [(1, 1), (2, 1), (3, 2), (5, 5), (16, 1), (16, 15), (128, 32), (128, 115), (1000, 500)]
SIZES += [(4096, 1), (4096, 4095), (10**5, 99_990), (10**6, 10), (10**6, 500_000), (2**20, 2**20)]


def _quantiles(batch, keep):
  """All of [0, 1], and closely where acceptance rises from 0 to 1."""
  middle, width = 1 - keep / batch, np.sqrt(keep * (batch - keep + 1) / batch**3) + 1 / batch
  near = middle + width * np.linspace(-8, 8, 161)
  edges = [0.0, 1e-7, 1e-4, 1 - 1e-4, 1 - 2**-23, 1.0]
  return np.sort(np.clip(np.concatenate([np.linspace(0, 1, 41), near, edges]), 0, 1))


# One compilation for all B and K, which are traced.
acceptance = jax.jit(datarater.acceptance_probability)


@pytest.mark.parametrize("batch, keep", SIZES)
def test_acceptance_is_the_binomial_cdf_in_float32(batch, keep):
  p = _quantiles(batch, keep).astype(np.float32)
  actual = acceptance(p, batch, keep)
  assert actual.dtype == jnp.float32
  # binom.cdf(K - 1, B - 1, 1 - p) as a survival function: 1 - p is not exact in scipy's float64.
  expected = stats.binom.sf(batch - 1 - keep, batch - 1, p.astype(np.float64))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch, keep", SIZES)
def test_acceptance_is_the_binomial_cdf_in_float64(x64, batch, keep):
  p = _quantiles(batch, keep)
  actual = acceptance(p, batch, keep)
  assert actual.dtype == jnp.float64
  expected = stats.binom.sf(batch - 1 - keep, batch - 1, p)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch, keep", [(b, k) for b, k in SIZES if k < b])
def test_acceptance_rises_from_0_for_the_worst_to_1_for_the_best(batch, keep):
  p = jnp.asarray(_quantiles(batch, keep), jnp.float32)
  accept = acceptance(p, batch, keep)
  assert (accept[0], accept[-1]) == (0, 1)
  assert np.diff(accept).min() > -1e-5


@pytest.mark.parametrize("batch, keep", [(1, 1), (7, 3), (128, 32), (128, 115), (4096, 1024)])
def test_mean_acceptance_is_the_share_kept(x64, batch, keep):
  nodes, weights = np.polynomial.legendre.leggauss(20)
  edges = np.linspace(0, 1, 101)
  p = (edges[:-1, None] + (nodes + 1) / 2 / 100).ravel()
  accept = np.asarray(acceptance(p, batch, keep)).reshape(100, 20)
  assert_close((accept * weights).sum() / 200, keep / batch, 1e-9)


@pytest.mark.parametrize("batch, keep", [(16, 4), (128, 96)])
def test_acceptance_is_how_often_top_k_keeps_scores_of_a_quantile(batch, keep):
  bins, trials = 10, 4000
  p = np.random.default_rng(0).uniform(size=(trials, batch))
  kept = np.asarray(datarater.top_k_mask(jnp.asarray(p, jnp.float32), 1 - keep / batch))
  grid = np.linspace(0, 1, 1001)
  accept = np.interp(p, grid, acceptance(grid, batch, keep))
  for b in range(bins):
    inside = (p * bins).astype(int) == b
    # Members of one batch compete: their outcomes are no more than independent ones apart.
    error = 5 * np.sqrt(np.mean(accept[inside] * (1 - accept[inside])) / inside.sum())
    assert abs(kept[inside].mean() - accept[inside].mean()) <= error + 1e-5


def test_acceptance_takes_traced_batch_sizes_and_maps_over_them():
  p, batch, keep = np.float32([0.1, 0.6, 0.9]), np.array([4, 100, 1000]), np.array([2, 60, 100])
  expected = stats.binom.sf(batch - 1 - keep, batch - 1, p.astype(np.float64))
  function = datarater.acceptance_probability
  for transformed in (function, acceptance, jax.jit(jax.vmap(function))):
    np.testing.assert_allclose(transformed(p, batch, keep), expected, rtol=0, atol=1e-5)
  grid = acceptance(p[:, None], batch, keep)
  assert grid.shape == (3, 3)
  assert_close(jnp.diagonal(grid), acceptance(p, batch, keep), 1e-6)
