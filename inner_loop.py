"""The differentiable inner loop: T optimiser updates, with MixFlow-MG meta-gradients.

  theta_{t+1}, s_{t+1} = Theta(theta_t, s_t, g_t),  g_t = d loss(theta_t, meta_t, batch_t)/d theta

Nothing here knows of language models or raters: any loss, any optax optimiser, any pytree `meta`.

Reverse mode through g_t would store the activations of a backward pass. MixFlow-MG (arXiv
2505.00793) uses that the Hessian is symmetric: for a cotangent u of g_t, one forward-mode
derivative along u

  d/d eps (d loss/d theta, d loss/d meta)(theta + eps u)  =  (H u, u^T d^2 loss/d theta d meta)

gives both cotangents. Reverse mode is left for the element-wise optimiser only, and each step saves
its inputs and g_t, nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (params, meta, batch) -> (loss, aux)

MODES = ("mixed", "mixed_offload", "mixed_save", "reverse", "first_order")


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
) -> tuple[InnerState, Any]:
  """T inner updates (UpdateInnerModel of the DataRater's Algorithm 1); returns (state, aux).

  Args:
    loss_fn: (params, meta, batch) -> (scalar, aux). Whatever is to be differentiated must be an
      argument, not a closure.
    optimizer: any of optax. One that takes extra arguments is handed the step's slice of `metas` as
      `meta`: a learning rate may be learned so.
    state: theta_0 and the optimiser state.
    metas: pytree with a leading axis T, one slice a step (None: no meta-input).
    batches: pytree with a leading axis T.
    mode: how the gradient of the result is formed; the result itself is the same.
      "mixed": MixFlow-MG, each step saves its inputs and g_t: 8 forward units (F; 9 in attention)
        for a step's Hessian-vector product, of which 2 F (3 F) repeat what the forward pass did.
      "mixed_offload": the same, but what is saved waits in the host's memory.
      "mixed_save": MixFlow-MG, each step also saves the results of its matrix products, forward
        and backward: 6 F, at the memory of T steps' activations. Faster on CPUs. Its steps are
        unrolled: the compile time grows with T.
      "reverse": plain autodiff, the yardstick.
      "first_order": ablation, drops H u: theta_t counts as a constant of the later gradients.

  Gradients reach `state` and the floating leaves of `metas`. `batches` are constants, and `aux`
  (of every step, leading axis T) carries no gradient: in every mode.
  """
  return _unroll(_gradient(loss_fn, mode), optimizer, state, metas, batches, mode)


def unroll_window(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  state: InnerState,
  metas: Any,
  batches: Any,
  mode: str = "mixed",
) -> tuple[InnerState, Any]:
  """`unroll` for a truncated window: `state` is a constant, gradients reach `metas` alone.

  The first step then needs no Hessian-vector product, only the cotangent of its meta-input: one
  forward derivative of d loss / d meta, about a third of the cost.
  """
  state = jax.lax.stop_gradient(state)
  if mode == "reverse":  # autodiff finds by itself that nothing before theta_0 is asked for
    return unroll(loss_fn, optimizer, state, metas, batches, mode)
  first, rest = (jax.tree.map(lambda x, s=s: x[s], (metas, batches)) for s in (0, slice(1, None)))
  step = partial(_step, _gradient(loss_fn, mode, hessian=False), optimizer)
  state, aux_0 = _saving(step, mode)(state, *first)
  if not len(jax.tree.leaves(batches)[0]) > 1:
    return state, jax.tree.map(lambda x: x[None], aux_0)
  state, aux = _unroll(_gradient(loss_fn, mode), optimizer, state, *rest, mode)
  return state, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), aux_0, aux)


def _unroll(gradient, optimizer, state, metas, batches, mode):
  step = _saving(partial(_step, gradient, optimizer), mode, prevent_cse=False)
  # As a loop, what "mixed_save" keeps would be copied into and out of arrays with an axis T.
  return jax.lax.scan(
    lambda state, x: step(state, *x), state, (metas, batches), unroll=mode == "mixed_save"
  )


def _saving(step, mode, prevent_cse=True):
  """`step` that keeps its inputs and g_t for the backward pass, and forms the optimiser again
  there. "mixed_save" and "reverse" keep all of the optimiser."""
  policies = jax.checkpoint_policies
  policy = policies.save_only_these_names("inner_grads")
  if mode == "mixed_offload":
    policy = policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=["inner_state", "inner_grads"],
      offload_src="device",
      offload_dst="pinned_host",
    )
  elif mode in ("mixed_save", "reverse"):
    return step
  return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)


def _step(gradient, optimizer, state, meta, batch):
  # Arrays only: TPUs refuse to keep scalars, like Adam's count, in the host's memory.
  state = jax.tree.map(lambda x: checkpoint_name(x, "inner_state") if jnp.ndim(x) else x, state)
  grads, aux = gradient(state.params, meta, jax.lax.stop_gradient(batch))
  grads = checkpoint_name(grads, "inner_grads")
  optimizer = optax.with_extra_args_support(optimizer)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params, meta=meta)
  params = optax.apply_updates(state.params, updates)
  return InnerState(params, opt_state), jax.lax.stop_gradient(aux)


def _gradient(loss_fn: LossFn, mode: str, hessian: bool = True):
  """(params, meta, batch) -> (d loss / d params, aux), with the derivative rule of `mode`.

  hessian: False leaves out H u; the backward pass then yields the cotangent of meta alone.
  """
  if mode not in MODES:
    raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
  hessian = hessian and mode != "first_order"

  def plain(params, meta, batch):
    return jax.grad(loss_fn, has_aux=True)(params, meta, batch)

  if mode == "reverse":
    return plain

  def to_differentiate(params, meta, batch):
    """What the backward pass needs the derivative of along u, then (d loss / d params, aux).

    d loss / d meta is for the floating leaves of meta only."""
    floating, restore = _split_floating(meta)

    def loss(params, floating):
      return loss_fn(params, restore(floating), batch)

    (grads, meta_grads), aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, floating)
    return (grads if hessian else None, meta_grads), (grads, aux)

  def forward(params, meta, batch):
    if mode != "mixed_save":
      return plain(params, meta, batch), (params, meta, batch)
    # Element-wise operations are cheaper to repeat than to keep: only products are saved.
    products = jax.checkpoint_policies.dots_saveable
    at_params = jax.checkpoint(
      lambda params: to_differentiate(params, meta, batch), policy=products, prevent_cse=False
    )
    _, derivative, outputs = jax.linearize(at_params, params, has_aux=True)
    return outputs, (derivative, params, meta)

  def backward(residuals, cotangents):
    u, _ = cotangents  # aux carries none
    if mode == "mixed_save":
      derivative, params, meta = residuals
      hessian_u, meta_cotangent = derivative(u)
    else:
      params, meta, batch = residuals
      at_params = lambda params: to_differentiate(params, meta, batch)[0]
      _, (hessian_u, meta_cotangent) = jax.jvp(at_params, (params,), (u,))
    if not hessian:
      hessian_u = jax.tree.map(jnp.zeros_like, params)
    _, restore = _split_floating(meta)
    return hessian_u, restore(meta_cotangent, fill=None), None

  rule = jax.custom_vjp(plain)
  rule.defvjp(forward, backward)
  return rule


def _split_floating(tree):
  """The floating leaves as a list, and a function that puts a list in their places."""
  leaves, treedef = jax.tree.flatten(tree)
  where = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

  def restore(floating, **fill):
    merged = [fill["fill"]] * len(leaves) if fill else list(leaves)
    for i, x in zip(where, floating, strict=True):
      merged[i] = x
    return jax.tree.unflatten(treedef, merged)

  return [leaves[i] for i in where], restore
