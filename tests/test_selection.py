"""selection.py: top-K, its point-wise equivalent against exact sums, the policies.

The coins, the quantiles and the selection of a corpus: tests/curation.
"""

import decimal
import fractions
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import selection


@pytest.mark.parametrize(
  "batch, discard, keep",
  [(8, 0.0, 8), (8, 0.5, 4), (128, 0.75, 32), (128, 0.1, 115), (10, 0.9, 1), (3, 0.34, 2)],
)
def test_top_k_keeps_the_best(batch, discard, keep):
  scores = np.random.default_rng(0).normal(size=(2, batch))
  mask = np.asarray(selection.top_k_mask(jnp.asarray(scores), discard))
  assert mask.sum(-1).tolist() == [keep, keep]
  for row, kept in zip(scores, mask, strict=True):
    assert set(row[kept]) == set(np.sort(row)[batch - keep :])


def test_top_k_breaks_ties_in_favor_of_the_earlier():
  assert selection.top_k_mask(jnp.zeros(5), 0.6).tolist() == [True, True, False, False, False]
  scores = jnp.array([1.0, 2.0, 1.0, 3.0, 1.0])
  assert selection.top_k_mask(scores, 0.4).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("batch, discard", [(8, 1.0), (8, -0.1), (8, 0.99), (8, 1.5)])
def test_an_impossible_top_k_is_named(batch, discard):
  with pytest.raises(ValueError, match=f"discard={discard} of a batch of {batch}"):
    selection.top_k_mask(jnp.zeros(batch), discard)


SMALL = [(1, 1), (2, 1), (3, 2), (5, 5), (16, 1), (16, 15), (128, 32), (128, 115)]
LARGE = [(1000, 500), (4096, 1), (4096, 4095), (10**5, 99_990), (10**6, 10), (10**6, 500_000)]
SIZES = [*SMALL, *LARGE, (2**20, 2**20)]


