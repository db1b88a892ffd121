"""Algorithm 1 of the DataRater paper: one meta-step, and several in one compiled call.

  for each inner model i, one after the other:
    theta^i_{k+1} = UpdateInnerModel(theta^i_k, eta_k)       T updates of inner_loop
    B_k ~ D_test                                             the member's own outer batch
    g^i = d L(B_k; theta^i_{k+1}(eta_k)) / d eta             `meta_gradient`
    etabar^i = H(eta_k, g^i)                                 the member's own meta-Adam
  eta_{k+1} = mean_i etabar^i

Inner models persist over meta-steps and are re-initialised in turn, so that at any time the
population stands at all stages of training (the paper's stratified lifetimes).

What eta is and how it enters the inner loss is a `Problem`: `datarater_problem` is the paper's.

Axes: N inner models, T inner steps, B sequences, S tokens, P probe sequences, M meta-steps a call.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import inner_loop
import mesh
from datarater import Rater, batch_weights
from transformer import Batch, LanguageModel, merge_batch, split_batch


class Problem(NamedTuple):
  """A bilevel problem as plain functions (Equation 1 of the paper; fork here)."""

  init_inner: Callable[[jax.Array], Any]  # key -> theta
  metas: Callable[[Any, Any], tuple[Any, dict]]  # (eta, batches [T]) -> (metas [T], diagnostics)
  inner_loss: inner_loop.LossFn  # (theta, meta, batch) -> (scalar, aux)
  outer_loss: Callable[[Any, Any], jax.Array]  # (theta, outer batch) -> scalar
  probe: Callable[
    [Any, Any], jax.Array
  ]  # (eta, probe batch) -> scores [P], watched for convergence


def datarater_problem(
  model: LanguageModel, rater: Rater, remat: bool = False, microbatches: int = 1
) -> Problem:
  """Meta-input = softmax weights of the rater's scores; l = L = next-token loss.

  remat: form the scores of an inner batch again in the backward pass (accelerators, where the
    rater's activations of T batches do not fit).
  microbatches: score a batch in so many parts, each formed again in the backward pass. (The
    model's own are its builder's matter: `transformer.language_model`.)
  """

  def score(eta, batch: Batch):
    if microbatches == 1:
      return rater.score(eta, batch)
    part = jax.checkpoint(lambda part: rater.score(eta, part))
    return merge_batch(jax.lax.map(part, split_batch(batch, microbatches)))

  def scores_TB(eta, batches: Batch):
    if microbatches > 1:  # a loop, so that one batch's parts are formed at a time
      return jax.lax.map(lambda batch: score(eta, batch), batches)
    if remat:
      return jax.lax.map(jax.checkpoint(lambda batch: rater.score(eta, batch)), batches)
    # Not as one batch of T * B: smaller activations stay in the caches of a CPU.
    T = batches.tokens.shape[0]
    of_step = lambda t: jax.tree.map(lambda x: x[t], batches)
    return jnp.stack([rater.score(eta, of_step(t)) for t in range(T)])

  def metas(eta, batches):
    scores = scores_TB(eta, batches)
    weights = batch_weights(scores)
    return weights, {
      "score_mean": scores.mean(),
      "score_std": scores.std(),
      # Of B: B for uniform weights, 1 where one sequence takes all.
      "effective_sample_size": jnp.mean(1 / jnp.sum(jnp.square(weights), -1)),
    }

  def outer_loss(theta, batch):
    B = batch.tokens.shape[0]
    return model.loss(theta, jnp.full(B, 1 / B), batch)[0]

  def inner_loss(theta, weights_B, batch):
    loss, nll_B = model.loss(theta, weights_B, batch)
    return loss, nll_B.mean()

  return Problem(model.init, metas, inner_loss, outer_loss, score)


@dataclasses.dataclass(frozen=True)
class MetaConfig:
  n_models: int  # N_models
  lifetime: int  # inner updates between two re-initialisations of a member
  mode: str = "mixed"  # of differentiation, see inner_loop.unroll; "first_order" is the ablation
  members_per_step: int | None = None  # draw so many members for each meta-step; None = all N


class MetaState(NamedTuple):
  """All that a run carries from one meta-step to the next. Axis N leads where so marked."""

  eta: Any  # the rater's parameters
  meta_opt: Any  # N: each member's own state of H
  inner: inner_loop.InnerState  # N: theta and the state of Theta
  age: jax.Array  # int32 [N]: inner updates since the member's initialisation
  until_reset: jax.Array  # int32 [N]: inner updates left to it
  skipped: jax.Array  # int32 [N]: meta-gradients that were not finite
  step: jax.Array  # int32: k
  key: jax.Array  # constant; every draw is a function of (key, k, i)
  probe_scores: jax.Array  # [P]: scores of the probe batch at the end of the last call


def init(key, eta, problem: Problem, inner_optimizer, meta_optimizer, config: MetaConfig, probe):
  """The state before the first meta-step: eta as given, N freshly initialised inner models."""
  N = config.n_models

  def members(eta, ids):
    def member(i):
      inner = inner_loop.init(inner_optimizer, problem.init_inner(_key(key, 0, i)))
      return inner, meta_optimizer.init(eta)

    return jax.lax.map(member, ids), ()

  (inner, meta_opt), _ = mesh.over_population(members)(eta, jnp.arange(N))
  return MetaState(
    eta=eta,
    meta_opt=meta_opt,
    inner=inner,
    age=jnp.zeros(N, jnp.int32),
    until_reset=config.lifetime - jnp.arange(N, dtype=jnp.int32) * config.lifetime // N,
    skipped=jnp.zeros(N, jnp.int32),
    step=jnp.zeros((), jnp.int32),
    key=key,
    probe_scores=problem.probe(eta, probe),
  )


def meta_steps(
  state: MetaState,
  inner_batches: Any,
  outer_batches: Any,
  probe: Any,
  *,
  problem: Problem,
  inner_optimizer: optax.GradientTransformation,
  meta_optimizer: optax.GradientTransformation,
  config: MetaConfig,
) -> tuple[MetaState, dict]:
  """M meta-steps (the outer loop of Algorithm 1) and their diagnostics.

  Args:
    inner_batches: leading axes [M, m, T]; outer_batches: [M, m]; m = members_per_step or N.
    probe: a fixed batch of P sequences.

  Returns the new state and a dict of arrays [M] or [M, m], plus `score_autocorrelation`, a scalar:
  the correlation of the probe's scores with those before the call (near 1 at convergence).
  """
  one = functools.partial(
    meta_step,
    problem=problem,
    inner_optimizer=inner_optimizer,
    meta_optimizer=meta_optimizer,
    config=config,
  )
  previous = state.probe_scores
  state, metrics = jax.lax.scan(lambda s, x: one(s, *x), state, (inner_batches, outer_batches))
  scores = problem.probe(state.eta, probe)
  metrics["score_autocorrelation"] = _correlation(previous, scores)
  return state._replace(probe_scores=scores), metrics


def meta_step(
  state: MetaState,
  inner_batches: Any,
  outer_batches: Any,
  *,
  problem: Problem,
  inner_optimizer: optax.GradientTransformation,
  meta_optimizer: optax.GradientTransformation,
  config: MetaConfig,
) -> tuple[MetaState, dict]:
  """One meta-step: inner_batches [m, T, ...], outer_batches [m, ...] -> (state, diagnostics)."""
  N = config.n_models
  m = config.members_per_step or N
  members = jnp.arange(N)
  if m < N:
    members = jax.random.permutation(_key(state.key, state.step, N), N)[:m]

  def member_step(eta, carry, x):
    i, inner_batch, outer_batch = x
    place = mesh.place_of_member(i, N)
    inner, meta_opt, age, until_reset, skipped = jax.tree.map(lambda a: a[place], carry)
    T = len(jax.tree.leaves(inner_batch)[0])

    g, inner, metrics = meta_gradient(
      eta, inner, inner_batch, outer_batch, problem, inner_optimizer, config.mode
    )
    finite = jnp.isfinite(optax.tree.norm(g)) & jnp.isfinite(metrics["outer_loss"])
    updates, new_meta_opt = meta_optimizer.update(g, meta_opt, eta)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
    meta_opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_meta_opt, meta_opt)

    age, until_reset = age + T, until_reset - T
    metrics |= {
      "meta_gradient_norm": optax.tree.norm(g),
      "meta_update_norm": optax.tree.norm(updates),
      "age": age,
      "skipped": ~finite,
    }
    # A member that diverged would stay so: it starts anew as well.
    reset = (until_reset <= 0) | ~jnp.isfinite(optax.tree.norm(inner.params))
    inner = jax.lax.cond(
      reset,
      lambda: inner_loop.init(
        inner_optimizer, problem.init_inner(_key(state.key, state.step + 1, i))
      ),
      lambda: inner,
    )
    age = jnp.where(reset, 0, age)
    until_reset = jnp.where(reset, config.lifetime, until_reset)
    new = (inner, meta_opt, age, until_reset, skipped + ~finite)
    carry = jax.tree.map(lambda a, b: a.at[place].set(b), carry, new)
    return carry, (updates, finite, metrics)

  def in_turn(eta, carry, *x):
    def step(carry, x):
      members, total, used = carry
      members, (updates, finite, metrics) = member_step(eta, members, x)
      return (members, jax.tree.map(jnp.add, total, updates), used + finite), metrics

    # One member after the other, in place: batching one over the other makes every product a
    # batched one (slow on CPUs) and holds all members' activations at a time.
    zero = jax.tree.map(jnp.zeros_like, eta)
    (carry, total, used), metrics = jax.lax.scan(step, (carry, zero, 0), x)
    return (carry, metrics), (total, used)

  carry = (state.inner, state.meta_opt, state.age, state.until_reset, state.skipped)
  (carry, metrics), (total, used) = mesh.over_population(in_turn)(
    state.eta, carry, members, inner_batches, outer_batches
  )
  # mean_i etabar^i = eta + mean_i of the updates, over the members whose gradient was finite.
  eta = jax.tree.map(lambda e, u: e + u / jnp.maximum(used, 1), state.eta, total)
  inner, meta_opt, age, until_reset, skipped = carry
  state = state._replace(
    eta=eta,
    meta_opt=meta_opt,
    inner=inner,
    age=age,
    until_reset=until_reset,
    skipped=skipped,
    step=state.step + 1,
  )
  return state, metrics | {"member": members}


def meta_gradient(eta, inner, inner_batch, outer_batch, problem, inner_optimizer, mode):
  """g = d L(outer batch; theta_T(eta)) / d eta for one member, lines 5 to 9 of Algorithm 1.

  The scores do not depend on theta: they are formed once, before the inner loop, and the
  second-order part only ever hands back the cotangent of the weights.

  Returns (g, the member's state after T updates, diagnostics).
  """
  metas, pull_back, diagnostics = jax.vjp(
    lambda eta: problem.metas(eta, inner_batch), eta, has_aux=True
  )

  outer_loss, d_metas, inner, inner_losses = inner_loop.window_gradient(
    lambda theta: problem.outer_loss(theta, outer_batch),
    problem.inner_loss,
    inner_optimizer,
    inner,
    metas,
    inner_batch,
    mode,
  )
  (g,) = pull_back(d_metas)
  return g, inner, diagnostics | {"outer_loss": outer_loss, "inner_loss": inner_losses}


def paper_meta_optimizer(learning_rate=1e-3, warmup=100, weight_decay=0.1, clip=0.01, eps=1e-8):
  """H: Adam with decoupled weight decay, linear warm-up, global-norm clip, as the paper sets them.

  The learning rate is ours: the paper does not state it.
  """
  schedule = optax.linear_schedule(0.0, learning_rate, warmup)
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, weight_decay=weight_decay, eps=eps),
  )


def inner_adamw(learning_rate=1e-3, warmup=0, weight_decay=0.0, b2=0.99, eps_root=1e-12):
  """Theta: differentiable AdamW.

  sqrt(v) has an infinite slope at v = 0, where a parameter never saw a gradient: `eps_root` under
  the root keeps the meta-gradient finite and is too small to change training.
  """
  schedule = optax.linear_schedule(0.0, learning_rate, warmup) if warmup else learning_rate
  return optax.adamw(schedule, b2=b2, eps=0.0, eps_root=eps_root, weight_decay=weight_decay)


def _key(key, step, member):
  return jax.random.fold_in(jax.random.fold_in(key, step), member)


def _correlation(a, b):
  a, b = a - a.mean(), b - b.mean()
  return jnp.sum(a * b) / jnp.maximum(jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b)), 1e-30)
