"""The score-weighted loss written for reading: dense, float32 (float64 where the inputs are)."""

import jax
import jax.numpy as jnp


def token_nll(hidden, unembedding, targets, vocab_axis=None):
  """[N, D], [V, D], [N] -> nll [N], from the full [N, V] logits."""
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  if vocab_axis is not None:
    unembedding = jax.lax.all_gather(unembedding, vocab_axis, tiled=True)
  logits_NV = hidden.astype(dtype) @ unembedding.astype(dtype).T
  log_probs_NV = jax.nn.log_softmax(logits_NV)
  return -jnp.take_along_axis(log_probs_NV, targets[:, None], axis=1)[:, 0]


def nll_and_grads(hidden, unembedding, targets, weights, vocab_axis=None):
  """Also d(sum_n weights[n] nll[n]) / d hidden [N, D] and / d unembedding [V, D]."""

  def loss(hidden, unembedding):
    nll = token_nll(hidden, unembedding, targets, vocab_axis)
    return jnp.sum(weights * nll), nll

  (d_hidden, d_unembedding), nll = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembedding)
  if vocab_axis is not None:
    shards = jax.lax.axis_size(vocab_axis)  # each computes the whole loss, and shard_map adds up
    d_hidden, d_unembedding = d_hidden / shards, d_unembedding / shards
  return nll, d_hidden, d_unembedding
