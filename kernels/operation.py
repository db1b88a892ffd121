"""Functions whose own derivative rules hold at second order, under scan, remat and vmap.

`jax.custom_jvp` loses its rule where a scan or a remat is differentiated in reverse: the second
derivative then looks inside the kernel. A primitive keeps it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir


class Operation(NamedTuple):
  """Each callable takes (static, arrays): a hashable configuration and a tree of arrays. Results
  are tuples of arrays.

  Values and tangents are separate calls: JAX drops the values where nobody reads them (an HVP reads
  none), and `jax.linearize` computes them first.
  """

  name: str
  apply: Callable  # (static, arrays) -> results
  # (static, arrays, results, tangents) -> tangents of the results. A zero tangent is None.
  jvp: Callable | None = None
  # (static, x, cotangents) -> cotangents of t: arrays are a pair (x, t), and `apply` is linear in t
  transpose: Callable | None = None
  in_turn: bool = False  # under vmap, members run one after another: each fills the device

  def __call__(self, static: Any, arrays: Any) -> tuple:
    leaves, tree = jax.tree.flatten(arrays)
    # Traced here rather than at lowering: under the caller's mesh and for its device.
    apply = lambda *leaves: self.apply(static, tree.unflatten(leaves))
    jaxpr = jax.make_jaxpr(apply)(*leaves)
    return tuple(_operation_p.bind(*leaves, jaxpr=jaxpr, operation=self, static=static, tree=tree))


def _evaluate(*arrays, jaxpr, **_):
  return jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)


def _jvp(arrays, tangents, **params):
  operation, static, tree = (params[key] for key in ("operation", "static", "tree"))
  if operation.jvp is None:
    raise NotImplementedError(f"{operation.name} has no forward derivative")
  results = _operation_p.bind(*arrays, **params)
  tangents = tree.unflatten([None if isinstance(t, ad.Zero) else t for t in tangents])
  tangents = operation.jvp(static, tree.unflatten(arrays), results, tangents)
  zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
  return results, [zero(x) if t is None else t for x, t in zip(results, tangents, strict=True)]


def _transpose(cotangents, *arrays, operation, static, tree, jaxpr):
  x = tree.unflatten(arrays)[0] if operation.transpose else arrays
  leaves = jax.tree.leaves(x, is_leaf=ad.is_undefined_primal)
  if operation.transpose is None or any(map(ad.is_undefined_primal, leaves)):
    raise NotImplementedError(
      f"{operation.name} is for forward over reverse (jax.jvp of jax.grad), not for reverse mode "
      "twice (jax.grad of jax.grad): use the 'xla' backend"
    )
  cotangents = tuple(map(ad.instantiate_zeros, cotangents))
  return [None] * len(leaves) + jax.tree.leaves(operation.transpose(static, x, cotangents))


def _batch(arrays, axes, **params):
  operation, static, tree = (params[key] for key in ("operation", "static", "tree"))
  pairs = list(zip(arrays, axes, strict=True))
  mapped = [None if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]
  if operation.in_turn:
    pick = lambda own, shared: shared if own is None else own
    one = lambda member: _operation_p.bind(*map(pick, member, arrays), **params)
    results = jax.lax.map(one, mapped)
  else:
    size = next(len(x) for x in mapped if x is not None)
    copy = lambda own, x: jnp.broadcast_to(x, (size, *x.shape)) if own is None else own
    results = _over_batch(operation)(static, tree.unflatten(map(copy, mapped, arrays)))
  return results, [0] * len(results)


@functools.cache
def _over_batch(operation):
  over = lambda f: f and (lambda static, *trees: jax.vmap(functools.partial(f, static))(*trees))
  rules = map(over, (operation.apply, operation.jvp, operation.transpose))
  return Operation(operation.name, *rules)


_operation_p = jax.extend.core.Primitive("operation")
_operation_p.multiple_results = True
_operation_p.def_impl(_evaluate)
_operation_p.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))
ad.primitive_jvps[_operation_p] = _jvp
ad.primitive_transposes[_operation_p] = _transpose
batching.primitive_batchers[_operation_p] = _batch
mlir.register_lowering(_operation_p, mlir.lower_fun(_evaluate, multiple_results=True))
