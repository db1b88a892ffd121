"""The differentiable inner loop: T optimiser updates, with MixFlow-MG meta-gradients.

  theta_{t+1}, s_{t+1} = Theta(theta_t, s_t, g_t),  g_t = d loss(theta_t, meta_t, batch_t)/d theta

Nothing here knows of language models or raters: any loss, any optax optimiser, any pytree `meta`.

Reverse mode through g_t would store the activations of a backward pass. MixFlow-MG (arXiv
2505.00793) uses that the Hessian is symmetric: for a cotangent u of g_t, one forward-mode
derivative along u

  d/d eps (d loss/d theta, d loss/d meta)(theta + eps u)  =  (H u, u^T d^2 loss/d theta d meta)

gives both cotangents. Reverse mode is left for the element-wise optimiser Theta only. What is saved
is every g_t and each SEGMENT-th state: the states between follow from them, by Theta alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (params, meta, batch) -> (loss, aux)

MODES = ("mixed", "mixed_offload", "mixed_save", "reverse", "first_order")
SEGMENT = 8  # steps between two saved states


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
      argument, not a closure: of the loss as of the optimiser.
    optimizer: any of optax. One that takes extra arguments is handed the step's slice of `metas` as
      `meta`: a learning rate may be learned so.
    state: theta_0 and the optimiser state.
    metas: pytree with a leading axis T, one slice a step (None: no meta-input).
    batches: pytree with a leading axis T.
    mode: how the gradient of the result is formed; the result itself is the same.
      "mixed": MixFlow-MG, saves g_t and each eighth state: 8 forward units (F; 9 in attention) for
        a step's Hessian-vector product, of which 2 F (3 F) repeat what the forward pass did. The
        element-wise optimiser runs 2 min(T, 8) times more a step, to form the states again.
      "mixed_offload": the same, but what is saved waits in the host's memory.
      "mixed_save": MixFlow-MG, each step also saves the results of its matrix products, forward
        and backward: 6 F, at the memory of T steps' activations. Faster on CPUs. Its steps are
        unrolled: the compile time grows with T. (So do segments of eight of "mixed_offload".)
      "reverse": plain autodiff, the yardstick.
      "first_order": ablation, drops H u: theta_t counts as a constant of the later gradients.

  Gradients reach `state` and the floating leaves of `metas`. `batches` are constants, and `aux`
  (of every step, leading axis T) carries no gradient: in every mode.
  """
  return _unroll(loss_fn, optimizer, state, metas, batches, mode)


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
  return _unroll(loss_fn, optimizer, state, metas, batches, mode, window=True)


def window_gradient(
  outer_loss: Callable[[Any], jax.Array],
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  state: InnerState,
  metas: Any,
  batches: Any,
  mode: str = "mixed",
) -> tuple[jax.Array, Any, InnerState, Any]:
  """Value and gradient of outer_loss(theta_T) with respect to the metas of `unroll_window`.

  Returns (value, d value / d metas, the state after T updates, aux). Where one segment holds the
  window, that state is formed again after the backward pass, which so need not keep it.
  """
  T = _steps(batches)
  if mode in ("reverse", "mixed_save") or T > SEGMENT:

    def objective(metas):
      end, aux = unroll_window(loss_fn, optimizer, state, metas, batches, mode)
      return outer_loss(end.params), (end, aux)

    gradient = jax.value_and_grad(objective, has_aux=True, allow_int=True)
    (value, (end, aux)), d_metas = gradient(metas)
    return value, d_metas, end, aux

  forward, backward = _segment(loss_fn, optimizer, mode, first=True, window=True)
  (end, aux), saved = forward(state, (metas, batches))
  value, d_params = jax.value_and_grad(outer_loss)(end.params)
  rest = jax.tree.map(jnp.zeros_like, _split_floating(end.opt_state)[0])
  _, d_floating = backward(saved, jax.tree.leaves(d_params) + rest)
  _, (start, grads) = jax.lax.optimization_barrier(((value, d_floating), saved[:2]))
  end = _replay(optimizer, start, grads, metas, T)
  return value, _split_floating(metas)[1](d_floating, cotangent=True), end, aux


