"""Algorithm 1 of the DataRater paper: one meta-step, and several in one compiled call.

  line of Algorithm 1                                       here
  repeat K times                                            train.py: `train`
    for each inner model i:                                 `meta_step`: members in turn
      theta^i_{k+1} = UpdateInnerModel(theta^i_k, eta_k)    `inner_loop.unroll`: T updates
        B_t ~ D_train, N_inner sequences                    train.py: `draw`; inner_batches
        g_t = sum_i sigma_i(phi_eta) grad l_i               `datarater_problem`: inner_loss
      B_k ~ D_test, N_outer sequences                       train.py: `draw`; outer_batches
      g^i = d L(B_k; theta^i_{k+1}(eta_k)) / d eta          `meta_gradient`, by
                                                            `inner_loop.window_gradient`
      etabar^i = H(eta_k, g^i)                              `update_member`; one Adam per member
      re-initialize theta^i at the end of its lifetime      `update_member`
    eta_{k+1} = mean_i etabar^i                             last lines of `meta_step`

Inner models persist over meta-steps and are re-initialized at different times, so that the
population always stands at all stages of training (the paper's stratified lifetimes).

A `Problem` says what eta is and how it enters the inner loss; `datarater_problem` is the paper's.

Axes: N inner models, m of them drawn for a meta-step, T inner steps, B sequences, P probe
sequences, C meta-steps of one call.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import inner_loop
from datarater import Rater, batch_weights
from runtime import sharding
from transformer import Batch, LanguageModel, merge_batch, split_batch


class Problem(NamedTuple):
  """A bilevel problem as plain functions (Equation 1 of the paper; fork here)."""

  init_inner: Callable[[jax.Array], Any]  # key -> theta
  metas: Callable[[Any, Any], tuple[Any, dict]]  # (eta, batches [T]) -> (metas [T], diagnostics)
  inner_loss: inner_loop.LossFn  # (theta, meta, batch) -> (scalar, aux)
  outer_loss: Callable[[Any, Any], jax.Array]  # (theta, outer batch) -> scalar
  probe: Callable[[Any, Any], jax.Array]  # (eta, probe batch) -> scores [P], for convergence


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """Algorithm 1 with its settings: one hashable value, static under jit."""

  problem: Problem
  inner_optimizer: optax.GradientTransformation  # Theta
  meta_optimizer: optax.GradientTransformation  # H, one state per inner model
  n_models: int  # N_models
  lifetime: int  # inner updates between two re-initializations of a member
  mode: str = "mixed"  # of differentiation: inner_loop.MODES
  members_per_step: int | None = None  # m, members drawn for each meta-step; None: all N


class Member(NamedTuple):
  """One inner model of the population; in a MetaState all fields have a leading axis N."""

  inner: inner_loop.InnerState  # theta^i and the state of Theta
  meta_opt: Any  # the member's own state of H
  age: jax.Array  # int32: inner updates since its initialization
  until_reset: jax.Array  # int32: inner updates until its re-initialization
  skipped: jax.Array  # int32: meta-gradients that were not finite


class MetaState(NamedTuple):
  """All that a run carries from one meta-step to the next."""

  eta: Any  # the rater's parameters
  members: Member  # [N]
  step: jax.Array  # int32: k
  key: jax.Array  # never changes; all randomness comes from (key, k, i)
  probe_scores: jax.Array  # [P]: scores of the probe batch at the end of the last call


def meta_step(
  algorithm: Algorithm, state: MetaState, inner_batches: Any, outer_batches: Any
) -> tuple[MetaState, dict]:
  """One meta-step: inner_batches [m, T, ..], outer_batches [m, ..] -> (state, diagnostics [m])."""
  N = algorithm.n_models
  m = algorithm.members_per_step or N
  drawn = jnp.arange(N)
  if m < N:
    key = _key(state.key, state.step, N)  # members take 0 to N - 1
    drawn = jax.random.permutation(key, N)[:m]

  def in_turn(eta, members, *batches):
    # One member after the other, in place: vmap would turn every matmul into a batched one (slow
    # on CPUs) and hold all members' activations at once.
    def body(carry, x):
      members, total, used = carry
      i, inner_batch, outer_batch = x
      place = sharding.local_index(i, N)
      member = jax.tree.map(lambda a: a[place], members)
      key = _key(state.key, state.step + 1, i)
      member, update, metrics = update_member(algorithm, eta, member, inner_batch, outer_batch, key)
      members = jax.tree.map(lambda a, b: a.at[place].set(b), members, member)
      total = jax.tree.map(jnp.add, total, update)
      return (members, total, used + ~metrics["skipped"]), metrics

    zero = jax.tree.map(jnp.zeros_like, eta)
    (members, total, used), metrics = jax.lax.scan(body, (members, zero, 0), batches)
    return (members, metrics), (total, used)

  (members, metrics), (total, used) = sharding.over_population(in_turn)(
    state.eta, state.members, drawn, inner_batches, outer_batches
  )
  # mean_i etabar^i = eta + the mean update, over the members whose meta-gradient was finite.
  eta = jax.tree.map(lambda e, u: e + u / jnp.maximum(used, 1), state.eta, total)
  state = state._replace(eta=eta, members=members, step=state.step + 1)
  return state, metrics | {"member": drawn}


def update_member(
  algorithm: Algorithm, eta: Any, member: Member, inner_batch: Any, outer_batch: Any, key: Any
) -> tuple[Member, Any, dict]:
  """One member's part of a meta-step: (member, its update etabar^i - eta, diagnostics).

  A meta-gradient that is not finite gives no update. A re-initialization, from `key`, clears theta
  and the state of Theta; the member's state of H stays.
  """
  a, T = algorithm, len(jax.tree.leaves(inner_batch)[0])
  g, inner, metrics = meta_gradient(a, eta, member.inner, inner_batch, outer_batch)

  finite = jnp.isfinite(optax.tree.norm(g)) & jnp.isfinite(metrics["outer_loss"])
  update, meta_opt = a.meta_optimizer.update(g, member.meta_opt, eta)
  update = jax.tree.map(lambda u: jnp.where(finite, u, 0), update)
  meta_opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), meta_opt, member.meta_opt)

  age, until_reset = member.age + T, member.until_reset - T
  metrics |= {
    "meta_gradient_norm": optax.tree.norm(g),
    "meta_update_norm": optax.tree.norm(update),
    "age": age,
    "skipped": ~finite,
  }
  # A non-finite inner model cannot recover, so it is re-initialized too.
  reset = (until_reset <= 0) | ~jnp.isfinite(optax.tree.norm(inner.params))
  fresh = lambda: inner_loop.init(a.inner_optimizer, a.problem.init_inner(key))
  member = Member(
    inner=jax.lax.cond(reset, fresh, lambda: inner),
    meta_opt=meta_opt,
    age=jnp.where(reset, 0, age),
    until_reset=jnp.where(reset, a.lifetime, until_reset),
    skipped=member.skipped + ~finite,
  )
  return member, update, metrics


def meta_gradient(
  algorithm: Algorithm,
  eta: Any,
  inner: inner_loop.InnerState,
  inner_batch: Any,
  outer_batch: Any,
) -> tuple[Any, inner_loop.InnerState, dict]:
  """g = d L(outer batch; theta_T(eta)) / d eta for one member.

  The scores do not depend on theta: they are computed once, before the inner loop. So the inner
  loop is differentiated with respect to the weights only, and `pull_back` carries that to eta.

  Returns (g, the inner state after T updates, diagnostics).
  """
  problem = algorithm.problem
  metas, pull_back, diagnostics = jax.vjp(
    lambda eta: problem.metas(eta, inner_batch), eta, has_aux=True
  )
  outer_loss, d_metas, inner, inner_losses = inner_loop.window_gradient(
    lambda theta: problem.outer_loss(theta, outer_batch),
    problem.inner_loss,
    algorithm.inner_optimizer,
    inner,
    metas,
    inner_batch,
    algorithm.mode,
  )
  (g,) = pull_back(d_metas)
  return g, inner, diagnostics | {"outer_loss": outer_loss, "inner_loss": inner_losses}


def meta_steps(
  algorithm: Algorithm, state: MetaState, inner_batches: Any, outer_batches: Any, probe: Any
) -> tuple[MetaState, dict]:
  """C of the K meta-steps of Algorithm 1, and their diagnostics.

  Args:
    inner_batches: leading axes [C, m, T]; outer_batches: [C, m].
    probe: a fixed batch of P sequences.

  Returns the new state and a dict of arrays [C] or [C, m], plus `score_autocorrelation`, a scalar:
  the correlation of the probe's scores before and after the call (near 1 at convergence).
  """
  previous = state.probe_scores
  step = lambda state, batches: meta_step(algorithm, state, *batches)
  state, metrics = jax.lax.scan(step, state, (inner_batches, outer_batches))
  scores = algorithm.problem.probe(state.eta, probe)
  metrics["score_autocorrelation"] = _correlation(previous, scores)
  return state._replace(probe_scores=scores), metrics


def init(algorithm: Algorithm, key: Any, eta: Any, probe: Any) -> MetaState:
  """The state before the first meta-step: eta as given and N fresh inner models. The first lifetime
  of member i is only (1 - i / N) of a lifetime, so that re-initializations are staggered."""
  a, N, zero = algorithm, algorithm.n_models, jnp.zeros((), jnp.int32)

  def fresh(eta, ids):
    def member(i):
      inner = inner_loop.init(a.inner_optimizer, a.problem.init_inner(_key(key, 0, i)))
      staggered = a.lifetime - i * a.lifetime // N
      meta_opt = a.meta_optimizer.init(eta)
      return Member(inner, meta_opt, age=zero, until_reset=staggered, skipped=zero)

    return jax.lax.map(member, ids), ()

  members, _ = sharding.over_population(fresh)(eta, jnp.arange(N, dtype=jnp.int32))
  return MetaState(
    eta=eta,
    members=members,
    step=zero,
    key=key,
    probe_scores=algorithm.problem.probe(eta, probe),
  )


def datarater_problem(
  model: LanguageModel, rater: Rater, microbatches: int = 1, save_activations: bool = False
) -> Problem:
  """The paper's problem: metas are the softmax weights of the rater's scores; inner and outer loss
  are the next-token loss.

  Args:
    microbatches: score each batch in this many microbatches, rematerialized in the backward pass.
      The language model's are set in `transformer.language_model`.
    save_activations: keep the rater's activations of all T batches for the backward pass, one
      program part per batch, as mode "mixed_save" does for the model; else a loop computes them
      again, batch by batch.
  """

  def score(eta, batch: Batch):
    if microbatches == 1:
      return rater.score(eta, batch)
    part = jax.checkpoint(lambda part: rater.score(eta, part))
    return merge_batch(jax.lax.map(part, split_batch(batch, microbatches)))

  def scores_TB(eta, batches: Batch):
    # Not as one batch of T * B: smaller activations stay in the caches of a CPU.
    if save_activations:
      return jnp.stack([score(eta, Batch(*x)) for x in zip(*batches, strict=True)])
    each = lambda batch: score(eta, batch)
    return jax.lax.map(each if microbatches > 1 else jax.checkpoint(each), batches)

  def metas(eta, batches):
    scores = scores_TB(eta, batches)
    weights = batch_weights(scores)
    return weights, {
      "score_mean": scores.mean(),
      "score_std": scores.std(),
      # From B (uniform weights) down to 1 (one sequence takes all).
      "effective_sample_size": jnp.mean(1 / jnp.sum(jnp.square(weights), -1)),
    }

  def outer_loss(theta, batch):
    B = batch.tokens.shape[0]
    return model.loss(theta, jnp.full(B, 1 / B), batch)[0]

  def inner_loss(theta, weights_B, batch):
    loss, nll_B = model.loss(theta, weights_B, batch)
    return loss, nll_B.mean()

  return Problem(model.init, metas, inner_loss, outer_loss, score)


def paper_meta_optimizer(
  learning_rate: float = 1e-3,
  warmup: int = 100,
  weight_decay: float = 0.1,
  clip: float = 0.01,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """H: Adam with decoupled weight decay, linear warm-up and global-norm clip. All is set as in
  the paper, but for the learning rate, which the paper does not state.
  """
  adamw = optax.adamw(_warm_up(learning_rate, warmup), weight_decay=weight_decay, eps=eps)
  return optax.chain(optax.clip_by_global_norm(clip), adamw)


def inner_adamw(
  learning_rate: float = 1e-3,
  warmup: int = 0,
  weight_decay: float = 0.0,
  b2: float = 0.99,
  eps_root: float = 1e-12,
) -> optax.GradientTransformation:
  """Theta: differentiable AdamW.

  sqrt(v) has an infinite slope at v = 0, where a parameter has had no gradient yet. `eps_root`
  under the root keeps the meta-gradient finite and is too small to change training.
  """
  rate = _warm_up(learning_rate, warmup)
  return optax.adamw(rate, b2=b2, eps=0.0, eps_root=eps_root, weight_decay=weight_decay)


def _warm_up(rate, steps):
  # A linear schedule of no steps would stay at zero.
  return optax.linear_schedule(0.0, rate, steps) if steps else rate


def _key(key, step, member):
  return jax.random.fold_in(jax.random.fold_in(key, step), member)


def _correlation(a, b):
  a, b = a - a.mean(), b - b.mean()
  return jnp.sum(a * b) / jnp.maximum(jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b)), 1e-30)
