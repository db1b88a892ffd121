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
  """Each callable takes (static, arrays): a hashable configuration and a tuple of arrays, some of
  which may be None. Results are tuples of arrays.

  Values and tangents are separate calls: JAX drops the values where nobody reads them (an HVP reads
  none), and `jax.linearize` computes them first.
  """

  name: str
  apply: Callable  # (static, arrays) -> results
  # (static, arrays, results, tangents) -> tangents of the results. A zero tangent is None.
  jvp: Callable | None = None
  # (static, first n arrays, cotangents) -> cotangents of the rest, in which `apply` is linear
  transpose: Callable | None = None
  in_turn: bool = False  # under vmap, members run one after another: each fills the device

  def __call__(self, static: Any, arrays: tuple, n: int = 0) -> tuple:
    given = tuple(x is not None for x in arrays)
    present = [x for x in arrays if x is not None]
    # Traced here rather than at lowering: under the caller's mesh and for its device.
    jaxpr = jax.make_jaxpr(lambda *present: self.apply(static, _restore(present, given)))(*present)
    params = dict(jaxpr=jaxpr, operation=self, static=static, given=given, n=n)
    return tuple(_operation_p.bind(*present, **params))


def _restore(present, given):
  """The tuple of arrays, with None where `given` is False."""
  present = iter(present)
  return tuple(next(present) if is_given else None for is_given in given)


def _evaluate(*arrays, jaxpr, **_):
  return jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)


def _jvp(arrays, tangents, **params):
  operation, static, given = (params[key] for key in ("operation", "static", "given"))
  if operation.jvp is None:
    raise NotImplementedError(f"{operation.name} has no forward derivative")
  results = _operation_p.bind(*arrays, **params)
  tangents = [None if isinstance(t, ad.Zero) else t for t in tangents]
  tangents = operation.jvp(static, _restore(arrays, given), results, _restore(tangents, given))
  zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
  return results, [zero(x) if t is None else t for x, t in zip(results, tangents, strict=True)]


def _transpose(cotangents, *arrays, operation, static, given, n, jaxpr):
  arrays = _restore(arrays, given)
  if operation.transpose is None or any(map(ad.is_undefined_primal, arrays[:n])):
    raise NotImplementedError(
      f"{operation.name} is for forward over reverse (jax.jvp of jax.grad), not for reverse mode "
      "twice (jax.grad of jax.grad): use the 'xla' backend"
    )
  cotangents = tuple(map(ad.instantiate_zeros, cotangents))
  return [None] * n + list(operation.transpose(static, arrays[:n], cotangents))


def _batch(arrays, axes, **params):
  operation, static, given = (params[key] for key in ("operation", "static", "given"))
  if operation.in_turn:
    shared = [x if axis is None else None for x, axis in zip(arrays, axes, strict=True)]
    members = [
      None if axis is None else jnp.moveaxis(x, axis, 0)
      for x, axis in zip(arrays, axes, strict=True)
    ]
    pick = lambda own, common: common if own is None else own
    one = lambda member: _operation_p.bind(*map(pick, member, shared), **params)
    results = jax.lax.map(one, members)
  else:
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    front = lambda x, axis: (
      jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
    )
    arrays = _restore(map(front, arrays, axes), given)
    results = _over_batch(operation)(static, arrays, params["n"])
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
