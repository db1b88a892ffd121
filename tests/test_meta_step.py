"""meta_step.py: Algorithm 1 against simulations by hand, on a problem of a few numbers.

Axes: N inner models, T inner steps, B examples, D inputs, M meta-steps a call, P probe examples.
"""

import dataclasses
import functools
import math
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close

import datarater
import inner_loop
import meta_step
import transformer

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, P = 2, 5, 3, 7
RATE = 0.3


class Examples(NamedTuple):
  x: Any  # [..., B, D]
  y: Any  # [..., B]
  factor: Any  # [...]: of the loss; NaN makes everything that it touches NaN


def _errors(theta, batch):
  return batch.factor * jnp.square(jnp.tanh(batch.x @ theta["w"]) - batch.y)


def _tiny_problem():
  """Regression with softmax weights. "clock" has gradient 1: under SGD it tells the age."""

  def init_inner(key):
    return {"w": jax.random.uniform(key, [D]), "clock": jnp.zeros(())}

  def metas(eta, batches):
    weights = jax.nn.softmax(batches.x @ eta["v"])
    return weights, {"largest_weight": weights.max()}

  def inner_loss(theta, weights_B, batch):
    loss = jnp.sum(weights_B * _errors(theta, batch))
    return loss + theta["clock"], loss

  return meta_step.Problem(
    init_inner=init_inner,
    metas=metas,
    inner_loss=inner_loss,
    outer_loss=lambda theta, batch: jnp.mean(_errors(theta, batch)),
    probe=lambda eta, batch: batch.x @ eta["v"],
  )


def _examples(seed, *axes):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    jnp.asarray,
    Examples(rng.normal(size=(*axes, B, D)), rng.normal(size=(*axes, B)), np.ones(axes)),
  )


def _batches(seed, *axes):
  return _examples(seed, *axes, T), _examples(seed + 1000, *axes)


def _setting(n_models, lifetime=1000, meta_optimizer=None, inner_optimizer=None, **config):
  """(initial state, the algorithm, the probe)."""
  algorithm = meta_step.Algorithm(
    problem=_tiny_problem(),
    inner_optimizer=inner_optimizer or optax.sgd(RATE),
    meta_optimizer=meta_optimizer or optax.adam(0.1),
    n_models=n_models,
    lifetime=lifetime,
    **config,
  )
  probe = jax.tree.map(
    jnp.asarray, Examples(np.random.default_rng(9).normal(size=(P, D)), 0.0, 1.0)
  )
  eta = {"v": jnp.array([0.5, -1.0, 0.2])}
  init = jax.jit(functools.partial(meta_step.init, algorithm))
  return init(jax.random.key(3), eta, probe), algorithm, probe


def _jitted(algorithm):
  return jax.jit(functools.partial(meta_step.meta_step, algorithm))


