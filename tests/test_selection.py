"""Policies against brute force; the compute fraction against the paper's printed bars."""

import itertools

import numpy as np
import pytest

import datarater
import selection


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
  mask = np.asarray(datarater.top_k_mask(scores, 0.75))
  kept = selection.select("datarater", scores, 16, rng)
  np.testing.assert_array_equal(kept, np.flatnonzero(mask))


def test_perplexity_policies_keep_the_lowest_the_middle_and_the_highest():
  nll = np.array([3.0, 9.0, 1.0, 7.0, 5.0, 2.0])
  rng = np.random.default_rng(0)
  assert selection.select("pplx_bottom", nll, 2, rng).tolist() == [2, 5]  # 1, 2
  assert selection.select("pplx_middle", nll, 2, rng).tolist() == [0, 4]  # 3, 5
  assert selection.select("pplx_top", nll, 2, rng).tolist() == [1, 3]  # 9, 7
  assert selection.select("none", nll, 6, rng).tolist() == list(range(6))


def test_random_keeps_each_pair_equally_often_whatever_the_values():
  rng = np.random.default_rng(0)
  counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
  for _ in range(3000):
    counts[tuple(selection.select("random", np.array([9.0, 0.0, 0.0, 0.0]), 2, rng))] += 1
  assert all(abs(count - 500) < 5 * np.sqrt(500) for count in counts.values()), counts


@pytest.mark.parametrize(
  "rho, steps_needed, net_gain",  # of 48k steps of a 1B model, rater 50M: the paper's Figs. 1 and 5
  [
    (0.75, 32.6, 27.6),
    (0.75, 30.1, 33.2),
    (0.75, 24.0, 46.6),
    (0.5, 36.0, 22.4),
    (0.5, 39.5, 14.9),
    (0.5, 28.0, 39.7),
    (0.1, 44.0, 6.6),
    (0.1, 41.5, 11.9),
  ],
)
def test_the_paper_s_printed_bars(rho, steps_needed, net_gain):
  steps = np.arange(1, 49) * 1000.0
  curve = 10 - steps / 1000  # crosses the baseline's final value at the steps that the paper needed
  overhead = selection.rating_overhead(50_000_000, 1_000_000_000, rho)
  fraction = selection.compute_fraction(steps, curve, 48_000, 10 - steps_needed, overhead)
  assert 100 * (1 - fraction) == pytest.approx(net_gain, abs=0.15)


def test_rating_costs_what_the_paper_s_figures_imply():
  overheads = [selection.rating_overhead(50, 1000, rho) for rho in (0.75, 0.5, 0.1)]
  assert overheads == pytest.approx([0.0667, 0.0333, 0.0185], abs=1e-4)


def test_the_compute_fraction_interpolates_and_is_none_where_never_reached():
  steps, values = [10, 20, 30, 40], [4.0, 3.0, 2.0, 2.5]
  assert selection.compute_fraction(steps, values, 40, 2.5) == pytest.approx(25 / 40)
  assert selection.compute_fraction(steps, values, 40, 2.5, 0.1) == pytest.approx(1.1 * 25 / 40)
  assert selection.compute_fraction(steps, values, 40, 4.5) == pytest.approx(10 / 40)
  assert selection.compute_fraction(steps, values, 40, 1.9) is None
  assert selection.compute_fraction(
    steps, [-v for v in values], 40, -2.5, 0, True
  ) == pytest.approx(25 / 40)
