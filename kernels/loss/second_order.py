"""Makes a loss that is differentiable twice, forward over reverse, from a backend's three passes.

A Pallas backend is three functions of arrays, named as in block_math; a zero tangent is None:
  statistics(h, W, y, h', W')                     -> lse, z[y], s, z'[y]  [N]
  gradients(h, W, y, c, lse)                      -> d_h [N, D], d_W [V, D]
  gradient_tangents(h, W, y, c, lse, s, h', W', c') -> d_h', d_W'
`differentiable` makes of them the two functions that `score_weighted_loss` asks of a backend. The
loss and its gradient are whole operations rather than statistics and gradients apart, because their
tangents recompute lse along with s: a Hessian-vector product costs 10 matmul units, not 11.

Under `axis_name` each shard of that mesh axis holds a slice of the vocabulary. The statistics are
combined over it, [N] floats per collective; the passes do not change.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.operation import Operation


def differentiable(backend: str, statistics: Callable, gradients: Callable, tangents: Callable):
  """(token_nll, nll_and_grads), each with a forward-mode rule."""

  def combined(axis_name, h, w, y, dh=None, dw=None):
    """(shard's targets, lse, z[y], s, z'[y]), the statistics over the whole vocabulary."""
    y = shard_targets(y, w, axis_name)
    lse, target, mean, d_target = statistics(h, w, y, dh, dw)
    if axis_name is None:
      return y, lse, target, mean, d_target
    maximum = jax.lax.pmax(lse, axis_name)
    everywhere = maximum + jnp.log(jax.lax.psum(jnp.exp(lse - maximum), axis_name))
    if mean is not None:
      mean = jax.lax.psum(jnp.exp(lse - everywhere) * mean, axis_name)
      d_target = jax.lax.psum(d_target, axis_name)
    return y, everywhere, jax.lax.psum(target, axis_name), mean, d_target

  def nll(axis_name, arrays):
    _, lse, target, *_ = combined(axis_name, *arrays)
    return (lse - target,)

  def nll_jvp(axis_name, arrays, results, tangents_in):
    return nll_tangent_op(axis_name, (*arrays, *tangents_in[:2]))

  def nll_tangent(axis_name, arrays):
    *_, mean, d_target = combined(axis_name, *arrays)
    return (mean - d_target,)

  def grads(axis_name, arrays):
    h, w, y, c = arrays
    y, lse, target, *_ = combined(axis_name, h, w, y)
    return lse - target, *gradients(h, w, y, c, lse)

  def grads_jvp(axis_name, arrays, results, tangents_in):
    (h, w, y, c), (dh, dw, _, dc) = arrays, tangents_in
    if dh is None and dw is None:  # the gradients are linear in the weights
      return None, *grads_op(axis_name, (h, w, y, dc))[1:]
    return grads_tangent_op(axis_name, (h, w, y, c, dh, dw, dc))

  def grads_tangent(axis_name, arrays):
    h, w, y, c, dh, dw, dc = arrays
    y, lse, _, mean, d_target = combined(axis_name, h, w, y, dh, dw)
    return mean - d_target, *tangents(h, w, y, c, lse, mean, dh, dw, dc)

  operation = lambda apply, jvp=None: Operation(f"the {backend} loss", apply, jvp, in_turn=True)
  nll_op, nll_tangent_op = operation(nll, nll_jvp), operation(nll_tangent)
  grads_op, grads_tangent_op = operation(grads, grads_jvp), operation(grads_tangent)

  def token_nll(h, w, y, axis_name=None):
    return nll_op(axis_name, (h, w, y))[0]

  def nll_and_grads(h, w, y, c, axis_name=None):
    return grads_op(axis_name, (h, w, y, c))

  return token_nll, nll_and_grads


def shard_targets(targets, unembedding, axis_name: str | None):
  """Targets counted from this shard's first row; those of other shards fall outside [0, V)."""
  if axis_name is None:
    return targets
  return targets - jax.lax.axis_index(axis_name).astype(targets.dtype) * unembedding.shape[0]
