"""The score-weighted loss in plain JAX, a chunk of tokens at a time: no [N, V] array at any order.

  tokens  |-- C --|-- C --|-- C --| pad      scan over chunks: logits [C, V] live for one chunk;
  hidden  [C, D]  ...                        d_unembedding [V, D] is carried in float32

Matmul units (2 N D V FLOPs): value 1, gradient 3, forward-over-reverse 7: the minimum each. In the
last, XLA drops the primal d_hidden and d_unembedding if nobody reads them. Tokens of weight 0 pad N
to whole chunks of even size: less than one chunk of padding.
"""

import jax
import jax.numpy as jnp

from kernels.loss.second_order import shard_targets

CHUNK_ELEMENTS = 2**25  # logits per chunk, at most: 128 MiB in float32


def token_nll(hidden, unembedding, targets, vocab_axis=None):
  """[N, D], [V, D], [N] -> nll [N] float32."""
  table = unembedding.astype(hidden.dtype)
  targets = shard_targets(targets, table, vocab_axis)
  chunk = lambda hidden_CD, targets_C: _logits(hidden_CD, table, targets_C, vocab_axis)[-1]
  (hidden, targets), n = _split((hidden, targets), unembedding.shape[0])
  if len(hidden) == 1:
    return chunk(hidden[0], targets[0])
  nll = jax.lax.map(lambda x: jax.checkpoint(chunk)(*x), (hidden, targets))
  return nll.reshape(-1)[:n]


def nll_and_grads(hidden, unembedding, targets, weights, vocab_axis=None):
  """Also d(sum_n weights[n] nll[n]) / d hidden [N, D] and / d unembedding [V, D].

  Differentiable again, forward (MixFlow-MG) or reverse, still one chunk at a time.
  """
  table = unembedding.astype(hidden.dtype)
  targets = shard_targets(targets, unembedding, vocab_axis)

  def chunk(hidden_CD, targets_C, weights_C):
    logits_CV, is_target_CV, lse_C, nll_C = _logits(hidden_CD, table, targets_C, vocab_axis)
    d_logits_CV = weights_C[:, None] * (jnp.exp(logits_CV - lse_C[:, None]) - is_target_CV)
    d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
    d_hidden_CD = _matmul(d_logits_CV, table).astype(hidden_CD.dtype)
    return nll_C, d_hidden_CD, _matmul(d_logits_CV.T, hidden_CD)

  (hidden, targets, weights), n = _split((hidden, targets, weights), unembedding.shape[0])
  if len(hidden) == 1:
    nll, d_hidden, d_table = chunk(hidden[0], targets[0], weights[0])
    return nll, d_hidden, d_table.astype(unembedding.dtype)

  @jax.checkpoint  # so that a reverse pass over this scan saves no [C, V] array per chunk
  def step(d_table, x):
    nll_C, d_hidden_CD, d_table_of_chunk = chunk(*x)
    return d_table + d_table_of_chunk, (nll_C, d_hidden_CD)

  zero = jnp.zeros(table.shape, jnp.promote_types(table.dtype, jnp.float32))
  d_table, (nll, d_hidden) = jax.lax.scan(step, zero, (hidden, targets, weights))
  d_hidden = d_hidden.reshape(-1, d_hidden.shape[-1])[:n]
  return nll.reshape(-1)[:n], d_hidden, d_table.astype(unembedding.dtype)


def _logits(hidden_CD, table, targets_C, vocab_axis):
  """(logits, which of them are targets, lse, nll).

  The logits are less each token's maximum: exp stays in range, and lse keeps its digits.
  """
  logits_CV = _matmul(hidden_CD, table.T)
  # No derivative: the loss does not depend on a shift of all logits of a token.
  maximum_C = jax.lax.stop_gradient(logits_CV).max(-1)
  if vocab_axis is not None:
    maximum_C = jax.lax.pmax(maximum_C, vocab_axis)
  logits_CV -= maximum_C[:, None]
  column = jax.lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1)
  is_target_CV = targets_C[:, None] == column
  total_C = jnp.sum(jnp.exp(logits_CV), -1)
  target_C = jnp.sum(logits_CV, -1, where=is_target_CV)
  if vocab_axis is not None:
    total_C, target_C = jax.lax.psum((total_C, target_C), vocab_axis)
  lse_C = jnp.log(total_C)
  return logits_CV, is_target_CV, lse_C, lse_C - target_C


def _split(arrays, vocabulary):
  """[N, ...] -> [chunks, C, ...], padded with zeros, and N."""
  n = arrays[0].shape[0]
  chunks = -(-n * vocabulary // CHUNK_ELEMENTS)
  rows = -(-n // chunks)
  chunks = -(-n // rows)  # fewer, if rounding up left chunks of padding only
  if more := chunks * rows - n:
    arrays = [jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in arrays]
  return tuple(x.reshape(chunks, rows, *x.shape[1:]) for x in arrays), n


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
