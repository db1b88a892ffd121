"""Functions with derivatives of their own that hold at every order, under scan, remat and vmap.

`jax.custom_jvp` forgets its rule where a scan or a remat of it is differentiated in reverse: the
second derivative then looks inside a kernel. A primitive keeps it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir


class Operation(NamedTuple):
  """All take `static`, a hashable that says how, first; arrays and results come in tuples."""

  name: str
  apply: Callable  # (static, arrays) -> results
  # (static, arrays, results, tangents) -> tangents of the results; a tangent of integers is None
  jvp: Callable | None = None
  # (static, first n arrays, cotangents) -> cotangents of the rest, in which `apply` is linear
  transpose: Callable | None = None

  def __call__(self, static: Any, arrays: tuple, n: int = 0) -> tuple:
    return tuple(_operation_p.bind(*arrays, operation=self, static=static, n=n))


def _apply(*arrays, operation, static, n):
  return operation.apply(static, arrays)


def _jvp(arrays, tangents, *, operation, static, n):
  if operation.jvp is None:
    raise NotImplementedError(f"{operation.name} has no forward derivative")
  results = operation(static, arrays, n)
  floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in arrays]
  tangents = tuple(
    ad.instantiate_zeros(t) if is_floating else None
    for t, is_floating in zip(tangents, floating, strict=True)
  )
  return results, operation.jvp(static, arrays, results, tangents)


def _transpose(cotangents, *arrays, operation, static, n):
  if operation.transpose is None or any(map(ad.is_undefined_primal, arrays[:n])):
    raise NotImplementedError(
      f"{operation.name} is for forward over reverse (jax.jvp of jax.grad), not for reverse mode "
      "twice (jax.grad of jax.grad): use the XLA backend"
    )
  cotangents = tuple(map(ad.instantiate_zeros, cotangents))
  return [None] * n + list(operation.transpose(static, arrays[:n], cotangents))


def _batch(arrays, axes, *, operation, static, n):
  size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
  front = lambda x, axis: (
    jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
  )
  results = _over_batch(operation)(static, tuple(map(front, arrays, axes)), n)
  return results, [0] * len(results)


@functools.cache
def _over_batch(operation):
  over = lambda f: (
    f and functools.wraps(f)(lambda static, *trees: jax.vmap(functools.partial(f, static))(*trees))
  )
  return Operation(operation.name, *map(over, operation[1:]))


def _abstract(*arrays, **how):
  results = jax.eval_shape(functools.partial(_apply, **how), *arrays)
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in results]


def _lower(context, *arrays, **how):
  with jax.sharding.use_abstract_mesh(context.avals_in[0].sharding.mesh):  # where it was bound
    return mlir.lower_fun(_apply, multiple_results=True)(context, *arrays, **how)


_operation_p = jax.extend.core.Primitive("operation")
_operation_p.multiple_results = True
_operation_p.def_impl(_apply)
_operation_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_operation_p] = _jvp
ad.primitive_transposes[_operation_p] = _transpose
batching.primitive_batchers[_operation_p] = _batch
mlir.register_lowering(_operation_p, mlir.lower_fun(_apply, multiple_results=True))