def _at(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def _outer_loss_by_hand(v, w, inner, outer):
  """The outer loss after T weighted SGD steps, in numpy; v = eta, w = theta."""
  for t in range(T):
    x, y = inner.x[t], inner.y[t]
    weights = np.exp(x @ v) / np.exp(x @ v).sum()
    prediction = np.tanh(x @ w)
    w = w - RATE * (weights * 2 * (prediction - y) * (1 - prediction**2)) @ x
  return np.mean((np.tanh(outer.x @ w) - outer.y) ** 2), w


@pytest.mark.parametrize("mode", ["mixed", "mixed_save", "reverse"])
def test_one_member_under_sgd_descends_the_simulated_outer_loss(x64, mode):
  meta_rate, h = 0.7, 1e-5
  state, algorithm, _ = _setting(1, meta_optimizer=optax.sgd(meta_rate), mode=mode)
  inner, outer = _batches(0, 1)
  new, metrics = _jitted(algorithm)(state, inner, outer)

  np_inner, np_outer = jax.tree.map(np.asarray, (_at(inner, 0), _at(outer, 0)))
  v, w = np.asarray(state.eta["v"]), np.asarray(state.members.inner.params["w"][0])
  loss, w_T = _outer_loss_by_hand(v, w, np_inner, np_outer)
  gradient = np.empty(D)
  for d in range(D):
    plus, minus = (
      _outer_loss_by_hand(v + s * h * np.eye(D)[d], w, np_inner, np_outer)[0] for s in (1, -1)
    )
    gradient[d] = (plus - minus) / (2 * h)
  assert_close(new.eta["v"], v - meta_rate * gradient, 1e-8)
  assert_close((new.eta["v"] - v) / meta_rate, -gradient, 1e-6)
  assert_close(new.members.inner.params["w"][0], w_T, 1e-12)
  assert_close(metrics["outer_loss"][0], loss, 1e-12)
  assert_close(metrics["meta_gradient_norm"][0], np.linalg.norm(gradient), 1e-6)
  assert_close(metrics["meta_update_norm"][0], meta_rate * np.linalg.norm(gradient), 1e-6)


def test_datarater_problem_descends_the_outer_loss_of_its_language_model(x64):
  """The paper's problem end to end in float64: slope of the outer loss along the update of eta."""
  config = transformer.TransformerConfig(7, 4, 1, 1, 4, 6, dtype="float64")
  wide = lambda params: jax.tree.map(lambda x: x.astype(jnp.float64), params)
  model, rater = transformer.language_model(config), datarater.rater(config)
  model = model._replace(init=lambda key, init=model.init: wide(init(key)))
  optimizer = meta_step.inner_adamw(0.1)
  problem = meta_step.datarater_problem(model, rater)
  algorithm = meta_step.Algorithm(problem, optimizer, optax.sgd(1.0), n_models=1, lifetime=T)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(7, size=(T + 1, B, 6)), jnp.int32)
  segments = jnp.broadcast_to(jnp.array([1, 1, 1, 1, 2, 2], jnp.int32), tokens.shape)
  batches = transformer.Batch(tokens, segments)
  inner, outer = _at(batches, slice(T)), _at(batches, T)
  eta = wide(
    jax.jit(rater.init)(jax.random.key(1))
  )  # its head starts at 0: move it, or only it has slope
  eta = jax.tree.map(lambda x: x + 0.5 * jnp.asarray(rng.normal(size=x.shape)), eta)
  start = inner_loop.init(optimizer, jax.jit(model.init)(jax.random.key(0)))

  @jax.jit
  def gradient(eta):
    return meta_step.meta_gradient(algorithm, eta, start, inner, outer)[0]

  @jax.jit
  def outer_loss(eta):
    state = start
    for t in range(T):
      scores = rater.score(eta, _at(inner, t))
      weights = jnp.exp(scores) / jnp.exp(scores).sum()
      grads = jax.grad(lambda p, w=weights, b=_at(inner, t): model.loss(p, w, b)[0])(state.params)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      state = inner_loop.InnerState(optax.apply_updates(state.params, updates), opt_state)
    return model.loss(state.params, jnp.ones(B), outer)[0] / B

  g, h = gradient(eta), 1e-7  # AdamW bends sharply at the start
  norm = optax.tree.norm(g)
  moved = lambda h: outer_loss(jax.tree.map(lambda e, d: e + h * d / norm, eta, g))
  assert_close((moved(h) - moved(-h)) / (2 * h), norm, 1e-6)


