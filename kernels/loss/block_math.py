"""The loss on one block of tokens and one block of the vocabulary, in plain jnp.

The Pallas kernels call these functions on tiles in fast memory. The logits are z = h W^T, p is
softmax(z), `hit` the one-hot target y, c the weights, and ' marks a tangent:

  nll  = logsumexp(z) - z[y]      nll' = s - z'[y],  s = sum_v p z',  z' = h' W^T + h W'^T
  q    = c (p - hit)              d_h  = q W,           d_W  = q^T h
  q'   = c p (z' - s) + c' (p - hit)      d_h' = q' W + q W',   d_W' = q'^T h + q^T h'

A zero tangent is None and costs nothing. Axes: N tokens, D model width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.device import dot, matmul_tangent


class Statistics(NamedTuple):
  """Running sums over the vocabulary; float32 [N, 1] each (or [N], for `merge` alone)."""

  maximum: jax.Array  # of the logits so far
  total: jax.Array  # sum exp(z - maximum)
  target: jax.Array  # z[y]
  weighted: jax.Array | None  # sum exp(z - maximum) z'; None without tangents
  d_target: jax.Array | None  # z'[y]


def empty(n: int, tangents: bool) -> Statistics:
  zero = jnp.zeros((n, 1), jnp.float32)
  return Statistics(zero - jnp.inf, zero, zero, *((zero, zero) if tangents else (None, None)))


def fold(stats: Statistics, z_NV, dz_NV, hit_NV, valid_NV) -> Statistics:
  """Adds a block. Columns past the vocabulary's end are not `valid` and may hold anything."""
  z_NV = jnp.where(valid_NV, z_NV, -jnp.inf)
  hit_NV = hit_NV & valid_NV  # another vocabulary shard's target may lie past this shard's end
  maximum = jnp.maximum(stats.maximum, jnp.max(z_NV, 1, keepdims=True))
  decay = jnp.exp(stats.maximum - maximum)
  e_NV = jnp.exp(z_NV - maximum)
  total = stats.total * decay + jnp.sum(e_NV, 1, keepdims=True)
  target = stats.target + _sum_where(hit_NV, z_NV)
  if dz_NV is None:
    return Statistics(maximum, total, target, None, None)
  weighted = stats.weighted * decay + _sum_where(valid_NV, e_NV * dz_NV)
  return Statistics(maximum, total, target, weighted, stats.d_target + _sum_where(hit_NV, dz_NV))


def merge(parts: Statistics) -> Statistics:
  """The statistics of all blocks together, from one entry per block on the first axis."""
  maximum = jnp.max(parts.maximum, 0)
  share = jnp.exp(parts.maximum - maximum)
  scale = lambda x: jnp.sum(share * x, 0)
  total, weighted = jax.tree.map(scale, (parts.total, parts.weighted))
  target, d_target = jax.tree.map(lambda x: jnp.sum(x, 0), (parts.target, parts.d_target))
  return Statistics(maximum, total, target, weighted, d_target)


def finish(stats: Statistics):
  """(lse, z[y], s, z'[y]), the last two None without tangents."""
  mean = None if stats.weighted is None else stats.weighted / stats.total
  return stats.maximum + jnp.log(stats.total), stats.target, mean, stats.d_target


def logit_cotangents(z_NV, dz_NV, columns: dict[str, jax.Array], hit_NV, valid_NV):
  """(q, q') [N, V], 0 where not `valid`; (q, q) without tangents.

  The columns [N, 1] are lse and c; with tangents also s ("mean") and, unless zero, c' ("dc").
  """
  c_N1 = columns["c"]
  p_NV = jnp.exp(z_NV - columns["lse"])
  error_NV = p_NV - hit_NV.astype(p_NV.dtype)
  q_NV = jnp.where(valid_NV, c_N1 * error_NV, 0)
  if dz_NV is None:
    return q_NV, q_NV
  dq_NV = c_N1 * p_NV * (dz_NV - columns["mean"])
  if "dc" in columns:
    dq_NV += columns["dc"] * error_NV
  return q_NV, jnp.where(valid_NV, dq_NV, 0)


def logits(h_ND, w_VD, dh_ND, dw_VD):
  """(z, z'); z' is None without tangents."""
  return dot(h_ND, w_VD, (1, 1)), matmul_tangent(h_ND, dh_ND, w_VD, dw_VD, (1, 1))


def _sum_where(condition, x):
  return jnp.sum(jnp.where(condition, x, 0), 1, keepdims=True)