def _unroll(loss_fn, optimizer, state, metas, batches, mode, window=False):
  """Segment after segment; the first may be shorter than the others."""
  x, T = (metas, batches), _steps(batches)
  if mode == "reverse":
    return jax.lax.scan(_step(jax.grad(loss_fn, has_aux=True), optimizer), state, x)

  def segment(state, x, first=False, window=False):
    if mode == "mixed_save":
      step = _step(_keeping_products(loss_fn, hessian=not window), optimizer)
      state, aux = step(state, jax.tree.map(lambda x: x[0], x))
      return state, jax.tree.map(lambda a: a[None], aux)
    forward, backward = _segment(loss_fn, optimizer, mode, first, window)
    rule = jax.custom_vjp(lambda state, x: forward(state, x)[0])

    def cotangents(saved, cotangent):
      of_end = [x for x in jax.tree.leaves(cotangent[0]) if x.dtype != jax.dtypes.float0]
      of_state, of_metas = backward(saved, of_end)
      state, _, (metas, _) = saved
      of_state = None if window else _split_floating(state)[1](of_state, cotangent=True)
      return of_state, (_split_floating(metas)[1](of_metas, cotangent=True), None)

    rule.defvjp(forward, cotangents)
    return rule(state, x)

  length = 1 if mode == "mixed_save" else SEGMENT
  first = (T - 1) % length + 1
  state, aux = segment(state, jax.tree.map(lambda x: x[:first], x), True, window)
  if first == T:
    return state, aux
  rest = jax.tree.map(lambda x: x[first:].reshape(-1, length, *x.shape[1:]), x)
  # A loop would copy what "mixed_save" keeps into and out of arrays with an axis T; and XLA fails
  # to move to the host from a loop within a loop.
  unrolled = mode in ("mixed_save", "mixed_offload")
  state, later = jax.lax.scan(segment, state, rest, unroll=unrolled)
  joined = lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])])
  return state, jax.tree.map(joined, aux, later)


def _segment(loss_fn, optimizer, mode, first, window):
  """The derivative rule of some steps, (state, (metas, batches)) -> (state, aux): a forward pass
  that keeps the first state and every g_t, and the backward pass. Cotangents are lists, of the
  floating leaves.

  first: the state before these steps is the caller's own, who keeps it in any case.
  window: it is a constant.
  """
  if mode not in MODES:
    raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
  to_host = _to_host if mode == "mixed_offload" else lambda tree: tree

  def forward(state, x):
    def step(state, x):
      meta, batch = x
      grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, meta, batch)
      return _update(optimizer, state, grads, meta), (aux, to_host(grads))

    start = state if first else to_host(state)
    x_0, later = _first_and_later(x)
    state, (aux_0, grads_0) = step(state, x_0)
    state, (aux, grads) = jax.lax.scan(step, state, later)
    return (state, _joined(aux_0, aux)), (start, (grads_0, grads), x)

  def backward(saved, cotangent):
    """Cotangent of the state after the steps -> (that of the first state, those of metas [T])."""
    start, grads_T, x = saved
    theta = slice(len(jax.tree.leaves(start.params)))  # in a cotangent of a state

    def step(cotangent, x, constant_theta=False):
      """Step t, from the state after it to the one before it."""
      t, grads_t, (meta, batch) = x

      def again(after):
        """The state before step t, and g_t."""
        _, kept = jax.lax.optimization_barrier((after, (start, grads_T, grads_t)))
        return _replay(optimizer, *kept[:2], saved[2][0], t), _to_device(kept[2])

      # Twice, so that the Hessian-vector product, the peak of the memory, has only theta_t beside
      # it; behind barriers, or XLA would keep what it has formed before.
      state, grads = again(cotangent[theta])
      by_update = _pull_back(partial(_update, optimizer, state), grads, meta)
      u, meta_cotangent = by_update(cotangent)
      hessian = mode != "first_order" and not constant_theta
      hessian_u, by_loss = _product(loss_fn, state.params, meta, batch, u, hessian)
      meta_cotangent = [a + b for a, b in zip(meta_cotangent, by_loss, strict=True)]
      if constant_theta:
        return None, meta_cotangent
      state, grads = again((hessian_u, by_loss))
      update = lambda state: _update(optimizer, state, grads, meta)
      (cotangent,) = _pull_back(update, state)(cotangent)
      if hessian:
        cotangent[theta] = [a + b for a, b in zip(cotangent[theta], hessian_u, strict=True)]
      return cotangent, meta_cotangent

    (grads_0, grads), (x_0, later) = grads_T, _first_and_later(x)
    xs = jnp.arange(1, _steps(x)), grads, later
    cotangent, of_metas = jax.lax.scan(step, cotangent, xs, reverse=True)
    cotangent, of_meta_0 = step(cotangent, (0, grads_0, x_0), constant_theta=window)
    return cotangent, _joined(of_meta_0, of_metas)

  return forward, backward


