"""kernels: every backend against a dense float64 numpy computation, to second order.

Axes: N tokens, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import score_weighted_loss, xla

pytestmark = pytest.mark.usefixtures("quick_compile")

N, D, V = 37, 96, 1003
BACKENDS = sorted(kernels.BACKENDS)
# Sums of up to V rounded terms, in units of the last place of the products' inputs.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@pytest.fixture(params=[1, 5], ids=["one_chunk", "five_chunks"])
def chunks(request, monkeypatch):
  """Five chunks of N = 37 tokens: 8 rows each, the last with 3 rows of padding."""
  monkeypatch.setattr(xla, "CHUNK_ELEMENTS", -(-N * V // request.param))


def _inputs(dtype="float32", n=N, d=D, v=V, seed=0):
  """Hidden states, unembedding, targets, and weights of which every third is zero."""
  rng = np.random.default_rng(seed)
  weights = rng.normal(size=n) * (np.arange(n) % 3 > 0)
  return (
    jnp.asarray(rng.normal(size=(n, d)), dtype),
    jnp.asarray(rng.normal(size=(v, d)) * d**-0.5, dtype),
    jnp.asarray(rng.integers(v, size=n), jnp.int32),
    jnp.asarray(weights, jnp.float32),
  )


def _wide(*arrays):
  return [np.asarray(x, np.float64) for x in arrays]


def _dense(hidden, unembedding, targets, weights):
  """(nll, d hidden, d unembedding) in float64 numpy, the derivatives written out."""
  hidden, unembedding, weights = _wide(hidden, unembedding, weights)
  logits = hidden @ unembedding.T
  shifted = logits - logits.max(-1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  row = np.arange(len(logits))
  d_logits = np.exp(log_probs)
  d_logits[row, targets] -= 1
  d_logits *= weights[:, None]
  return -log_probs[row, targets], d_logits @ unembedding, d_logits.T @ hidden


def _loss(backend, targets):
  return lambda h, w, c: score_weighted_loss(h, w, targets, c, backend=backend)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_are_the_dense_ones(backend, dtype, chunks):
  hidden, unembedding, targets, weights = inputs = _inputs(dtype)
  nll, d_hidden, d_unembedding = _dense(*inputs)
  loss, actual_nll = score_weighted_loss(*inputs, backend=backend)
  assert loss.dtype == actual_nll.dtype == jnp.float32
  value_tolerance = TOLERANCE["float32"]  # products and sums are float32 for bfloat16 inputs too
  assert_close(actual_nll, nll, value_tolerance)
  assert abs(loss - _wide(weights)[0] @ nll) < value_tolerance * np.abs(weights * nll).sum()
  grads = jax.jit(jax.grad(_loss(backend, targets), (0, 1, 2)))(hidden, unembedding, weights)
  assert [g.dtype for g in grads] == [hidden.dtype, unembedding.dtype, weights.dtype]
  assert_close(grads, (d_hidden, d_unembedding, nll), TOLERANCE[dtype])
  assert not grads[0][::3].any()  # weight 0: a masked token has no gradient at all


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_second_derivatives_are_differences_of_the_dense_gradient(x64, backend, mode, chunks):
  """d/dh of a projection of (d hidden, d unembedding, d weights) on random directions."""
  hidden, unembedding, targets, weights = _inputs("float64")
  point = hidden, unembedding, weights.astype(jnp.float64)
  rng = np.random.default_rng(1)
  along, onto = ([jnp.asarray(rng.normal(size=x.shape)) for x in point] for _ in range(2))
  grad = jax.grad(_loss(backend, targets), (0, 1, 2))

  def dense_gradient(h):
    hidden, unembedding, weights = (x + h * d for x, d in zip(point, along, strict=True))
    nll, d_hidden, d_unembedding = _dense(hidden, unembedding, targets, weights)
    return d_hidden, d_unembedding, nll

  h = 1e-5
  pairs = zip(dense_gradient(h), dense_gradient(-h), strict=True)
  expected = [(plus - minus) / (2 * h) for plus, minus in pairs]
  if mode == "forward_over_reverse":
    actual = jax.jit(lambda *x: jax.jvp(grad, x, tuple(along))[1])(*point)
    assert_close(list(actual), expected, 1e-6)
  else:
    projected = lambda *x: sum(jnp.vdot(g, o) for g, o in zip(grad(*x), onto, strict=True))
    slopes = jax.jit(jax.grad(projected, (0, 1, 2)))(*point)
    actual = sum(jnp.vdot(s, a) for s, a in zip(slopes, along, strict=True))
    terms = [np.vdot(e, o) for e, o in zip(expected, onto, strict=True)]
    assert abs(actual - sum(terms)) < 1e-6 * sum(map(abs, terms))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_nll_takes_its_cotangent_as_weights(backend, chunks):
  hidden, unembedding, targets, weights = _inputs()
  cotangent = jnp.asarray(np.random.default_rng(2).normal(size=N), jnp.float32)

  def objective(hidden, unembedding, weights):
    loss, nll = score_weighted_loss(hidden, unembedding, targets, weights, backend=backend)
    return 2 * loss + nll @ cotangent

  grads = jax.jit(jax.grad(objective, (0, 1, 2)))(hidden, unembedding, weights)
  both = 2 * weights + cotangent
  nll, d_hidden, d_unembedding = _dense(hidden, unembedding, targets, both)
  assert_close(grads, (d_hidden, d_unembedding, 2 * nll), TOLERANCE["float32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_weights_alone_is_nll_and_forms_no_other(backend):
  hidden, unembedding, targets, weights = _inputs()
  grad = jax.grad(lambda c: _loss(backend, targets)(hidden, unembedding, c))
  assert_close(grad(weights), _dense(*_inputs())[0], TOLERANCE["float32"])
  products = str(jax.make_jaxpr(grad)(weights)).count("dot_general")
  assert products == 1  # the logits


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_exact(backend, sign, chunks):
  """One logit of +-10^4 for the target of each token: nll = 0 or 10^4 more than the best other."""
  hidden, unembedding, targets, weights = _inputs()
  hidden = hidden.at[:, 0].set(100.0)
  targets = jnp.full_like(targets, 5)
  unembedding = unembedding.at[:, 0].set(0.0).at[5].set(0.0).at[5, 0].set(sign * 100.0)
  inputs = hidden, unembedding, targets, weights
  nll, d_hidden, d_unembedding = _dense(*inputs)
  loss, actual = score_weighted_loss(*inputs, backend=backend)
  assert np.abs(actual - nll).max() < 1e4 * TOLERANCE["float32"]
  grads = jax.grad(_loss(backend, targets), (0, 1))(hidden, unembedding, weights)
  scale = 100.0 * np.abs(weights).sum()
  assert np.abs(grads[0] - d_hidden).max() < TOLERANCE["float32"] * scale
  assert np.abs(grads[1] - d_unembedding).max() < TOLERANCE["float32"] * scale
  tangents = [jnp.ones_like(x) for x in (hidden, unembedding)]
  grad = jax.grad(lambda h, w: _loss(backend, targets)(h, w, weights), (0, 1))
  products = jax.jvp(grad, (hidden, unembedding), tuple(tangents))[1]
  assert all(np.isfinite(x).all() for x in (loss, *products))


@pytest.mark.parametrize("backend", BACKENDS)
def test_composes_with_vmap_jit_checkpoint_and_scan(backend, chunks):
  members = [_inputs(seed=seed) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)

  def value(hidden, unembedding, targets, weights):
    return _loss(backend, targets)(hidden, unembedding, weights)

  expected = [_dense(*member)[1:] for member in members]
  expected = tuple(np.stack(x) for x in zip(*expected, strict=True))
  grad = jax.grad(jax.checkpoint(value), (0, 1))
  assert_close(jax.jit(jax.vmap(grad))(*stacked), expected, TOLERANCE["float32"])

  def through_scan(hidden, unembedding):
    xs = (hidden, unembedding, *stacked[2:])
    return jax.lax.scan(lambda total, x: (total + value(*x), None), 0.0, xs)[0]

  in_scan = jax.jit(jax.grad(through_scan, (0, 1)))(*stacked[:2])
  assert_close(in_scan, expected, TOLERANCE["float32"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
  n=st.integers(1, 9),
  d=st.integers(1, 5),
  v=st.integers(1, 12),
  elements=st.integers(1, 60),
  seed=st.integers(0, 99),
)
def test_any_shape_in_any_chunks_is_the_dense_loss(n, d, v, elements, seed):
  hidden, unembedding, targets, weights = inputs = _inputs(n=n, d=d, v=v, seed=seed)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "CHUNK_ELEMENTS", elements)
    loss = jax.value_and_grad(lambda *x: score_weighted_loss(*x, targets, weights), (0, 1), True)
    (_, nll), grads = jax.jit(loss)(hidden, unembedding)
  for actual, expected in zip((nll, *grads), _dense(*inputs), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * (1 + np.abs(expected).max()))


def test_chunked_loss_forms_no_logits_of_all_tokens_at_any_order(monkeypatch, jaxpr_shapes):
  monkeypatch.setattr(xla, "CHUNK_ELEMENTS", -(-N * V // 5))
  hidden, unembedding, targets, weights = _inputs()

  def elements(backend):
    loss = _loss(backend, targets)
    first = jax.grad(loss, (0, 1, 2))
    point = hidden, unembedding, weights
    second = lambda *x: jax.jvp(first, x, x)
    shapes = [s for f in (loss, first, second) for s in jaxpr_shapes(f, *point)]
    return max(np.prod(s) for s in shapes if V in s and D not in s)

  assert elements("xla") <= 8 * V  # a chunk
  assert elements("reference") == N * V  # so the walk sees what it looks for


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(hidden=jnp.ones((2, 3, 4))), r"hidden must be \[N, D\].*hidden float32\[2, 3, 4\]"),
    (dict(unembedding=jnp.ones((V, D + 1))), rf"unembedding float32\[{V}, {D + 1}\]"),
    (dict(targets=jnp.ones(N - 1, jnp.int32)), rf"must be \[N\].*targets int32\[{N - 1}\]"),
    (dict(weights=jnp.ones((N, 1))), rf"must be \[N\].*weights float32\[{N}, 1\]"),
    (dict(targets=jnp.ones(N)), rf"must be integers.*targets float32\[{N}\]"),
    (dict(weights=jnp.ones(N, jnp.int32)), rf"must be floating.*weights int32\[{N}\]"),
    (dict(backend="cuda"), "'cuda'.*reference, xla"),
  ],
)
def test_inputs_that_do_not_fit_are_named_with_their_shapes(changes, message):
  names = ("hidden", "unembedding", "targets", "weights")
  with pytest.raises(ValueError, match=message):
    score_weighted_loss(**(dict(zip(names, _inputs(), strict=True)) | changes))
