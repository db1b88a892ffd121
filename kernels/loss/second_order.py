"""Makes a loss that is differentiable twice, forward over reverse, from a backend's two passes.

A Pallas backend is two functions of a dict x of arrays: h, W, y, c, lse and s (`mean`) of
block_math, and the tangents dh, dW, dc. A zero tangent is absent.
  statistics(h, w, y [, dh, dw])                  -> lse, z[y], s, z'[y]  [N]
  gradients(h, w, y, c, lse)                      -> d_h [N, D], d_W [V, D]
  gradients(h, w, y, c, lse, mean [, dh, dw, dc]) -> d_h', d_W'
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


def differentiable(backend: str, statistics: Callable, gradients: Callable):
  """(token_nll, nll_and_grads), each with a forward-mode rule."""

  def combined(axis_name, x):
    """(nll, or nll' if x has dh or dw; inputs of `gradients`), over the whole vocabulary."""
    x = x | dict(y=shard_targets(x["y"], x["w"], axis_name))
    lse, target, mean, d_target = statistics({k: x[k] for k in x if k not in ("c", "dc")})
    if axis_name is not None:
      maximum = jax.lax.pmax(lse, axis_name)
      everywhere = maximum + jnp.log(jax.lax.psum(jnp.exp(lse - maximum), axis_name))
      if mean is not None:
        mean *= jnp.exp(lse - everywhere)
      target, mean, d_target = jax.lax.psum((target, mean, d_target), axis_name)
      lse = everywhere
    if mean is None:
      return lse - target, x | dict(lse=lse)
    return mean - d_target, x | dict(lse=lse, mean=mean)

  def grads(axis_name, x):
    nll, x = combined(axis_name, x)
    return nll, *gradients(x)

  def grads_jvp(axis_name, x, results, tangents):
    tangents = _named(tangents)
    if tangents.keys() == {"dc"}:  # the gradients are linear in the weights
      return None, *grads_op(axis_name, x | dict(c=tangents["dc"]))[1:]
    return grads_tangent_op(axis_name, x | tangents)

  def nll_jvp(axis_name, x, results, tangents):
    return nll_tangent_op(axis_name, x | _named(tangents))

  operation = lambda apply, jvp=None: Operation(f"the {backend} loss", apply, jvp, in_turn=True)
  nll = lambda axis_name, x: combined(axis_name, x)[:1]
  nll_op, nll_tangent_op = operation(nll, nll_jvp), operation(nll)
  grads_op, grads_tangent_op = operation(grads, grads_jvp), operation(grads)

  def token_nll(h, w, y, axis_name=None):
    return nll_op(axis_name, dict(h=h, w=w, y=y))[0]

  def nll_and_grads(h, w, y, c, axis_name=None):
    return grads_op(axis_name, dict(h=h, w=w, y=y, c=c))

  return token_nll, nll_and_grads


def _named(tangents):
  return {f"d{name}": x for name, x in tangents.items() if x is not None}


def shard_targets(targets, unembedding, axis_name: str | None):
  """Targets counted from this shard's first row; those of other shards fall outside [0, V)."""
  if axis_name is None:
    return targets
  return targets - jax.lax.axis_index(axis_name).astype(targets.dtype) * unembedding.shape[0]
