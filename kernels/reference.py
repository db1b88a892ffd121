"""The score-weighted loss written for reading: dense, float32 (float64 where the inputs are)."""

import jax
import jax.numpy as jnp


def token_nll(hidden, unembedding, targets):
  """[N, D], [V, D], [N] -> nll [N], by way of the full [N, V] logits."""
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  logits_NV = hidden.astype(dtype) @ unembedding.astype(dtype).T
  log_probs_NV = jax.nn.log_softmax(logits_NV)
  return -jnp.take_along_axis(log_probs_NV, targets[:, None], axis=1)[:, 0]


def nll_and_grads(hidden, unembedding, targets, weights):
  """Also d(sum_n weights[n] nll[n]) / d hidden [N, D] and / d unembedding [V, D]."""

  def loss(hidden, unembedding):
    nll = token_nll(hidden, unembedding, targets)
    return jnp.sum(weights * nll), nll

  (d_hidden, d_unembedding), nll = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembedding)
  return nll, d_hidden, d_unembedding
