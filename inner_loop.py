"""The inner loop of Algorithm 1: T optimizer updates of one model, differentiable.

  theta_{t+1}, s_{t+1} = Theta(theta_t, s_t, g_t),  g_t = d loss(theta_t, meta_t, batch_t) / d theta

Nothing here knows of language models or raters: any loss, any optax optimizer, any pytree `meta`.
`unroll` is the loop; mixflow.py computes its gradient in little memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

import mixflow

LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (params, meta, batch) -> (loss, aux)

MODES = (*mixflow.MODES, "reverse")


class InnerState(NamedTuple):
  params: Any  # theta
  opt_state: Any  # s


def init(optimizer: optax.GradientTransformation, params: Any) -> InnerState:
  return InnerState(params, optimizer.init(params))


def unroll(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  state: InnerState,
  metas: Any,
  batches: Any,
  mode: str = "mixed",
  truncated: bool = False,
  replay: int | None = None,
) -> tuple[InnerState, Any]:
  """UpdateInnerModel of Algorithm 1: T inner updates; returns (state, aux).

  Args:
    loss_fn: (params, meta, batch) -> (scalar, aux). Everything differentiated must be an argument
      of the loss and of the optimizer, never a closure.
    optimizer: any of optax. One that takes extra arguments gets the step's slice of `metas` as
      `meta`, so that a learning rate can be learned.
    state: theta_0 and the optimizer state.
    metas: pytree with a leading axis T, one slice per step (None: no meta-input).
    batches: pytree with a leading axis T.
    mode: how the gradient is computed; the result is the same in every mode.
      "mixed": MixFlow-MG. Saves every g_t and every eighth state. A step's Hessian-vector product
        costs about 8 forward passes (9 in attention), of which 2 (3) recompute activations. The
        element-wise optimizer runs 2 min(T, 8) more times per step, to recompute states.
      "mixed_save": MixFlow-MG that also saves each step's matmul results: 6 forward passes, at the
        memory of T steps' activations. Faster on CPUs. Unrolled, so compile time grows with T.
      "first_order": ablation without the Hessian: g_t is treated as independent of theta_t.
      "reverse": plain autodiff of this loop, the yardstick.
    truncated: `state` is the constant start of a truncated window, and gradients reach `metas`
      only. The first step then needs no Hessian-vector product: a third less cost at T = 2.
    replay: how often "mixed" and "first_order" repeat a step's gradient in the backward pass,
      instead of saving it. 0 saves every g_t: memory grows as T. 1 saves states about every
      sqrt(T) steps: memory grows as sqrt(T), for one more gradient per step (about a fifth of the
      work). 2: as the cube root. None: 0 up to T = 64, then 1.

  Gradients reach `state` and the floating-point leaves of `metas`. In every mode, `batches` and
  `aux` (leading axis T) get no gradient.

  Raises:
    ValueError: an unknown mode, or leading axes of `metas` and `batches` that differ.
  """
  if mode not in MODES:
    raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
  if truncated:
    state = jax.lax.stop_gradient(state)
  if mode != "reverse":
    inner = mixflow.Inner(loss_fn, partial(update, optimizer), mode)
    return mixflow.unroll(inner, state, metas, batches, truncated, replay)

  def step(state, x):
    meta, batch = x
    g, aux = jax.grad(loss_fn, has_aux=True)(state.params, meta, jax.lax.stop_gradient(batch))
    return update(optimizer, state, g, meta), jax.lax.stop_gradient(aux)

  return jax.lax.scan(step, state, (metas, batches))


def update(
  optimizer: optax.GradientTransformation, state: InnerState, g: Any, meta: Any = None
) -> InnerState:
  """Theta: one optimizer update with the gradient g."""
  optimizer = optax.with_extra_args_support(optimizer)
  updates, opt_state = optimizer.update(g, state.opt_state, state.params, meta=meta)
  return InnerState(optax.apply_updates(state.params, updates), opt_state)


def window_gradient(
  outer_loss: Callable[[Any], jax.Array],
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  state: InnerState,
  metas: Any,
  batches: Any,
  mode: str = "mixed",
) -> tuple[jax.Array, Any, InnerState, Any]:
  """Value and gradient of outer_loss(theta_T) with respect to the metas of a truncated window.

  Returns (value, d value / d metas, the state after T updates, aux).
  """
  if mode in mixflow.MODES and mixflow.fits_one_segment(mode, metas, batches):  # of at most 8 steps
    inner = mixflow.Inner(loss_fn, partial(update, optimizer), mode)
    return mixflow.window_gradient(inner, outer_loss, state, metas, batches)

  def objective(metas):
    end, aux = unroll(loss_fn, optimizer, state, metas, batches, mode, truncated=True)
    return outer_loss(end.params), (end, aux)

  gradient = jax.value_and_grad(objective, has_aux=True, allow_int=True)
  (value, (end, aux)), d_metas = gradient(metas)
  return value, d_metas, end, aux
