"""The DataRater phi_eta: a score per sequence, and the weights of a batch (section 2 of the paper).

  phi_eta(x)        `rater(config).score`
  sigma_B(phi(x))   `batch_weights`, softmax over the batch

selection.py decides which sequences to keep. Axes: B sequences, S tokens, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from transformer import Batch, Transformer, TransformerConfig


class Rater(NamedTuple):
  """phi_eta as pure functions."""

  init: Callable[[chex.PRNGKey], Any]  # key -> eta
  score: Callable[[Any, Batch], jax.Array]  # (eta, batch [B, S]) -> scores [B] float32
  head: Callable[[Any], jax.Array]  # eta -> its head [D]; zero before training, so all scores are 0


def rater(config: TransformerConfig) -> Rater:
  """A non-causal transformer, the mean of its last states over real tokens, and a linear head.

  The head starts at zero: meta-training starts from uniform weights, the unweighted baseline."""

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
    head=lambda eta: eta["~"]["score_head"],
  )


def batch_weights(scores: jax.Array) -> jax.Array:
  """sigma_B(phi(x)) = exp(phi(x)) / sum_{x' in B} exp(phi(x')) over the last axis of [..., B].

  The softmax runs over the global batch, also when it is sharded."""
  return jax.nn.softmax(scores, axis=-1)