def _replay(optimizer, start, grads, metas, t):
  """The state before step t, by Theta from the first one. t: an int, or traced and at least 1."""
  state = _to_device(start)
  if isinstance(t, int) and t == 0:
    return state

  def step(state, x):
    i, grads, meta = x
    new = _update(optimizer, state, _to_device(grads), meta)
    return jax.tree.map(partial(jnp.where, i < t), new, state), None

  (grads_0, grads), (meta_0, metas) = grads, _first_and_later(metas)
  state = _update(optimizer, state, _to_device(grads_0), meta_0)
  return jax.lax.scan(step, state, (jnp.arange(1, 1 + _steps(grads)), grads, metas))[0]


def _product(loss_fn, params, meta, batch, u, hessian=True):
  """(H u or None, u^T d^2 loss / d theta d meta) for a list u: forward mode over reverse mode."""
  u = jax.tree.unflatten(jax.tree.structure(params), u)
  gradients = lambda params: _gradients(loss_fn, params, meta, batch, hessian)[0]
  _, (hessian_u, meta_cotangent) = jax.jvp(gradients, (params,), (u,))
  return jax.tree.leaves(hessian_u), meta_cotangent


def _gradients(loss_fn, params, meta, batch, hessian):
  """What a backward pass needs the derivative of along u; then (d loss / d params, aux).

  hessian: False leaves out d loss / d params, and so H u.
  """
  floating, restore = _split_floating(meta)

  def loss(params, floating):
    return loss_fn(params, restore(floating), batch)

  gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
  (grads, meta_grads), aux = gradient(params, floating)
  return (grads if hessian else None, meta_grads), (grads, aux)


def _keeping_products(loss_fn, hessian):
  """d loss / d params, which keeps the results of its matrix products for its derivative."""

  def gradient(params, meta, batch):
    return jax.grad(loss_fn, has_aux=True)(params, meta, batch)

  def forward(params, meta, batch):
    # Element-wise operations are cheaper to repeat than to keep: only products are saved.
    at_params = jax.checkpoint(
      lambda params: _gradients(loss_fn, params, meta, batch, hessian),
      policy=jax.checkpoint_policies.dots_saveable,
      prevent_cse=False,
    )
    _, derivative, outputs = jax.linearize(at_params, params, has_aux=True)
    return outputs, (derivative, params, meta)

  def backward(residuals, cotangents):
    derivative, params, meta = residuals
    hessian_u, meta_cotangent = derivative(cotangents[0])
    if not hessian:
      hessian_u = jax.tree.map(jnp.zeros_like, params)
    return hessian_u, _split_floating(meta)[1](meta_cotangent, cotangent=True), None

  rule = jax.custom_vjp(gradient)
  rule.defvjp(forward, backward)
  return rule


def _step(gradient, optimizer):
  """A step as the body of a scan."""

  def step(state, x):
    meta, batch = x
    grads, aux = gradient(state.params, meta, jax.lax.stop_gradient(batch))
    return _update(optimizer, state, grads, meta), jax.lax.stop_gradient(aux)

  return step


def _update(optimizer, state, grads, meta):
  """Theta."""
  optimizer = optax.with_extra_args_support(optimizer)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params, meta=meta)
  return InnerState(optax.apply_updates(state.params, updates), opt_state)


def _pull_back(function, *primals):
  """jax.vjp for trees with integer leaves: lists of the floating ones' cotangents, in and out."""
  floating, restore = zip(*map(_split_floating, primals), strict=True)

  def of_floating(*floating):
    restored = [to_tree(leaves) for to_tree, leaves in zip(restore, floating, strict=True)]
    return _split_floating(function(*restored))[0]

  return jax.vjp(of_floating, *floating)[1]


def _split_floating(tree):
  """The floating leaves as a list, and a function that puts a list in their places; or, to make a
  cotangent of it, zeros of no width in those of the others."""
  leaves, treedef = jax.tree.flatten(tree)
  is_floating = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

  def restore(floating, cotangent=False):
    floating = iter(floating)
    other = lambda x: np.zeros(x.shape, jax.dtypes.float0) if cotangent else x
    pairs = zip(leaves, is_floating, strict=True)
    return jax.tree.unflatten(treedef, [next(floating) if f else other(x) for x, f in pairs])

  return [x for x, f in zip(leaves, is_floating, strict=True) if f], restore


def _to_host(tree):
  # Arrays only: TPUs refuse to keep scalars, like Adam's count, in the host's memory.
  move = lambda x: jax.device_put(x, jax.memory.Space.Host) if jnp.ndim(x) else x
  return jax.tree.map(move, tree)


def _to_device(tree):
  move = lambda x: jax.device_put(x, jax.memory.Space.Device) if jnp.ndim(x) else x
  return jax.tree.map(move, tree)


def _first_and_later(tree):
  return jax.tree.map(lambda x: x[0], tree), jax.tree.map(lambda x: x[1:], tree)


def _joined(first, later):
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


def _steps(tree):
  return len(jax.tree.leaves(tree)[0])
