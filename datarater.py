"""The DataRater phi_eta: a score per sequence, and what is made of scores.

  phi_eta(x)                 `rater(config).score`            section 2 of the paper
  sigma_B(phi(x))            `batch_weights`                  softmax over the whole batch
  keep the best of a batch   `top_k_mask`                     batch-level filtering
  P_accept(x)                `acceptance_probability`         its point-wise equivalent

Axes: B sequences, S tokens, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from transformer import Batch, Transformer, TransformerConfig


class Rater(NamedTuple):
  """phi_eta as two pure functions."""

  init: Callable[[chex.PRNGKey], Any]  # key -> eta
  score: Callable[[Any, Batch], jax.Array]  # (eta, batch [B, S]) -> scores [B] float32


def rater(config: TransformerConfig) -> Rater:
  """A non-causal transformer, the mean of its states over the tokens that are not padding, and a
  linear head that starts at zero: meta-training starts from uniform weights, the plain baseline."""

  def forward(tokens, segments):
    hidden_BSD, _ = Transformer(config, causal=False)(tokens, segments)
    hidden_BSD = hidden_BSD.astype(jnp.promote_types(hidden_BSD.dtype, jnp.float32))
    counted_BS = segments > 0
    total_BD = jnp.sum(hidden_BSD, axis=1, where=counted_BS[:, :, None])
    mean_BD = total_BD / jnp.maximum(counted_BS.sum(-1), 1)[:, None]
    return mean_BD @ hk.get_parameter("score_head", [config.d_model], init=jnp.zeros)

  transformed = hk.without_apply_rng(hk.transform(forward))
  return Rater(
    init=lambda key: transformed.init(key, *[jnp.ones((1, 2), jnp.int32)] * 2),
    score=lambda eta, batch: transformed.apply(eta, *batch),
  )


def batch_weights(scores: jax.Array) -> jax.Array:
  """sigma_B(phi(x)) = exp(phi(x)) / sum_{x' in B} exp(phi(x')) over the last axis of [..., B].

  B is the whole batch of an inner update, wherever its shards are."""
  return jax.nn.softmax(scores, axis=-1)


def top_k_mask(scores: jax.Array, discard: float) -> jax.Array:
  """True for the best K = round((1 - discard) * B) of scores [..., B]; ties go to the earlier.

  Raises:
    ValueError: unless 0 <= discard < 1 and K >= 1.
  """
  batch = scores.shape[-1]
  keep = round((1 - discard) * batch)
  if not 0 <= discard < 1 or keep < 1:
    raise ValueError(
      f"discard={discard} of a batch of {batch} keeps {keep} sequences; "
      "it must be in [0, 1) and keep at least one"
    )
  rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
  return rank < keep


def acceptance_probability(
  p: jax.typing.ArrayLike, batch_size: jax.typing.ArrayLike, keep: jax.typing.ArrayLike
) -> jax.Array:
  """Probability that batch-level top-K keeps a sequence whose score has the quantile p = F(phi(x)):

    P_accept = sum_{s=0}^{K-1} C(B-1, s) (1-p)^s p^(B-1-s) = I_p(B - K, K),

  at most K - 1 of the other B - 1 beat it: a regularised incomplete beta function.

  Args:
    p: quantiles in [0, 1], any shape; batch_size: B, the oversampled batch, at most 2^20;
    keep: K, 1 <= K <= B. All broadcast, all may be traced.

  Returns: float32 (float64 for float64 p), within 1e-5 (1e-10) of the exact value. Both
  textbook routes fail at B = 10^6: lgamma cancels, and the continued fraction needs ~sqrt(B) terms.
  Here the density t^(B-K-1) (1-t)^(K-1), centred on its mode so that nothing cancels, is integrated
  by Gauss-Legendre over the few standard deviations that matter, and divided by its own integral.
  """
  p = jnp.asarray(p)
  p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
  B, K = jnp.asarray(batch_size, jnp.int32), jnp.asarray(keep, jnp.int32)
  p, B, K = jnp.broadcast_arrays(p, B, K)
  a, b = B - K - 1, K - 1  # exponents of t and of 1 - t; a = -1 where everything is kept
  n = jnp.maximum(a + b, 1)
  # The mode a / n as a short binary fraction plus a small rest: t - mode is then exact in float32.
  coarse = jnp.maximum(a, 0) * 2048 // n
  mode_high = coarse.astype(p.dtype) / 2048
  mode_low = (jnp.maximum(a, 0) * 2048 - coarse * n).astype(p.dtype) / (2048 * n.astype(p.dtype))
  a, b, n = (jnp.maximum(x, 0).astype(p.dtype) for x in (a, b, n))
  mode, rest = a / n, jnp.where(a + b == 0, 1, b / n)  # rest = 1 - mode
  width = 9 * jnp.sqrt((a + 1) * (b + 1) / (n + 2) ** 3) + 40 / (n + 2)

  nodes, node_weights = np.polynomial.legendre.leggauss(96)

  def integral(low, high):
    """Of the density, divided by its maximum, over [mode + low, mode + high]."""
    half = (high - low) / 2
    t = (low + half)[..., None] + half[..., None] * nodes.astype(p.dtype)  # offsets from the mode
    exponent = a[..., None] * _log1p_minus(t / jnp.maximum(mode, 1e-30)[..., None])
    exponent += b[..., None] * _log1p_minus(-t / jnp.maximum(rest, 1e-30)[..., None])
    slope = jnp.where(a == 0, -b, 0) + jnp.where(b == 0, a, 0)  # at a mode on the edge
    exponent += slope[..., None] * t
    return half * jnp.sum(jnp.exp(exponent) * node_weights.astype(p.dtype), -1)

  offset = (p - mode_high) - mode_low
  lowest, highest = -mode, rest
  below = integral(jnp.maximum(offset - width, lowest), offset)
  above = integral(offset, jnp.minimum(offset + width, highest))
  whole = integral(jnp.maximum(-width, lowest), jnp.zeros_like(p))
  whole += integral(jnp.zeros_like(p), jnp.minimum(width, highest))
  accept = jnp.where(offset < 0, below / whole, 1 - above / whole)
  return jnp.where(K >= B, 1.0, jnp.clip(accept, 0, 1))


def _log1p_minus(x):
  """log(1 + x) - x without cancellation: for small x, 2 atanh(x / (2 + x)) as a series."""
  r = jnp.where(jnp.abs(x) < 0.5, x, 0) / (2 + jnp.where(jnp.abs(x) < 0.5, x, 0))
  r2 = r * r
  series = jnp.polyval(jnp.array([1 / (2 * k + 1) for k in range(14, 0, -1)] + [0.0], x.dtype), r2)
  direct = jnp.maximum(jnp.log1p(jnp.maximum(x, -1)) - x, -1e30)  # finite, for 0 times it
  return jnp.where(jnp.abs(x) < 0.5, r * (2 * series - x), direct)
