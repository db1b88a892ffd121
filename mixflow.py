"""MixFlow-MG: the gradient of an inner loop by mixed-mode differentiation (arXiv 2505.00793).

Plain reverse mode would also store the activations of each step's backward pass. The Hessian is
symmetric, so for a cotangent u of g_t = d loss / d theta one forward-mode derivative along u, at
eps = 0,

  d/d eps (d loss/d theta, d loss/d meta)(theta + eps u) = (Hessian u, u^T d^2 loss/d theta d meta)

gives the cotangents that theta_t and meta_t receive through g_t. Only the element-wise optimizer
Theta is differentiated in reverse. We save every g_t and every SEGMENT-th state, and recompute the
states between with Theta. A long loop saves less and repeats its steps chunk by chunk (`plan`).

`inner_loop.unroll` is the loop that this differentiates. Cotangents are flat lists over the
floating-point leaves of a tree.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SEGMENT = 8  # steps between two saved states, at most
STATE = 3  # copies of the parameters in an optimizer state, theta included: Adam's
LONG = 64  # steps; a longer loop keeps no g_t until its backward pass
MODES = ("mixed", "mixed_save", "first_order")  # `inner_loop.unroll` explains them


class Inner(NamedTuple):
  """An inner step and how its derivative is formed."""

  loss_fn: Callable  # (params, meta, batch) -> (loss, aux)
  update: Callable  # Theta: (state, g, meta) -> state; a state is a tuple (params, opt_state)
  mode: str  # a name in MODES


class Plan(NamedTuple):
  """T = first + prod(loops) * length steps."""

  first: int  # steps of the first segment, whose start may be a constant
  loops: tuple[int, ...]  # one in the other; the innermost is over segments
  length: int  # steps of a segment

  def saved(self) -> int:
    """Peak of what is saved, in copies of the parameters: the states between the iterations of each
    loop, and all g_t of the innermost."""
    *outer, segments = self.loops
    return self.first + STATE * sum(outer) + (STATE + self.length) * segments


def unroll(
  inner: Inner, state: Any, metas: Any, batches: Any, truncated: bool, replay: int | None
) -> tuple[Any, Any]:
  """T inner steps in segments, each with a mixed-mode derivative; see `inner_loop.unroll`."""
  x = metas, batches
  p = plan(_length(x), inner.mode, replay)
  saving = inner.mode == "mixed_save"
  segment = partial(_saving_step if saving else _segment, inner)
  state, aux = segment(truncated)(state, jax.tree.map(lambda x: x[: p.first], x))
  if not p.loops[-1]:
    return state, aux
  # mixed_save is unrolled: a loop would copy the saved matmuls into and out of stacked arrays.
  loop = partial(jax.lax.scan, segment(truncated=False), unroll=saving)
  for _ in p.loops[1:]:
    loop = partial(jax.lax.scan, jax.checkpoint(loop, prevent_cse=False))
  shape = (*p.loops, p.length)
  rest = jax.tree.map(lambda x: x[p.first :].reshape(*shape, *x.shape[1:]), x)
  state, later = loop(state, rest)
  join = lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[len(shape) :])])
  return state, jax.tree.map(join, aux, later)


def plan(T: int, mode: str = "mixed", replay: int | None = None) -> Plan:
  """How T steps are differentiated: the plan that saves least and repeats each step `replay` times
  in the backward pass, at most. The memory grows as T^(1 / (1 + replay))."""
  if mode == "mixed_save":
    return Plan(1, (T - 1,), 1)
  first = (T - 1) % SEGMENT + 1
  plans = [Plan(first, ((T - first) // SEGMENT,), SEGMENT)]
  replay = int(T > LONG) if replay is None else replay
  if replay:
    plans += [
      Plan(first, loops, length)
      for first in range(1, min(T, 4 * SEGMENT + 1))
      for length in range(1, SEGMENT + 1)
      if (T - first) % length == 0
      for loops in _factors((T - first) // length, replay + 1)
    ]
  return min(plans, key=Plan.saved)


def _factors(n: int, parts: int) -> list[tuple[int, ...]]:
  """All ways to write n as a product of `parts` factors."""
  if parts == 1:
    return [(n,)]
  divisors = [i for i in range(1, n + 1) if n % i == 0]
  return [(i, *rest) for i in divisors for rest in _factors(n // i, parts - 1)]


def fits_one_segment(mode: str, metas: Any, batches: Any) -> bool:
  return mode != "mixed_save" and _length((metas, batches)) <= SEGMENT


def window_gradient(
  inner: Inner, outer_loss: Callable, state: Any, metas: Any, batches: Any
) -> tuple[jax.Array, Any, Any, Any]:
  """`inner_loop.window_gradient` of at most SEGMENT steps. The final state is recomputed after the
  backward pass, so it takes no memory during it."""
  (end, aux), saved = _forward(inner, state, (metas, batches))
  value, d_params = jax.value_and_grad(outer_loss)(end.params)
  d_opt_state = jax.tree.map(jnp.zeros_like, _floating(end.opt_state))
  _, d_metas = _backward(inner, saved, jax.tree.leaves(d_params) + d_opt_state, truncated=True)
  _, (start, grads) = jax.lax.optimization_barrier(((value, d_metas), saved[:2]))
  end = _recompute(inner, Saved(start, grads, saved.x), _length(batches))
  return value, _cotangent(metas, d_metas), end, aux


# A segment: the forward pass keeps the first state and every g_t, the backward pass recomputes.


class Saved(NamedTuple):
  start: Any  # the state before the first step
  grads: tuple[Any, Any]  # g_0, and g_1, ... with a leading axis
  x: tuple[Any, Any]  # metas, batches [T]


def _segment(inner, truncated):
  """(state, (metas, batches)) -> (state, aux) with a mixed-mode derivative."""
  forward = partial(_forward, inner)
  rule = jax.custom_vjp(lambda state, x: forward(state, x)[0])

  def backward(saved, cotangent):
    of_start, of_metas = _backward(inner, saved, _floating(cotangent[0]), truncated)
    of_start = None if truncated else _cotangent(saved.start, of_start)
    return of_start, (_cotangent(saved.x[0], of_metas), None)

  rule.defvjp(forward, backward)
  return rule


# The first step of a loop is written out: a loop from `start` would copy it.


def _forward(inner, start, x):
  """((state, aux), Saved)."""

  def step(state, x):
    meta, batch = x
    g, aux = jax.grad(inner.loss_fn, has_aux=True)(state.params, meta, batch)
    return inner.update(state, g, meta), (aux, g)

  x_0, later = _first_and_later(x)
  state, (aux_0, g_0) = step(start, x_0)
  state, (aux, grads) = jax.lax.scan(step, state, later)
  return (state, _join(aux_0, aux)), Saved(start, (g_0, grads), x)


def _backward(inner, saved, cotangent, truncated):
  """Takes d/d(state after the steps); returns d/d(state before them) and d/d(metas) [T].

  truncated: the state before them is a constant, so the first step needs no Hessian u."""
  step = lambda cotangent, x: _step_backward(inner, saved, cotangent, *x)
  (g_0, grads), (x_0, later) = saved.grads, _first_and_later(saved.x)
  ts = jnp.arange(1, _length(saved.x))
  cotangent, of_metas = jax.lax.scan(step, cotangent, (ts, grads, later), reverse=True)
  cotangent, of_meta_0 = _step_backward(inner, saved, cotangent, 0, g_0, x_0, truncated)
  return cotangent, _join(of_meta_0, of_metas)


def _step_backward(inner, saved, cotangent, t, g, x, constant_theta=False):
  """Step t: takes d/d(state after it); returns d/d(state before it), d/d(meta)."""
  meta, batch = x
  of_theta = slice(len(jax.tree.leaves(saved.start.params)))  # its part of a state's cotangent

  def recompute(after):
    """(state before step t, g_t); the barrier delays them until `after` is computed."""
    _, (start, grads, g_t) = jax.lax.optimization_barrier((after, (*saved[:2], g)))
    return _recompute(inner, Saved(start, grads, saved.x), t), g_t

  # Memory peaks in the HVP. Only theta_t is live there, as the state is recomputed before it and
  # again after it. The barriers stop XLA from merging the two or keeping the forward pass's states.
  state, g_t = recompute(cotangent[of_theta])
  _, pull_back = jax.vjp(partial(inner.update, state), g_t, meta)
  u, of_meta = pull_back(_cotangent(state, cotangent))
  hessian = inner.mode != "first_order" and not constant_theta
  hessian_u, by_loss = _hessian_vector_product(inner, state.params, meta, batch, u, hessian)
  of_meta = [a + b for a, b in zip(_floating(of_meta), by_loss, strict=True)]
  if constant_theta:
    return None, of_meta
  state, g_t = recompute((hessian_u, by_loss))
  _, pull_back = jax.vjp(lambda state: inner.update(state, g_t, meta), state)
  cotangent = _floating(pull_back(_cotangent(state, cotangent)))
  if hessian:
    cotangent[of_theta] = [a + b for a, b in zip(cotangent[of_theta], hessian_u, strict=True)]
  return cotangent, of_meta


def _recompute(inner, saved, t):
  """The state before step t, by Theta from the first one. t: an int, or traced and at least 1."""
  if isinstance(t, int) and t == 0:
    return saved.start

  def step(state, x):
    i, g, meta = x
    new = inner.update(state, g, meta)
    return jax.tree.map(partial(jnp.where, i < t), new, state), None

  (g_0, grads), (meta_0, metas) = saved.grads, _first_and_later(saved.x[0])
  state = inner.update(saved.start, g_0, meta_0)
  return jax.lax.scan(step, state, (jnp.arange(1, 1 + _length(grads)), grads, metas))[0]


def _hessian_vector_product(inner, params, meta, batch, u, hessian):
  """(Hessian u, u^T d^2 loss / d theta d meta), forward over reverse. Without `hessian`, the first
  is []."""
  gradients = lambda params: _gradients(inner, params, meta, batch, hessian)[0]
  _, (hessian_u, of_meta) = jax.jvp(gradients, (params,), (u,))
  return jax.tree.leaves(hessian_u), of_meta


def _gradients(inner, params, meta, batch, hessian):
  """((d loss / d theta or None, d loss / d meta), (d loss / d theta, aux)). An HVP differentiates
  the first pair; the second is the result of the forward pass."""
  gradient = jax.grad(inner.loss_fn, argnums=(0, 1), has_aux=True, allow_int=True)
  (g, of_meta), aux = gradient(params, meta, batch)
  return (g if hessian else None, _floating(of_meta)), (g, aux)


def _saving_step(inner, truncated):
  """A segment of one step whose matmul results are saved: `mixed_save`."""
  gradient = _saving_gradient(inner, hessian=not truncated)

  def step(state, x):
    meta, batch = jax.tree.map(lambda x: x[0], x)
    g, aux = gradient(state.params, meta, jax.lax.stop_gradient(batch))
    aux = jax.tree.map(lambda a: a[None], jax.lax.stop_gradient(aux))
    return inner.update(state, g, meta), aux

  return step


def _saving_gradient(inner, hessian):
  """d loss / d params; saves its matmul results for its own derivative."""
  rule = jax.custom_vjp(lambda *x: jax.grad(inner.loss_fn, has_aux=True)(*x))

  def forward(params, meta, batch):
    # Element-wise operations are cheaper to repeat than to keep.
    at_params = jax.checkpoint(
      lambda params: _gradients(inner, params, meta, batch, hessian),
      policy=jax.checkpoint_policies.dots_saveable,
      prevent_cse=False,
    )
    _, derivative, outputs = jax.linearize(at_params, params, has_aux=True)
    return outputs, (derivative, meta)

  def backward(residuals, cotangents):
    derivative, meta = residuals
    hessian_u, of_meta = derivative(cotangents[0])  # None for zero without `hessian`
    return hessian_u, _cotangent(meta, of_meta), None

  rule.defvjp(forward, backward)
  return rule


def _is_floating(x):
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _floating(tree):
  """The floating-point leaves."""
  return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _cotangent(tree, floating):
  """The tree's cotangent: zeros of type float0 for the leaves that are not floating-point."""
  floating = iter(floating)
  zero = lambda x: np.zeros(x.shape, jax.dtypes.float0)
  return jax.tree.map(lambda x: next(floating) if _is_floating(x) else zero(x), tree)


def _first_and_later(tree):
  return jax.tree.map(lambda x: x[0], tree), jax.tree.map(lambda x: x[1:], tree)


def _join(first, later):
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


def _length(x):
  """T, the leading axis of every array."""
  lengths = sorted({len(a) for a in jax.tree.leaves(x)})
  if len(lengths) != 1:
    raise ValueError(f"metas and batches have leading axes of {lengths}: all must be T")
  return lengths[0]
