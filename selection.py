"""Which sequences a language model trains on: the policies that the paper compares, and their cost.

For a batch of N and a discard fraction rho each policy but `none` draws a pool of N / (1 - rho)
sequences and keeps N of them (batch-level top-K, section 1.6 of the paper):

  none         the pool is the batch
  random       any N
  datarater    the N with the highest scores phi_eta
  pplx_bottom, pplx_middle, pplx_top
               the N with the lowest, the middle, the highest perplexity under a scorer LM

Axes: M sequences of a pool.
"""

from collections.abc import Sequence

import numpy as np

PERPLEXITY = ("pplx_bottom", "pplx_middle", "pplx_top")
POLICIES = ("none", "random", "datarater", *PERPLEXITY)


def pool_size(policy: str, batch: int, discard: float) -> int:
  """M = N / (1 - rho), rounded."""
  return batch if policy == "none" else max(batch, round(batch / (1 - discard)))


def select(policy: str, values_M: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
  """Indices [keep] of the kept members of a pool, in the pool's order.

  Args:
    values_M: scores for `datarater`, mean NLL for the perplexity policies; else only its length is
      read. Ties go to the earlier.
  """
  M = len(values_M)
  if policy in ("none", "random"):
    order, first = rng.permutation(M) if policy == "random" else np.arange(M), 0
  else:
    order = np.argsort(
      -values_M if policy in ("datarater", "pplx_top") else values_M, kind="stable"
    )
    first = (M - keep) // 2 if policy == "pplx_middle" else 0
  return np.sort(order[first : first + keep])


def compute_fraction(
  steps: Sequence[float],
  values: Sequence[float],
  baseline_steps: float,
  baseline_final: float,
  overhead: float = 0.0,
  higher_is_better: bool = False,
) -> float | None:
  """The share of the baseline's compute that matches its final value (the paper's Fig. 1):

    s * (1 + overhead), s = steps at which the curve first reaches `baseline_final` / its steps,

  linear between evaluations. None where the curve never reaches it.
  """
  sign = -1 if higher_is_better else 1
  gaps = [sign * (value - baseline_final) for value in values]
  for i, gap in enumerate(gaps):
    if gap <= 0:
      reached = steps[i]
      if i > 0:
        reached -= (steps[i] - steps[i - 1]) * gap / (gap - gaps[i - 1])
      return reached / baseline_steps * (1 + overhead)
  return None


def rating_overhead(scorer_parameters: int, lm_parameters: int, discard: float) -> float:
  """FLOPs of rating the oversampled batch over those of a training step on what is kept:
  2 N_rater / (1 - rho) a kept token over 6 N_lm."""
  return 2 * scorer_parameters / (1 - discard) / (6 * lm_parameters)
