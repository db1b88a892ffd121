"""From a backend's three passes to a loss that is differentiable twice, forward over reverse.

A Pallas backend is three functions of arrays (None for a tangent that is zero):
  statistics(h, W, y, h', W')                     -> lse, z[y], s, z'[y]  [N]: block_math's names
  gradients(h, W, y, c, lse)                      -> d_h [N, D], d_W [V, D]
  gradient_tangents(h, W, y, c, lse, s, h', W', c') -> d_h', d_W'
`differentiable` makes of them what `score_weighted_loss` asks of a backend. Its tangent rules call
kernels, and autodiff never looks inside one. The values stand in calls of their own: JAX drops
those that nobody reads (in a Hessian-vector product, all), and `jax.linearize` can run them first.

Under `axis_name` each shard of that mesh axis holds a slice of the vocabulary: the statistics are
combined over it, [N] floats a collective, and the passes stay as they are.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir


def differentiable(backend: str, statistics: Callable, gradients: Callable, tangents: Callable):
  """(token_nll, nll_and_grads), each with a forward-mode rule."""
  statistics, gradients, tangents = map(_in_turn, (statistics, gradients, tangents))

  def combined(h, w, y, axis_name, dh=None, dw=None):
    lse, target, mean, d_target = statistics(h, w, y, dh, dw)
    if axis_name is None:
      return lse, target, mean, d_target
    maximum = jax.lax.pmax(lse, axis_name)
    everywhere = maximum + jnp.log(jax.lax.psum(jnp.exp(lse - maximum), axis_name))
    if mean is not None:
      mean = jax.lax.psum(jnp.exp(lse - everywhere) * mean, axis_name)
      d_target = jax.lax.psum(d_target, axis_name)
    return everywhere, jax.lax.psum(target, axis_name), mean, d_target

  @partial(jax.custom_jvp, nondiff_argnums=(3,))
  def token_nll(h, w, y, axis_name=None):
    lse, target, *_ = combined(h, w, shard_targets(y, w, axis_name), axis_name)
    return lse - target

  @partial(token_nll.defjvp, symbolic_zeros=True)
  def _(axis_name, primals, tangents_in):
    h, w, y = primals
    dh, dw = _present(tangents_in[0], h), _present(tangents_in[1], w)
    nll = token_nll(h, w, y, axis_name)
    if dh is None and dw is None:
      return nll, jnp.zeros_like(nll)
    _, _, mean, d_target = combined(h, w, shard_targets(y, w, axis_name), axis_name, dh, dw)
    return nll, _forward_only(mean - d_target, backend)

  @partial(jax.custom_jvp, nondiff_argnums=(4,))
  def nll_and_grads(h, w, y, c, axis_name=None):
    y = shard_targets(y, w, axis_name)
    lse, target, *_ = combined(h, w, y, axis_name)
    return lse - target, *gradients(h, w, y, c, lse)

  @partial(nll_and_grads.defjvp, symbolic_zeros=True)
  def _(axis_name, primals, tangents_in):
    h, w, y, c = primals
    dh, dw, _, dc = tangents_in
    dh, dw, dc = _present(dh, h), _present(dw, w), _present(dc, c)
    nll, *grads = nll_and_grads(h, w, y, c, axis_name)
    y = shard_targets(y, w, axis_name)
    lse, _, mean, d_target = combined(h, w, y, axis_name, dh, dw)
    if mean is not None:
      d_nll, d_grads = mean - d_target, tangents(h, w, y, c, lse, mean, dh, dw, dc)
    else:  # the gradients are linear in the weights
      d_nll = jnp.zeros_like(nll)
      d_grads = jax.tree.map(jnp.zeros_like, grads) if dc is None else gradients(h, w, y, dc, lse)
    return (nll, *grads), tuple(_forward_only(t, backend) for t in (d_nll, *d_grads))

  return token_nll, nll_and_grads


def shard_targets(targets, unembedding, axis_name: str | None):
  """Targets counted from this shard's first row; those of other shards fall outside [0, V)."""
  if axis_name is None:
    return targets
  return targets - jax.lax.axis_index(axis_name).astype(targets.dtype) * unembedding.shape[0]


def _in_turn(call):
  """Under vmap, members take turns: one fills the device, and kernels need no batch axis."""

  def with_none(*arrays):
    given = [i for i, x in enumerate(arrays) if x is not None]

    def without_none(*values):
      values = dict(zip(given, values, strict=True))
      return call(*(values.get(i) for i in range(len(arrays))))

    return sequential_vmap(without_none)(*(arrays[i] for i in given))

  return with_none


def _present(tangent, primal):
  """None where nothing is perturbed."""
  return None if isinstance(tangent, SymbolicZero) else tangent.astype(primal.dtype)


def _forward_only(x, backend):
  """The identity, but a transposition (reverse mode through the tangent rule) says what to do."""
  return _forward_only_p.bind(x, backend=backend)


def _raise(_, x, *, backend):
  raise NotImplementedError(
    f"the {backend} loss is differentiable forward over reverse (jax.jvp of jax.grad), not in "
    "reverse mode twice; use backend='xla' or 'reference' for jax.grad of jax.grad"
  )


_forward_only_p = jax.extend.core.Primitive("forward_only")
_forward_only_p.def_impl(lambda x, *, backend: x)
_forward_only_p.def_abstract_eval(lambda x, *, backend: x)
ad.deflinear2(_forward_only_p, _raise)
batching.defvectorized(_forward_only_p)
mlir.register_lowering(_forward_only_p, lambda context, x, *, backend: [x])
