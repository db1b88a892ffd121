"""inner_loop.py, mixflow.py: closed form, finite differences, reverse mode, memory and FLOPs.

Axes: T steps, B examples, D inputs, K outputs or classes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import inner_loop
import mixflow
import transformer

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D, K = 3, 4, 3, 2
window = partial(inner_loop.unroll, truncated=True)
EXACT_MODES = ("mixed", "mixed_save", "reverse")
COMBINATIONS = [(inner_loop.unroll, mode) for mode in inner_loop.MODES]
COMBINATIONS.append((window, "mixed"))


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _mlp_params():
  return {"in": _normal(0, D, 5), "bias": _normal(1, 5), "out": _normal(2, 5, K)}


def _mlp(params, x):
  return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def _weighted_regression():
  def loss(params, weights_B, batch):
    x, y = batch
    errors_B = jnp.sum(jnp.square(_mlp(params, x) - y), -1)
    return jnp.sum(jax.nn.softmax(weights_B) * errors_B), errors_B

  return loss, _mlp_params(), _normal(3, T, B), (_normal(4, T, B, D), _normal(5, T, B, K))


def _hyperparameters():
  """The meta-inputs scale the loss (a learning rate, under SGD) and a penalty."""

  def loss(params, meta, batch):
    x, y = batch
    penalty = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    error = jnp.mean(jnp.square(_mlp(params, x) - y))
    return jnp.exp(meta["log_rate"]) * (error + jnp.exp(meta["log_l2"]) * penalty), error

  metas = {"log_rate": _normal(3, T), "log_l2": _normal(4, T)}
  return loss, _mlp_params(), metas, (_normal(5, T, B, D), _normal(6, T, B, K))


def _soft_labels():
  def loss(params, labels_BK, x_BD):
    log_probs_BK = jax.nn.log_softmax(_mlp(params, x_BD))
    return -jnp.mean(jnp.sum(jax.nn.softmax(labels_BK) * log_probs_BK, -1)), log_probs_BK

  return loss, _mlp_params(), _normal(3, T, B, K), _normal(4, T, B, D)


def _no_meta():
  def loss(params, meta, batch):
    assert meta is None
    x, y = batch
    return jnp.mean(jnp.square(_mlp(params, x) - y)), None

  return loss, _mlp_params(), None, (_normal(3, T, B, D), _normal(4, T, B, K))


def _integer_leaves():
  """A meta pytree with labels (integers) and a mask (booleans) among its floating leaves."""

  def loss(params, meta, x_BD):
    log_probs_BK = jax.nn.log_softmax(_mlp(params, x_BD) / jnp.exp(meta["temperature"]))
    nll_B = -jnp.take_along_axis(log_probs_BK, meta["label"][:, None], 1)[:, 0]
    return jnp.sum(meta["pair"][0] * nll_B, where=meta["pair"][1]), nll_B

  metas = {
    "label": jnp.arange(T * B).reshape(T, B) % K,
    "pair": (_normal(3, T, B), jnp.arange(T * B).reshape(T, B) % 3 > 0),
    "temperature": _normal(4, T),
  }
  return loss, _mlp_params(), metas, _normal(5, T, B, D)


def _third_order():
  """Mixed third derivatives, parameters in a nest of tuples, a scalar among them."""

  def loss(params, meta, x_D):
    scale, (a, b) = params
    value = jax.nn.logsumexp(jnp.sin(a * x_D) * jnp.exp(scale * meta)) + jnp.sum(a**4) / 8
    return value + jnp.log1p(jnp.sum(jnp.square(a * b - meta))), value

  return loss, (_normal(0), (_normal(1, D), _normal(2, D))), _normal(3, T), _normal(4, T, D)


def _language_model():
  config = transformer.TransformerConfig(7, 4, 1, 1, 4, 6, dtype="float64")
  model = transformer.language_model(config)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), jax.jit(model.init)(jax.random.key(0)))
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(7, size=(T, B, 6)), jnp.int32)
  segments = jnp.broadcast_to(jnp.array([1, 1, 1, 2, 2, 0], jnp.int32), tokens.shape)

  def loss(params, weights_B, batch):
    return model.loss(params, weights_B, batch)

  return loss, params, jax.nn.softmax(_normal(1, T, B)), transformer.Batch(tokens, segments)


PROBLEMS = [
  _weighted_regression,
  _hyperparameters,
  _soft_labels,
  _no_meta,
  _integer_leaves,
  _third_order,
  _language_model,
]


def _scheduled():
  schedule = optax.cosine_decay_schedule(0.05, 8)
  adamw = optax.adamw(schedule, eps=0.0, eps_root=1e-12, weight_decay=0.1)
  return optax.chain(optax.clip_by_global_norm(0.5), adamw)


OPTIMIZERS = {
  "sgd": lambda: optax.sgd(0.05),
  "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
  "eps_root": lambda: optax.adam(0.05, b2=0.99, eps=0.0, eps_root=1e-12),
  "scheduled_adamw": _scheduled,
}


def _warm_state(problem, optimizer):
  """A state with positive moments: the second moment of a fresh Adam has an edge at 0."""
  rng = np.random.default_rng(8)
  old = lambda x: rng.uniform(0.1, 0.5, x.shape) if jnp.issubdtype(x.dtype, jnp.inexact) else x + 2
  state = jax.eval_shape(lambda params: inner_loop.init(optimizer, params), problem[1])
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return jax.tree.map(jnp.asarray, inner_loop.InnerState(problem[1], jax.tree.map(old, zeros[1])))


def _floating(tree):
  return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _end_value(state):
  """A scalar that depends on every floating leaf of the last state, curved in each."""
  flat = jnp.concatenate([x.ravel() for x in _floating(state)])
  return jnp.sum(jnp.sin(flat + 0.3 * jnp.arange(flat.size)))


def _objective(problem, optimizer, mode, unroll=inner_loop.unroll):
  loss, _, _, batches = problem

  def objective(state, metas):
    return _end_value(unroll(loss, optimizer, state, metas, batches, mode=mode)[0])

  return objective


def _gradients(objective, state, metas):
  """Of the floating leaves of (state, metas), as a list."""
  return _value_and_gradients(objective)(state, metas)[1]


def _value_and_gradients(objective):
  compiled = jax.jit(jax.value_and_grad(objective, (0, 1), allow_int=True))

  def call(state, metas):
    value, grads = compiled(state, metas)
    return value, [x for x in jax.tree.leaves(grads) if x.dtype != jax.dtypes.float0]

  return call


CASES = [(_weighted_regression, name) for name in OPTIMIZERS]
CASES += [(problem, "eps_root") for problem in PROBLEMS[2:]]
CASES += [(_hyperparameters, "sgd")]


@pytest.mark.parametrize("problem, optimizer", CASES)
def test_gradients_of_state_and_metas_are_those_of_reverse_mode_and_of_differences(
  x64, problem, optimizer
):
  problem, optimizer = problem(), OPTIMIZERS[optimizer]()
  state, metas = _warm_state(problem, optimizer), problem[2]
  at = {m: _value_and_gradients(_objective(problem, optimizer, m)) for m in EXACT_MODES}
  results = {mode: function(state, metas) for mode, function in at.items()}
  values, grads = ({mode: r[i] for mode, r in results.items()} for i in range(2))
  assert_close(values, dict.fromkeys(EXACT_MODES, values["reverse"]), 1e-12)
  assert_close(grads, dict.fromkeys(EXACT_MODES, grads["reverse"]), 1e-10)

  # Each leaf moves by a random share of itself: second moments stay positive.
  leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, (state, metas)))
  rng = np.random.default_rng(7)
  floating = [np.issubdtype(x.dtype, np.inexact) for x in leaves]
  directions = [f * rng.normal(size=x.shape) * x for x, f in zip(leaves, floating, strict=True)]

  def moved(h):
    pairs = zip(leaves, directions, strict=True)
    return at["mixed"](*structure.unflatten([(x + h * d).astype(x.dtype) for x, d in pairs]))[0]

  h = 1e-5
  difference = (moved(h) - moved(-h)) / (2 * h)
  directions = [d for d, f in zip(directions, floating, strict=True) if f]
  terms = [np.sum(np.asarray(g) * d) for g, d in zip(grads["mixed"], directions, strict=True)]
  assert abs(difference - sum(terms)) <= 1e-6 * sum(map(abs, terms))


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_quadratic_loss_under_sgd_has_its_closed_form_meta_gradient(x64, mode):
  rate, rng = 0.3, np.random.default_rng(0)
  start, goal = rng.normal(size=(2, D))
  weights, x = rng.uniform(size=(T, B)), rng.normal(size=(T, B, D))

  def loss(theta, w, x):
    return 0.5 * jnp.sum(w[:, None] * jnp.square(theta - x)), None

  def outer(weights):
    optimizer = optax.sgd(rate)
    state = inner_loop.init(optimizer, jnp.asarray(start))
    state, _ = inner_loop.unroll(loss, optimizer, state, weights, jnp.asarray(x), mode=mode)
    return 0.5 * jnp.sum(jnp.square(state.params - goal))

  theta = [start]
  for t in range(T):
    theta.append(theta[-1] - rate * (weights[t].sum() * theta[-1] - weights[t] @ x[t]))
  expected = np.empty((T, B))
  for t in range(T):
    later = np.prod(1 - rate * weights[t + 1 :].sum(-1))  # d theta_T / d theta_{t+1}
    expected[t] = -rate * later * (theta[t] - x[t]) @ (theta[T] - goal)
  assert_close(jax.grad(outer)(jnp.asarray(weights)), expected, 1e-13)


def _random_loss(params, meta, c):
  """A loss of which the random coefficients c are data: compiled once, drawn many times."""
  a, b = params
  mixed = jnp.sin(a @ c[0]) + jnp.tanh(b @ c[1] * meta["u"]) + (a * b) @ c[2]
  value = jnp.sum(mixed * meta["v"]) + jnp.sum(jnp.exp(0.1 * a)) + jnp.sum(mixed**3) / 6
  return value / 4, value


@pytest.fixture(scope="module")
def random_loss_gradients():
  optimizer = optax.sgd(0.05, momentum=0.9)

  def gradients(mode):
    def objective(params, metas, batches):
      state = inner_loop.init(optimizer, params)
      return _end_value(inner_loop.unroll(_random_loss, optimizer, state, metas, batches, mode)[0])

    return jax.jit(jax.grad(objective, (0, 1)))

  return {mode: gradients(mode) for mode in EXACT_MODES}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 1.0))
def test_random_losses_have_the_gradients_of_reverse_mode(random_loss_gradients, seed, scale):
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    a, b = scale * rng.normal(size=(2, 3))
    metas = {"u": rng.normal(size=(T, 3)), "v": rng.normal(size=(T, 3))}
    batches = rng.normal(size=(T, 3, 3, 3))
    grads = {m: f((a, b), metas, batches) for m, f in random_loss_gradients.items()}
  assert_close(grads, dict.fromkeys(EXACT_MODES, grads["reverse"]), 1e-10)


@pytest.mark.parametrize("unroll, mode", COMBINATIONS)
def test_rate_that_an_optimizer_takes_from_the_meta_is_one_that_scales_the_loss(x64, unroll, mode):
  loss, params, metas, batches = _hyperparameters()

  def unscaled(params, meta, batch):
    return loss(params, meta | {"log_rate": 0.0}, batch)

  def update(grads, state, params, *, meta):
    return jax.tree.map(lambda g: -0.05 * jnp.exp(meta["log_rate"]) * g, grads), state

  def gradients(loss, optimizer):
    def end(params, metas):
      state = inner_loop.init(optimizer, params)
      return _end_value(unroll(loss, optimizer, state, metas, batches, mode)[0])

    return jax.jit(jax.value_and_grad(end, (0, 1)))(params, metas)

  of_meta = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  expected = gradients(loss, OPTIMIZERS["sgd"]())
  assert np.abs(expected[1][1]["log_rate"]).min() > 1e-3
  assert_close(gradients(unscaled, of_meta), expected, 1e-12)
  chained = optax.chain(optax.identity(), of_meta)
  assert_close(gradients(unscaled, chained), expected, 1e-12)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_unroll_is_a_loop_of_optax_updates(x64, mode):
  loss, params, metas, batches = _weighted_regression()
  optimizer = _scheduled()
  opt_state, losses = optimizer.init(params), []
  for t in range(T):
    at_t = jax.tree.map(lambda x, t=t: x[t], batches)
    grads, aux = jax.jit(jax.grad(loss, has_aux=True))(params, metas[t], at_t)
    updates, opt_state = jax.jit(optimizer.update)(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    losses.append(aux)
  start = inner_loop.init(optimizer, _mlp_params())
  for unroll in inner_loop.unroll, window:
    run = jax.jit(lambda start, unroll=unroll: unroll(loss, optimizer, start, metas, batches, mode))
    end, aux = run(start)
    assert_close(end, inner_loop.InnerState(params, opt_state), 1e-13)
    assert_close(aux, jnp.stack(losses), 1e-13)


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_adam_that_never_saw_a_gradient_is_differentiable(x64, mode):
  """Rows of an embedding that no token used: v = 0, and d sqrt(v) / d v is infinite there."""

  def loss(params, weights_B, tokens_B):
    x_BD = params["embedding"][tokens_B]
    return jnp.sum(weights_B * jnp.sum(jnp.tanh(x_BD @ params["out"]), -1)), None

  params = {"embedding": _normal(0, 9, D), "out": _normal(1, D, K)}
  tokens = jnp.array([[0, 1, 2, 2], [0, 3, 3, 0], [1, 1, 0, 2]])  # rows 4 to 8: never
  problem = (loss, params, jax.nn.softmax(_normal(2, T, B)), tokens)
  optimizer = OPTIMIZERS["eps_root"]()
  state = inner_loop.init(optimizer, params)

  def gradients(mode):
    unroll = _objective(problem, optimizer, mode)
    objective = lambda params, metas: unroll(state._replace(params=params), metas)
    return jax.jit(jax.grad(objective, (0, 1)))(params, problem[2])

  grads = gradients(mode)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
  assert_close(grads, gradients("reverse"), 1e-10)


@pytest.mark.parametrize("unroll, mode", COMBINATIONS)
def test_aux_and_batches_carry_no_gradient(unroll, mode):
  loss, params, metas, batches = _weighted_regression()
  optimizer = OPTIMIZERS["eps_root"]()

  def aux_and_end(params, metas, batches):
    state = inner_loop.init(optimizer, params)
    end, aux = unroll(loss, optimizer, state, metas, batches, mode=mode)
    return jnp.sum(jnp.sin(aux)), _end_value(end)

  aux, end = (lambda *x, i=i: aux_and_end(*x)[i] for i in range(2))
  for function, constants in (aux, (0, 1)), (end, 2):
    value, grads = jax.jit(jax.value_and_grad(function, constants))(params, metas, batches)
    assert value != 0
    assert all(not g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("mode, steps", [(mode, 3) for mode in inner_loop.MODES] + [("mixed", 1)])
def test_window_is_an_unroll_from_a_constant_state(x64, mode, steps):
  loss, params, metas, batches = _integer_leaves()
  metas, batches = jax.tree.map(lambda x: x[:steps], (metas, batches))
  problem, optimizer = (loss, params, metas, batches), OPTIMIZERS["momentum"]()
  state = _warm_state(problem, optimizer)
  truncated = _gradients(_objective(problem, optimizer, mode, window), state, metas)
  whole = _gradients(_objective(problem, optimizer, mode), state, metas)
  of_metas = len(_floating(metas))
  assert_close(truncated[-of_metas:], whole[-of_metas:], 1e-10)
  assert all(not g.any() for g in truncated[:-of_metas])


def test_first_order_is_reverse_mode_with_a_constant_theta_in_the_gradients(x64):
  problem, optimizer = _weighted_regression(), OPTIMIZERS["eps_root"]()
  loss, _, metas, batches = problem
  state = _warm_state(problem, optimizer)

  def by_hand(state, metas):
    params, opt_state = state
    for t in range(T):
      frozen = jax.lax.stop_gradient(params)
      grads, _ = jax.grad(loss, has_aux=True)(frozen, metas[t], tuple(x[t] for x in batches))
      updates, opt_state = optimizer.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    return _end_value((params, opt_state))

  first_order = _gradients(_objective(problem, optimizer, "first_order"), state, metas)
  assert_close(first_order, _gradients(by_hand, state, metas), 1e-10)
  exact = _gradients(_objective(problem, optimizer, "mixed"), state, metas)
  assert np.abs(first_order[-1] - exact[-1]).max() > 1e-3 * np.abs(exact[-1]).max()


@pytest.mark.parametrize("unroll, mode", COMBINATIONS)
def test_composes_with_jit_vmap_checkpoint_and_scan(x64, unroll, mode):
  loss, params, metas, batches = _weighted_regression()
  optimizer = optax.sgd(0.05, momentum=0.9)
  members = 2
  params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
  metas = jnp.stack([metas, -metas])

  def objective(params, metas):
    state = inner_loop.init(optimizer, params)
    return _end_value(unroll(loss, optimizer, state, metas, batches, mode=mode)[0])

  grad = jax.jit(jax.grad(objective, (0, 1)))
  at = lambda i: jax.tree.map(lambda x: x[i], (params, metas))
  expected = jax.tree.map(lambda *x: jnp.stack(x), *[grad(*at(i)) for i in range(members)])
  remat = jax.grad(jax.checkpoint(objective), (0, 1))
  assert_close(jax.jit(jax.vmap(remat))(params, metas), expected, 1e-12)

  def through_scan(params, metas):
    return jax.lax.scan(lambda c, x: (c + objective(*x), None), 0.0, (params, metas))[0]

  assert_close(jax.jit(jax.grad(through_scan, (0, 1)))(params, metas), expected, 1e-12)


def _deep_mlp(steps, width, batch, depth=6):
  def loss(params, weights_B, x_BD):
    y = x_BD
    for w in params:
      y = jnp.tanh(y @ w)
    return jnp.sum(weights_B * jnp.sum(jnp.square(y), -1)), None

  params = [_normal(i, width, width) * width**-0.5 for i in range(depth)]
  return loss, params, jnp.full((steps, batch), 1 / batch), _normal(9, steps, batch, width)


def _compiled(problem, mode, unroll=inner_loop.unroll, argnums=1):
  optimizer = OPTIMIZERS["eps_root"]()
  state = inner_loop.init(optimizer, problem[1])
  grad = jax.grad(_objective(problem, optimizer, mode, unroll), argnums, allow_int=True)
  return jax.jit(grad).lower(state, problem[2]).compile()


def test_mixed_mode_keeps_gradients_where_reverse_mode_keeps_activations():
  width, batch, depth = 16, 512, 3

  def growth(mode, short, long):
    """Bytes of temporary memory a step."""
    problems = [_deep_mlp(steps, width, batch, depth) for steps in (long, short)]
    memory = [_compiled(p, mode).memory_analysis().temp_size_in_bytes for p in problems]
    return (memory[0] - memory[1]) / (long - short)

  parameters, activations = 4 * depth * width**2, 4 * depth * batch * width
  # A step's gradient and cotangent of the weights; a segment's theta and Adam's two moments.
  S = mixflow.SEGMENT
  expected = parameters + 4 * batch + 3 * parameters / S
  assert growth("mixed", 3 * S, 6 * S) < 1.1 * expected
  assert growth("mixed", 3, S) < 1.1 * (parameters + 4 * batch)
  assert growth("reverse", 4, 12) > activations
  assert growth("mixed_save", 4, 12) > activations


def test_first_step_of_a_window_needs_no_hessian_vector_product():
  problem = _deep_mlp(1, 16, 64, depth=3)
  flops = {
    unroll: _compiled(problem, "mixed", unroll, (0, 1)).cost_analysis()["flops"]
    for unroll in (inner_loop.unroll, window)
  }
  # About 11 units of a forward pass: 3 for g_t, 8 for the product, of which the window needs 3.
  assert 0.4 < flops[window] / flops[inner_loop.unroll] < 0.6


@pytest.mark.parametrize(
  "mode, steps", [(m, 3) for m in EXACT_MODES] + [("mixed", 1), ("mixed", 9)]
)
def test_gradient_of_a_window_is_that_of_its_unrolled_steps(x64, mode, steps):
  loss, params, metas, batches = _integer_leaves()
  repeated = lambda x: jnp.concatenate([x, x[::-1], x])[:steps]
  metas, batches = jax.tree.map(repeated, (metas, batches))
  optimizer = OPTIMIZERS["scheduled_adamw"]()
  state = _warm_state((loss, params, metas, batches), optimizer)
  outer_loss = lambda params: _end_value(params)

  def expected(metas):
    end, aux = inner_loop.unroll(loss, optimizer, state, metas, batches, "reverse")
    return outer_loss(end.params), (end, aux)

  gradient = jax.value_and_grad(expected, has_aux=True, allow_int=True)
  (value, (end, aux)), d_metas = jax.jit(gradient)(metas)
  ours = jax.jit(
    lambda metas: inner_loop.window_gradient(
      outer_loss, loss, optimizer, state, metas, batches, mode
    )
  )(metas)
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, (value, d_metas, end, aux))
  assert_close((ours[0], *ours[2:]), (value, end, aux), 1e-12)
  assert_close(_floating(ours[1]), _floating(d_metas), 1e-10)


@pytest.mark.parametrize("mode", ["mixed", "first_order"])
@pytest.mark.parametrize("unroll", [inner_loop.unroll, window])
def test_segments_and_chunks_change_nothing(x64, monkeypatch, unroll, mode):
  loss, params, metas, batches = _integer_leaves()
  metas, batches = jax.tree.map(lambda x: jnp.concatenate([x, x, x]), (metas, batches))
  problem, optimizer = (loss, params, metas, batches), _scheduled()
  state = _warm_state(problem, optimizer)

  def results(mode=mode, **options):
    run = partial(unroll, **options)
    aux = jax.jit(lambda metas: run(loss, optimizer, state, metas, batches, mode)[1])(metas)
    return aux, _gradients(_objective(problem, optimizer, mode, run), state, metas)

  whole = results(replay=False)
  if mode == "mixed":
    assert_close(whole, results("reverse"), 1e-10)
  monkeypatch.setattr(mixflow, "SEGMENT", 2)
  assert mixflow.plan(9) == (1, (4,), 2)
  assert_close(results(), whole, 1e-12)
  assert mixflow.plan(9, replay=2) == (1, (2, 2, 1), 2)
  assert_close(results(replay=2), whole, 1e-12)
  monkeypatch.setattr(mixflow, "SEGMENT", 1)
  monkeypatch.setattr(mixflow, "LONG", 8)
  assert mixflow.plan(9) == (3, (3, 2), 1)
  assert mixflow.plan(9, replay=2) == (1, (2, 2, 2), 1)
  assert_close(results(), whole, 1e-12)
  assert_close(results(replay=2), whole, 1e-12)


@pytest.mark.parametrize("replay", [0, 1, 2, None])
def test_plans_have_t_steps_and_save_a_root_of_t(replay):
  for T in range(1, 1200, 7):
    p = mixflow.plan(T, replay=replay)
    assert p.first + np.prod(p.loops) * p.length == T
    assert p.first >= 1 and 1 <= p.length <= mixflow.SEGMENT
    if replay is None:
      assert p == mixflow.plan(T, replay=int(T > mixflow.LONG))
    else:
      assert p.saved() <= 1.4 * T + 5
      if T > mixflow.LONG:
        assert p.saved() <= [1.4 * T, 5 * T ** (1 / 2), 10 * T ** (1 / 3)][replay]
  assert mixflow.plan(999, "mixed_save", replay) == (1, (998,), 1)


@pytest.mark.parametrize("replay", [0, 1, 2])
@pytest.mark.parametrize("T", [8, 100, 1000])
def test_compiled_memory_is_what_the_plan_saves(T, replay):
  """In copies of the parameters, a matrix that dwarfs its activations."""
  W, optimizer = 512, optax.adam(1e-3, eps_root=1e-8)
  loss = lambda w_WW, weight, x_W: (weight * jnp.sum(jnp.tanh(x_W @ w_WW) ** 2), None)

  def gradient(w_WW, weights_T, x_TW):
    def outer(weights_T):
      state = inner_loop.init(optimizer, w_WW)
      end, _ = window(loss, optimizer, state, weights_T, x_TW, replay=replay)
      return jnp.sum(end.params**2)

    return jax.grad(outer)(weights_T)

  x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((W, W), (T,), (T, W))]
  temp = jax.jit(gradient).lower(*x).compile().memory_analysis().temp_size_in_bytes / (4 * W * W)
  saved = mixflow.plan(T, replay=replay).saved()
  assert saved < temp < saved + 40


@pytest.mark.parametrize("unroll", [inner_loop.unroll, window])
def test_unknown_mode_is_named_with_the_known_ones(unroll):
  loss, params, metas, batches = _weighted_regression()
  optimizer = optax.sgd(0.1)
  state = inner_loop.init(optimizer, params)
  with pytest.raises(ValueError, match=f"'forward'.*{', '.join(inner_loop.MODES)}"):
    unroll(loss, optimizer, state, metas, batches, mode="forward")


@pytest.mark.parametrize("mode", inner_loop.MODES)
@pytest.mark.parametrize("unroll", [inner_loop.unroll, window])
def test_metas_and_batches_of_unequal_length_are_refused(unroll, mode):
  loss, params, metas, batches = _weighted_regression()
  optimizer = optax.sgd(0.1)
  state, fewer = inner_loop.init(optimizer, params), jax.tree.map(lambda x: x[:-1], batches)
  with pytest.raises(ValueError, match="leading axes|leading axis"):
    unroll(loss, optimizer, state, metas, fewer, mode=mode)