def test_eta_is_the_mean_of_what_each_members_own_adam_makes_of_it(x64):
  N, meta_steps = 3, 3
  inner_optimizer, meta_optimizer = optax.adam(0.1, eps_root=1e-12), optax.adamw(0.1)
  state, algorithm, _ = _setting(N, meta_optimizer=meta_optimizer, inner_optimizer=inner_optimizer)
  problem, step = algorithm.problem, _jitted(algorithm)
  members = [_at(state.members.inner, i) for i in range(N)]
  adams = [meta_optimizer.init(state.eta) for _ in range(N)]
  eta = state.eta

  @jax.jit
  def by_hand(eta, theta, inner, outer):
    def objective(eta, theta):
      params, opt_state = theta
      weights = problem.metas(eta, inner)[0]
      for t in range(T):
        grads = jax.grad(lambda p, t=t: problem.inner_loss(p, weights[t], _at(inner, t))[0])(params)
        updates, opt_state = inner_optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
      return problem.outer_loss(params, outer), inner_loop.InnerState(params, opt_state)

    return jax.grad(objective, has_aux=True)(eta, theta)

  for k in range(meta_steps):
    inner, outer = _batches(k, N)
    state, _ = step(state, inner, outer)
    etas = []
    for i in range(N):
      g, members[i] = by_hand(eta, members[i], _at(inner, i), _at(outer, i))
      updates, adams[i] = meta_optimizer.update(g, adams[i], eta)
      etas.append(optax.apply_updates(eta, updates))
    eta = jax.tree.map(lambda *x: sum(x) / N, *etas)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    assert_close(state.eta, eta, 1e-10)
    assert_close(state.members.meta_opt, stack(adams), 1e-10)
    assert_close(state.members.inner, stack(members), 1e-10)  # the members persist
  assert state.step == meta_steps and not state.members.skipped.any()