def quantiles(batch, keep):
  """All of [0, 1], and closely where acceptance rises from 0 to 1."""
  middle, width = 1 - keep / batch, np.sqrt(keep * (batch - keep + 1) / batch**3) + 1 / batch
  near = middle + width * np.linspace(-8, 8, 161)
  edges = [0.0, 1e-7, 1e-4, 1 - 1e-4, 1 - 2**-23, 1.0]
  return np.sort(np.clip(np.concatenate([np.linspace(0, 1, 41), near, edges]), 0, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch, keep", SMALL)
def test_acceptance_is_the_sum_in_exact_integers(batch, keep, dtype):
  p = quantiles(batch, keep).astype(dtype)
  actual = selection.acceptance_probability(p, batch, keep)
  assert actual.dtype == np.float64

  def exact(p):  # with p = a / d: every term is an integer over d^(B-1)
    a, d = float(p).as_integer_ratio()
    terms = (math.comb(batch - 1, s) * (d - a) ** s * a ** (batch - 1 - s) for s in range(keep))
    return float(fractions.Fraction(sum(terms), d ** (batch - 1)))

  np.testing.assert_allclose(actual, [exact(x) for x in p], rtol=0, atol=1e-13)


@pytest.mark.parametrize("batch, keep", LARGE)
def test_acceptance_of_large_batches_is_the_sum_in_50_digits(batch, keep):
  p = quantiles(batch, keep)
  p = p[(p > 0) & (p < 1)]
  lower = keep <= batch - keep  # sum the shorter tail
  first, last = (0, keep) if lower else (keep, batch)
  if (last - first) * len(p) > 10**6:  # three points, two standard deviations apart
    p = 1 - keep / batch + np.array([-1, 0, 1]) / np.sqrt(batch)

  def exact(p):
    p = decimal.Decimal(float(p))
    total, odds = decimal.Decimal(0), (1 - p) / p
    term = math.comb(batch - 1, first) * (1 - p) ** first * p ** (batch - 1 - first)
    for s in range(first, last):
      total += term
      term *= odds * (batch - 1 - s) / (s + 1)
    return float(total if lower else 1 - total)

  with decimal.localcontext(prec=50, Emin=-(10**9), Emax=10**9):
    expected = [exact(x) for x in p]
  assert min(expected) < 0.1 and max(expected) > 0.9
  actual = selection.acceptance_probability(p, batch, keep)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch, keep", SIZES)
def test_acceptance_rises_from_0_for_the_worst_to_1_for_the_best(batch, keep):
  accept = selection.acceptance_probability(quantiles(batch, keep), batch, keep)
  assert (accept[0], accept[-1]) == (float(keep == batch), 1)
  assert np.diff(accept).min() > -1e-12


@pytest.mark.parametrize("batch, keep", [(1, 1), (7, 3), (128, 32), (128, 115), (4096, 1024)])
def test_mean_acceptance_is_the_share_kept(batch, keep):
  nodes, weights = np.polynomial.legendre.leggauss(20)
  edges = np.linspace(0, 1, 101)
  p = edges[:-1, None] + (nodes + 1) / 2 / 100
  accept = selection.acceptance_probability(p, batch, keep)
  assert abs((accept * weights).sum() / 200 - keep / batch) < 1e-9


@pytest.mark.parametrize("batch, keep", [(16, 4), (128, 96)])
def test_acceptance_is_how_often_top_k_keeps_scores_of_a_quantile(batch, keep):
  bins, trials = 10, 4000
  p = np.random.default_rng(0).uniform(size=(trials, batch))
  kept = np.asarray(selection.top_k_mask(jnp.asarray(p, jnp.float32), 1 - keep / batch))
  accept = selection.acceptance_probability(p, batch, keep)
  for b in range(bins):
    inside = (p * bins).astype(int) == b
    # Members of one batch compete, so outcomes vary no more than independent ones.
    error = 5 * np.sqrt(np.mean(accept[inside] * (1 - accept[inside])) / inside.sum())
    assert abs(kept[inside].mean() - accept[inside].mean()) <= error + 1e-5


def test_acceptance_broadcasts_quantiles_and_sizes():
  p, batch, keep = np.float32([0.1, 0.6, 0.9]), np.array([4, 100, 1000]), np.array([2, 60, 1000])
  grid = selection.acceptance_probability(p[:, None], batch, keep)
  assert grid.shape == (3, 3)
  each = [
    [float(selection.acceptance_probability(x, B, K)) for B, K in zip(batch, keep, strict=True)]
    for x in p
  ]
  assert grid.tolist() == each


@pytest.mark.parametrize(
  "rho, expected", [(0.1, 142), (0.25, 171), (0.5, 256), (0.75, 512), (0.9, 1280)]
)
def test_the_pool_is_the_batch_over_one_minus_rho(rho, expected):
  assert selection.pool_size("datarater", 128, rho) == expected
  assert selection.pool_size("none", 128, rho) == 128


@pytest.mark.parametrize("seed", range(5))
def test_datarater_keeps_what_batch_top_k_keeps(seed):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=64).round(1).astype(np.float32)  # with ties
  mask = np.asarray(selection.top_k_mask(scores, 0.75))
  kept = selection.select("datarater", scores, 16, rng)
  np.testing.assert_array_equal(kept, np.flatnonzero(mask))


def test_perplexity_policies_keep_the_lowest_the_middle_and_the_highest():
  nll = np.array([3.0, 9.0, 1.0, 7.0, 5.0, 2.0])
  rng = np.random.default_rng(0)
  assert selection.select("pplx_bottom", nll, 2, rng).tolist() == [2, 5]  # 1, 2
  assert selection.select("pplx_middle", nll, 2, rng).tolist() == [0, 4]  # 3, 5
  assert selection.select("pplx_top", nll, 2, rng).tolist() == [1, 3]  # 9, 7
  assert selection.select("none", nll, 6, rng).tolist() == list(range(6))


def test_random_keeps_each_pair_equally_often_at_any_values():
  rng = np.random.default_rng(0)
  counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
  for _ in range(3000):
    counts[tuple(selection.select("random", np.array([9.0, 0.0, 0.0, 0.0]), 2, rng))] += 1
  assert all(abs(count - 500) < 5 * np.sqrt(500) for count in counts.values()), counts
