"""meta_gradient_check.py: exact losses pass, and each way of breaking one is named.

Axes: T steps, B examples, D inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_gradient_check import check_meta_gradient

pytestmark = pytest.mark.usefixtures("quick_compile")

T, B, D = 2, 4, 3


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"in": _normal(0, D, 5), "out": _normal(1, 5)}
METAS = {
  "scores": _normal(2, T, B),
  "log_l2": _normal(3, T),
  "label": np.arange(T * B).reshape(T, B),
}
BATCHES = _normal(4, T, B, D)


def _smooth(params, meta, x_BD, activation=jnp.tanh):
  errors_B = jnp.square(activation(x_BD @ params["in"]) @ params["out"] - meta["label"] % 2)
  penalty = jnp.exp(meta["log_l2"]) * jnp.sum(jnp.square(params["in"]))
  return jax.nn.softmax(meta["scores"]) @ errors_B + penalty, errors_B


def _check(loss, optimizer=None, **options):
  outer_loss = lambda params: jnp.sum(jnp.sin(params["in"])) + jnp.sum(params["out"] ** 2)
  optimizer = optimizer or optax.sgd(0.1, momentum=0.9)
  rows = check_meta_gradient(loss, optimizer, PARAMS, METAS, BATCHES, outer_loss, **options)
  return {row.mode: row for row in rows}


def test_smooth_loss_is_exact_in_each_mode_and_the_table_says_so(capsys):
  modes = ("reverse", "mixed", "mixed_save", "first_order")
  rows = _check(_smooth, modes=modes)
  assert list(rows) == list(modes)
  for mode in modes[:3]:
    assert rows[mode].ok and rows[mode].to_reverse < 1e-12 and rows[mode].to_differences < 1e-6
  assert not rows["first_order"].ok and rows["first_order"].to_differences > 1e-3
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ["mode", *modes]
  assert all(line.endswith("exact") for line in lines[1:4])


def test_adam_with_its_epsilon_under_the_root_is_exact_and_without_is_not_finite():
  untouched = lambda params, meta, x: _smooth(params | {"out": 1 + 0 * params["out"]}, meta, x)
  safe, unsafe = optax.adam(0.1, eps=0.0, eps_root=1e-12), optax.adam(0.1)
  assert all(row.ok for row in _check(untouched, safe).values())
  for row in _check(untouched, unsafe).values():
    assert row.verdict.startswith("not finite at ")


def _constant_weights(params, meta, x_BD):
  return _smooth(params, meta | {"scores": jax.lax.stop_gradient(meta["scores"])}, x_BD)


def _constant_features(params, meta, x_BD):
  """Scores that read the loss of the model as it stands, as online selection does."""
  errors_B = jax.lax.stop_gradient(_smooth(params, meta, x_BD)[1])
  return _smooth(params, meta | {"scores": meta["scores"] - errors_B}, x_BD)


@pytest.mark.parametrize(
  "loss, where",
  [
    (_constant_weights, "metas/scores"),
    (_constant_features, "params/"),
  ],
)
def test_what_is_not_the_derivative_is_found_with_its_place(loss, where):
  for row in _check(loss).values():
    assert row.verdict.startswith(f"not the derivative at {where}"), row
    assert row.to_differences > 1e-3


def test_rule_whose_own_derivative_is_wrong_is_found_though_the_modes_agree_on_the_loss():
  @jax.custom_jvp
  def frozen(x):
    return jnp.tanh(x)

  # Right to first order; its slope is a constant to the second.
  slope = lambda x: jax.lax.stop_gradient(1 - jnp.tanh(x) ** 2)
  frozen.defjvp(lambda x, t: (jnp.tanh(x[0]), slope(x[0]) * t[0]))
  rows = _check(lambda *x: _smooth(*x, activation=frozen))
  assert all(row.verdict.startswith("not the derivative") for row in rows.values())


def test_integer_path_is_a_meta_that_no_gradient_reaches():
  def rounded(params, meta, x_BD):
    return _smooth(params, meta | {"scores": jnp.round(meta["scores"])}, x_BD)

  rows = _check(rounded)
  assert {row.verdict for row in rows.values()} == {"no gradient reaches metas/scores"}


def test_mistaken_custom_jvp_is_found_where_mixed_mode_relies_on_a_symmetric_hessian():
  @jax.custom_jvp
  def mistaken(x):
    return jnp.tanh(x)

  mistaken.defjvp(lambda x, t: (jnp.tanh(x[0]), 1.5 * (1 - jnp.tanh(x[0]) ** 2) * t[0]))
  rows = _check(lambda *x: _smooth(*x, activation=mistaken))
  for mode in ("mixed", "mixed_save"):
    assert rows[mode].verdict.startswith("not the derivative") and rows[mode].to_reverse > 1e-3


def test_custom_vjp_with_a_differentiable_rule_is_exact():
  tanh = jax.custom_vjp(jnp.tanh)
  tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, t: ((1 - jnp.tanh(x) ** 2) * t,))
  assert all(row.ok for row in _check(lambda *x: _smooth(*x, activation=tanh)).values())
