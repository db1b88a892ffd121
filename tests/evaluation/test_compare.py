"""compare.py: the compute fraction against the bars printed in the paper."""

import numpy as np
import pytest

from evaluation import compare, plan


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
  curve = 10 - steps / 1000  # crosses the baseline's final value at the paper's number of steps
  overhead = plan.rating_overhead(50_000_000, 1_000_000_000, rho)
  fraction = compare.compute_fraction(steps, curve, 48_000, 10 - steps_needed, overhead)
  assert 100 * (1 - fraction) == pytest.approx(net_gain, abs=0.15)


def test_rating_costs_what_the_paper_s_figures_imply():
  overheads = [plan.rating_overhead(50, 1000, rho) for rho in (0.75, 0.5, 0.1)]
  assert overheads == pytest.approx([0.0667, 0.0333, 0.0185], abs=1e-4)


def test_the_compute_fraction_interpolates_and_is_none_where_never_reached():
  steps, values = [10, 20, 30, 40], [4.0, 3.0, 2.0, 2.5]
  assert compare.compute_fraction(steps, values, 40, 2.5) == pytest.approx(25 / 40)
  assert compare.compute_fraction(steps, values, 40, 2.5, 0.1) == pytest.approx(1.1 * 25 / 40)
  assert compare.compute_fraction(steps, values, 40, 4.5) == pytest.approx(10 / 40)
  assert compare.compute_fraction(steps, values, 40, 1.9) is None
  assert compare.compute_fraction(steps, [-v for v in values], 40, -2.5, 0, True) == pytest.approx(
    25 / 40
  )