@pytest.mark.parametrize("N, lifetime", [(3, 12), (3, 10), (4, 9), (1, 4)])
def test_members_restart_in_turn_with_new_draws_and_new_optimizer_states(N, lifetime):
  state, algorithm, _ = _setting(N, lifetime, inner_optimizer=optax.sgd(RATE, momentum=0.5))
  inner_optimizer = optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(RATE))
  algorithm = dataclasses.replace(algorithm, inner_optimizer=inner_optimizer)
  state = meta_step.init(algorithm, jax.random.key(3), state.eta, _setting(N)[2])
  step = _jitted(algorithm)
  age = [0] * N
  left = [lifetime - math.floor(i * lifetime / N) for i in range(N)]
  drawn = [tuple(w) for w in np.asarray(state.members.inner.params["w"])]
  for k in range(3 * lifetime // T):
    state, metrics = step(state, *_batches(k, N))
    assert metrics["age"].tolist() == [a + T for a in age]
    for i in range(N):
      age[i], left[i] = age[i] + T, left[i] - T
      restarted = left[i] <= 0
      if restarted:
        age[i], left[i] = 0, lifetime
        drawn.append(tuple(np.asarray(state.members.inner.params["w"][i])))
        assert all(0 <= w <= 1 for w in drawn[-1])
      fresh = [
        state.members.inner.params["clock"][i],
        *(x[i].any() for x in jax.tree.leaves(state.members.inner[1])),
      ]
      assert [not x for x in fresh] == [restarted] * len(fresh)
    assert state.members.age.tolist() == age
    assert state.members.until_reset.tolist() == left
    if k >= lifetime // T:  # the first restarts have spread the ages
      assert len(set(age)) == N
  assert len(drawn) >= 3 * N
  assert len(set(drawn)) == len(drawn)


def _poisoned(inner, outer, where, members, value):
  at = jnp.asarray(members)
  if where == "outer":
    return inner, outer._replace(factor=outer.factor.at[at].set(value))
  return inner._replace(factor=inner.factor.at[at, -1].set(value)), outer


@pytest.mark.parametrize("where, value", [("outer", np.nan), ("outer", np.inf), ("inner", np.nan)])
def test_member_without_a_finite_meta_gradient_is_counted_and_left_out(where, value):
  N, bad = 3, 1
  state, algorithm, _ = _setting(N)
  step = _jitted(algorithm)
  state, _ = step(state, *_batches(0, N))  # Adam states that are not zero
  inner, outer = _batches(1, N)
  new, metrics = step(state, *_poisoned(inner, outer, where, [bad], value))

  good = np.array([0, 2])
  assert metrics["skipped"].tolist() == [False, True, False]
  assert new.members.skipped.tolist() == [0, 1, 0]
  assert_close(_at(new.members.meta_opt, bad), _at(state.members.meta_opt, bad), 0.0)
  _, alone, _ = _setting(2)
  two = state._replace(members=_at(state.members, good))
  others, _ = _jitted(alone)(two, _at(inner, good), _at(outer, good))
  assert_close(new.eta, others.eta, 1e-6)
  assert_close(_at(new.members.meta_opt, good), others.members.meta_opt, 1e-6)
  # A member that diverged starts again, the others continue.
  assert new.members.age.tolist() == [2 * T, 2 * T if where == "outer" else 0, 2 * T]
  assert np.isfinite(new.members.inner.params["w"]).all()


def test_eta_stays_where_no_meta_gradient_is_finite():
  N = 2
  state, algorithm, _ = _setting(N)
  step = _jitted(algorithm)
  state, _ = step(state, *_batches(0, N))
  new, metrics = step(state, *_poisoned(*_batches(1, N), "outer", [0, 1], np.nan))
  assert_close((new.eta, new.members.meta_opt), (state.eta, state.members.meta_opt), 0.0)
  assert new.members.skipped.tolist() == [1, 1] and metrics["skipped"].all()
  assert not metrics["meta_update_norm"].any()


def test_only_the_members_drawn_advance_and_all_are_drawn_in_time():
  N, m = 5, 2
  state, algorithm, _ = _setting(N, members_per_step=m)
  step, visits = _jitted(algorithm), np.zeros(N, int)
  for k in range(20):
    new, metrics = step(state, *_batches(k, m))
    drawn = metrics["member"].tolist()
    assert len(set(drawn)) == m
    visits[drawn] += 1
    others = np.array([i for i in range(N) if i not in drawn])
    moved = np.any(new.members.inner.params["w"] != state.members.inner.params["w"], -1)
    assert moved.tolist() == [i in drawn for i in range(N)]
    assert_close(_at(new.members.meta_opt, others), _at(state.members.meta_opt, others), 0.0)
    state = new
  assert (visits > 0).all() and len(set(visits)) > 1
  assert (state.members.age / T).tolist() == visits.tolist()


def test_many_meta_steps_in_one_call_are_single_calls_and_report_themselves():
  N, M = 2, 3
  state, algorithm, probe = _setting(N, lifetime=6)
  inner, outer = _batches(0, M, N)
  many = jax.jit(functools.partial(meta_step.meta_steps, algorithm))
  end, metrics = many(state, inner, outer, probe)
  assert {name: value.shape for name, value in metrics.items()} == {
    "largest_weight": (M, N),
    "outer_loss": (M, N),
    "inner_loss": (M, N, T),
    "meta_gradient_norm": (M, N),
    "meta_update_norm": (M, N),
    "age": (M, N),
    "skipped": (M, N),
    "member": (M, N),
    "score_autocorrelation": (),
  }
  step, single = _jitted(algorithm), state
  for k in range(M):
    single, one = step(single, _at(inner, k), _at(outer, k))
    assert_close({name: metrics[name][k] for name in one}, one, 1e-6)
  assert_close(
    (single.eta, single.members.meta_opt, single.members.inner),
    (end.eta, end.members.meta_opt, end.members.inner),
    1e-6,
  )
  assert end.members.age.tolist() == single.members.age.tolist()
  assert end.step == M

  before, after = probe.x @ state.eta["v"], probe.x @ end.eta["v"]
  assert_close(end.probe_scores, after, 1e-6)
  expected = np.corrcoef(before, after)[0, 1]
  assert expected < 0.9999
  assert_close(metrics["score_autocorrelation"], expected, 1e-5)


@pytest.mark.parametrize("save", [True, False])
def test_datarater_problem_starts_from_uniform_weights(save):
  config = transformer.TransformerConfig(11, 8, 1, 1, 8, 8)
  rater = datarater.rater(config)
  model = transformer.language_model(config)
  problem = meta_step.datarater_problem(model, rater, save_activations=save)
  tokens = jnp.asarray(np.random.default_rng(0).integers(11, size=(T, B, 6)), jnp.int32)
  batches = transformer.Batch(tokens, jnp.ones_like(tokens))
  metas, eta = jax.jit(problem.metas), jax.jit(rater.init)(jax.random.key(0))
  weights, diagnostics = metas(eta, batches)
  assert_close(weights, np.full((T, B), 1 / B), 1e-6)
  assert_close(diagnostics["effective_sample_size"], B, 1e-6)
  assert diagnostics["score_std"] == 0

  eta = jax.tree.map(lambda x: x + 0.3, eta)
  weights, diagnostics = metas(eta, batches)
  scores = np.stack([jax.jit(rater.score)(eta, _at(batches, t)) for t in range(T)]).astype(
    np.float64
  )
  expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  assert expected.std() > 1e-3
  assert_close(weights, expected, 1e-5)
  assert_close(diagnostics["effective_sample_size"], np.mean(1 / (expected**2).sum(-1)), 1e-5)


def test_paper_meta_optimizer_warms_up_clips_and_decays(x64):
  rate, warmup, decay, clip, b1, b2, eps = 0.1, 4, 0.1, 0.01, 0.9, 0.999, 1e-8
  optimizer = meta_step.paper_meta_optimizer(rate, warmup)
  rng = np.random.default_rng(0)
  eta = rng.normal(size=6)
  params, state = jnp.asarray(eta), optimizer.init(jnp.asarray(eta))
  mean, square = np.zeros(6), np.zeros(6)
  for k in range(2 * warmup):
    g = rng.normal(size=6) * (1e-4 if k % 3 == 1 else 10)  # small ones are not clipped
    updates, state = optimizer.update(jnp.asarray(g), state, params)
    g = g * min(1, clip / np.linalg.norm(g))
    mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
    direction = mean / (1 - b1 ** (k + 1)) / (np.sqrt(square / (1 - b2 ** (k + 1))) + eps)
    step = -rate * min(1, k / warmup) * (direction + decay * eta)
    assert_close(updates, step, 1e-6)  # optax corrects the bias in float32
    params, eta = optax.apply_updates(params, updates), eta + step


@pytest.mark.parametrize("make", [meta_step.paper_meta_optimizer, meta_step.inner_adamw])
def test_without_warm_up_the_first_update_has_the_full_rate(make):
  optimizer, eta = make(0.1, warmup=0, weight_decay=0.0), jnp.ones(3)
  updates, _ = optimizer.update(jnp.array([1.0, -2.0, 3.0]), optimizer.init(eta), eta)
  assert_close(updates, np.array([-0.1, 0.1, -0.1]), 1e-4)


def test_inner_adamw_is_adamw_whose_meta_gradient_survives_a_zero_gradient(x64):
  rate, b1, b2, decay = 0.1, 0.9, 0.99, 0.2
  optimizer = meta_step.inner_adamw(rate, weight_decay=decay)
  theta = np.array([1.0, -2.0, 0.5])
  gradients = np.array([[3.0, -0.1, 0.0], [0.2, 0.4, 0.0], [-1.0, 0.3, 0.0]])

  def run(gradients):
    params, state = jnp.asarray(theta), optimizer.init(jnp.asarray(theta))
    for g in gradients:
      updates, state = optimizer.update(g, state, params)
      params = optax.apply_updates(params, updates)
    return params

  expected, mean, square = theta, np.zeros(3), np.zeros(3)
  for k, g in enumerate(gradients, 1):
    mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
    root = np.sqrt(square / (1 - b2**k))
    direction = np.divide(mean / (1 - b1**k), root, out=np.zeros(3), where=root > 0)
    expected = expected - rate * (direction + decay * expected)
  assert_close(run(jnp.asarray(gradients)), expected, 1e-6)
  assert np.isfinite(jax.grad(lambda g: run(g).sum())(jnp.asarray(gradients))).all()


def test_the_method_loads_no_library_for_data_plots_or_checkpoints():
  code = """
import sys
import transformer, datarater, inner_loop, mixflow, meta_step, kernels
heavy = {"datasets", "grain", "tokenizers", "matplotlib", "orbax", "pyarrow", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"
