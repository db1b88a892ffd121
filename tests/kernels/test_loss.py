"""kernels/loss/: every backend against a dense float64 numpy computation, to second order.

Axes: N tokens, D model width, V vocabulary.
"""

import os

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import optax
import pytest
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import inner_loop
import transformer
from benchmarks import loss
from kernels import device, pallas, score_weighted_loss
from kernels.loss import BACKENDS as BY_NAME
from kernels.loss import block_math, pallas_gpu, pallas_tpu, xla

pytestmark = pytest.mark.usefixtures("quick_compile", "no_races")

N, D, V = 37, 96, 1003
BACKENDS = sorted(BY_NAME)
PALLAS = ["pallas_gpu", "pallas_tpu"]
PLAIN = sorted(set(BACKENDS) - set(PALLAS))
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(params=[1, 5], ids=["one_block", "many_blocks"])
def blocks(request, monkeypatch):
  """The default sizes, by which N = 37 tokens are one block; or many blocks, the last ragged."""
  if request.param > 1:
    _small_blocks(monkeypatch)


def _small_blocks(monkeypatch, cores=2):
  monkeypatch.setattr(xla, "CHUNK_ELEMENTS", -(-N * V // 5))  # 8 rows each, the last with 3 of pad
  monkeypatch.setattr(device, "TPUS", {"": device.Tpu(64 << 20, cores)})
  # 3 x 4 blocks, 2 x 3 x 2 in 2 cores
  monkeypatch.setattr(pallas_tpu, "PREFERRED", {"": [(16, 256)] * 4})
  monkeypatch.setattr(pallas_gpu, "PREFERRED", {"": ((16, 128, 32), (16, 64, 64))})
  monkeypatch.setattr(pallas_gpu, "WARPS", 4)
  monkeypatch.setattr(pallas_gpu, "STAGES", 2)
  monkeypatch.setattr(pallas_gpu, "CHUNK_ELEMENTS", 0)  # 1,024 columns at least: one chunk of V


@pytest.fixture
def no_effects(monkeypatch):
  """The interpreter that watches for races uses callbacks, which remat refuses."""
  monkeypatch.setattr(pallas_tpu, "INTERPRET", True)


@pytest.fixture
def no_races(monkeypatch, capfd):
  """The TPU interpreter watches for races and reads past the end; copies run when awaited."""
  watchful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
  monkeypatch.setattr(pallas_tpu, "INTERPRET", watchful)
  yield
  pltpu.reset_tpu_interpret_mode_state()  # needed after a failure
  assert "RACE DETECTED" not in capfd.readouterr().out


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
def test_value_and_gradients_are_the_dense_ones(backend, dtype, blocks):
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


def _dense_product(point, along, targets):
  """The derivative of (d hidden, d unembedding, d weights) along `along`: central differences.

  In float64 with a step of 1e-5 they are exact to about 1e-9.
  """
  point, along = _wide(*point), _wide(*along)

  def gradient(h):
    hidden, unembedding, weights = (x + h * d for x, d in zip(point, along, strict=True))
    nll, d_hidden, d_unembedding = _dense(hidden, unembedding, targets, weights)
    return d_hidden, d_unembedding, nll

  h = 1e-5
  return [(p - m) / (2 * h) for p, m in zip(gradient(h), gradient(-h), strict=True)]


@pytest.mark.parametrize("perturbed", ["all", "hidden", "unembedding", "weights"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_over_reverse_is_the_dense_one(backend, dtype, perturbed, monkeypatch):
  """Along all inputs, and along one alone, where the tangents of the others are symbolic zeros."""
  _small_blocks(monkeypatch, cores=1)
  hidden, unembedding, targets, weights = _inputs(dtype)
  point = dict(hidden=hidden, unembedding=unembedding, weights=weights)
  rng = np.random.default_rng(1)
  along = {k: jnp.asarray(rng.normal(size=x.shape), x.dtype) for k, x in point.items()}
  moving = {k: x for k, x in point.items() if perturbed in ("all", k)}
  still = {k: x for k, x in point.items() if k not in moving}
  along = {k: x if k in moving else jnp.zeros_like(x) for k, x in along.items()}
  grad = jax.grad(_loss(backend, targets), (0, 1, 2))

  def product(moving, tangents):
    at = lambda moving: grad(*(moving.get(k, still.get(k)) for k in point))
    return jax.jvp(at, (moving,), (tangents,))[1]

  actual = jax.jit(product)(moving, {k: along[k] for k in moving})
  expected = _dense_product(point.values(), along.values(), targets)
  assert_close(list(actual), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_linearized_gradient_is_the_product(backend, no_effects):
  hidden, unembedding, targets, weights = _inputs()
  point = hidden, unembedding, weights
  grads, product = jax.linearize(jax.grad(_loss(backend, targets), (0, 1, 2)), *point)
  nll, d_hidden, d_unembedding = _dense(*_inputs())
  assert_close(list(grads), [d_hidden, d_unembedding, nll], TOLERANCE["float32"])
  expected = _dense_product(point, point, targets)
  assert_close(list(product(*point)), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_second_derivatives_are_differences_of_the_dense_gradient(x64, backend, mode, blocks):
  """d/dh of a projection of (d hidden, d unembedding, d weights) on random directions."""
  hidden, unembedding, targets, weights = _inputs("float64")
  point = hidden, unembedding, weights.astype(jnp.float64)
  rng = np.random.default_rng(1)
  along, onto = ([jnp.asarray(rng.normal(size=x.shape)) for x in point] for _ in range(2))
  grad = jax.grad(_loss(backend, targets), (0, 1, 2))
  expected = _dense_product(point, along, targets)
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
def test_gradient_through_nll_takes_its_cotangent_as_weights(backend, blocks):
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
def test_extreme_logits_stay_exact(backend, sign, blocks):
  """One logit of +-10^4 for the target of each token: nll = 0 or 10^4 more than the best other."""
  hidden, unembedding, targets, weights = _inputs()
  hidden = hidden.at[:, 0].set(100.0)
  targets = jnp.full_like(targets, 5)
  unembedding = unembedding.at[:, 0].set(0.0).at[5].set(0.0).at[5, 0].set(sign * 100.0)
  inputs = hidden, unembedding, targets, weights
  nll, d_hidden, d_unembedding = _dense(*inputs)
  loss, actual = score_weighted_loss(*inputs, backend=backend)
  assert_close(actual, nll, 1e-6)  # digits of 10^4; 0 exactly
  grads = jax.jit(jax.grad(_loss(backend, targets), (0, 1)))(hidden, unembedding, weights)
  scale = 100.0 * np.abs(weights).sum()
  assert np.abs(grads[0] - d_hidden).max() < TOLERANCE["float32"] * scale
  assert np.abs(grads[1] - d_unembedding).max() < TOLERANCE["float32"] * scale
  assert abs(loss - _wide(weights)[0] @ nll) <= TOLERANCE["float32"] * np.abs(weights * nll).sum()
  point = hidden, unembedding, weights
  along = [jnp.asarray(np.random.default_rng(3).normal(size=x.shape), x.dtype) for x in point]
  grad = jax.grad(_loss(backend, targets), (0, 1, 2))
  products = jax.jit(lambda *x: jax.jvp(grad, x, tuple(along))[1])(*point)
  expected = _dense_product(point, along, targets)
  for product, e in zip(products, expected, strict=True):  # e is 0 where the target has all
    assert np.abs(product - e).max() <= TOLERANCE["float32"] * max(100, np.abs(e).max())


@pytest.mark.parametrize("backend", PLAIN)
def test_two_equal_logits_of_10_to_the_4_keep_the_digits_of_their_halves(backend):
  """In float32 lse = 10^4 + log 2 keeps three digits of the log: xla subtracts the maximum."""
  hidden, unembedding, targets, weights = _inputs()
  hidden = hidden.at[:, 0].set(100.0)
  unembedding = unembedding.at[:, 0].set(0.0).at[jnp.array([5, 900])].set(0.0)
  unembedding = unembedding.at[jnp.array([5, 900]), 0].set(100.0)
  targets = jnp.full_like(targets, 5)
  _, nll = score_weighted_loss(hidden, unembedding, targets, weights, backend=backend)
  assert_close(nll, np.full(N, np.log(2)), TOLERANCE["float32"])
  grad = jax.jit(jax.grad(_loss(backend, targets), 1))(hidden, unembedding, weights)
  d_unembedding = np.zeros((V, D))
  d_unembedding[[900, 5]] = np.outer([0.5, -0.5], _wide(weights)[0] @ _wide(hidden)[0])
  assert_close(grad, d_unembedding, TOLERANCE["float32"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_any_integer_type_count_all_columns(backend):
  """In int8 column 256 + t would wrap to t."""
  hidden, unembedding, targets, weights = _inputs(n=9, d=4, v=300)
  targets = targets % 40
  narrow = hidden, unembedding, targets.astype(jnp.int8), weights
  _, nll = score_weighted_loss(*narrow, backend=backend)
  assert_close(nll, _dense(*narrow)[0], TOLERANCE["float32"])


@pytest.mark.parametrize("backend", PLAIN)  # the scaling is common to all
def test_cotangent_of_a_bfloat16_loss_is_not_rounded(backend):
  hidden, unembedding, targets, weights = _inputs("bfloat16")
  grad = lambda scale: jax.grad(lambda h: scale * _loss(backend, targets)(h, unembedding, weights))
  scale = 1.25 + 2.0**-8  # between two bfloat16 numbers
  one, scaled = _wide(grad(1.0)(hidden), grad(scale)(hidden))
  assert abs(np.vdot(scaled, one) / np.vdot(one, one) - scale) < 2.0**-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_composes_with_vmap_jit_checkpoint_and_scan(backend, blocks, no_effects):
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


@pytest.mark.parametrize("backend", PALLAS)
def test_reverse_over_reverse_through_pallas_names_the_backends_that_can(backend):
  hidden, unembedding, targets, weights = _inputs(n=4, d=3, v=5)
  grad = jax.grad(_loss(backend, targets), (0, 1, 2))
  for i in range(3):
    projected = lambda h, i=i: jnp.sum(grad(h, unembedding, weights)[i])
    with pytest.raises(NotImplementedError, match=f"the {backend} loss.*use the 'xla' backend"):
      jax.eval_shape(jax.grad(projected), hidden)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
  n=st.integers(1, 9),
  d=st.integers(1, 5),
  v=st.integers(1, 12),
  elements=st.integers(1, 60),
  seed=st.integers(0, 99),
)
def test_any_shape_in_any_chunks_is_the_dense_loss(n, d, v, elements, seed):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "CHUNK_ELEMENTS", elements)
    _check_all_orders("xla", n, d, v, seed)


@pytest.mark.parametrize("backend", PALLAS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(n=st.integers(1, 50), d=st.integers(1, 40), v=st.integers(1, 600), seed=st.integers(0, 99))
def test_any_shape_in_any_blocks_is_the_dense_loss(backend, n, d, v, seed):
  with pytest.MonkeyPatch.context() as patch:
    _small_blocks(patch)
    _check_all_orders(backend, n, d, v, seed)


def _check_all_orders(backend, n, d, v, seed):
  hidden, unembedding, targets, weights = inputs = _inputs(n=n, d=d, v=v, seed=seed)
  point = hidden, unembedding, weights
  loss = lambda *x: score_weighted_loss(*x[:2], targets, x[2], backend=backend)
  grad = jax.grad(lambda *x: loss(*x)[0], (0, 1, 2))
  nll, grads, product = jax.jit(lambda *x: (loss(*x)[1], grad(*x), jax.jvp(grad, x, x)[1]))(*point)
  expected, d_hidden, d_unembedding = _dense(*inputs)
  expected = expected, d_hidden, d_unembedding, expected, *_dense_product(point, point, targets)
  for a, e in zip((nll, *grads, *product), expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * (1 + np.abs(e).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_product_under_vmap_and_checkpoint_is_that_of_each_member(backend, blocks, no_effects):
  members = [_inputs(n=20, d=8, v=150, seed=seed) for seed in (0, 1)]
  hidden, unembedding, targets, weights = jax.tree.map(lambda *x: jnp.stack(x), *members)

  def product(hidden, unembedding, targets, weights):
    grad = jax.grad(jax.checkpoint(_loss(backend, targets)), (0, 1, 2))
    point = hidden, unembedding, weights
    return jax.jvp(grad, point, point)[1]

  actual = jax.jit(jax.vmap(product))(hidden, unembedding, targets, weights)
  for i, (h, w, y, c) in enumerate(members):
    expected = _dense_product((h, w, c), (h, w, c), y)
    assert_close([x[i] for x in actual], expected, TOLERANCE["float32"])


@pytest.mark.parametrize("backend", PALLAS)
def test_members_share_what_is_not_mapped(backend, no_effects):
  """One unembedding for all members: their gradients by it add up."""
  (h, w, y, c), (other, *_) = (_inputs(n=20, d=8, v=150, seed=seed) for seed in (0, 1))
  total = lambda h, w: jnp.sum(jax.vmap(_loss(backend, y), (0, None, None))(h, w, c))
  stacked = jnp.stack([h, other])
  grads = jax.jit(jax.grad(total, (0, 1)))(stacked, w)
  each = [_dense(x, w, y, c)[1:] for x in (h, other)]
  expected = np.stack([each[0][0], each[1][0]]), each[0][1] + each[1][1]
  assert_close(grads, expected, TOLERANCE["float32"])


def test_a_function_is_traced_again_for_another_device():
  inputs = _inputs(n=4, d=3, v=5)
  loss = jax.jit(lambda *x: score_weighted_loss(*x, backend="pallas_tpu"))
  here = str(loss.trace(*inputs).jaxpr)
  with device.compile_for("NVIDIA H100"):
    assert device.kind("pallas_tpu") is None and device.kind("pallas_gpu") == "NVIDIA H100"
  with device.compile_for("TPU v5 lite"):
    there = str(loss.trace(*inputs).jaxpr)
  assert "interpret=False" in there and "interpret=False" not in here
  assert str(loss.trace(*inputs).jaxpr) == here


def test_sharded_over_tokens_and_vocabulary(monkeypatch, cache):
  """On 8 devices, which this process does not have."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert jobs.succeed("tests/kernels/sharded_loss.py", cache).split() == BACKENDS


def test_statistics_of_a_shard_ignore_a_target_past_its_last_column():
  z = jnp.zeros((1, 4))
  column = jnp.arange(4)[None]
  stats = block_math.fold(block_math.empty(1, False), z, None, column == 3, column < 3)
  lse, target, _, _ = block_math.finish(stats)
  assert target == 0 and abs(lse - np.log(3)) < 1e-6


def test_merged_statistics_are_those_of_all_columns():
  rng = np.random.default_rng(0)
  z, dz = jnp.asarray(rng.normal(size=(2, 5, 12)) * 30, jnp.float32)
  hit = jnp.arange(12)[None] == jnp.asarray(rng.integers(12, size=(5, 1)))
  valid = jnp.ones_like(hit)
  empty = block_math.empty(5, True)
  whole = block_math.finish(block_math.fold(empty, z, dz, hit, valid))
  halves = [
    block_math.fold(empty, z[:, h], dz[:, h], hit[:, h], valid[:, h])
    for h in (slice(0, 5), slice(5, 12))
  ]
  merged = block_math.merge(jax.tree.map(lambda *x: jnp.stack(x), *halves))
  assert_close(block_math.finish(merged), whole, 1e-6)
  one_by_one = empty
  for i in range(12):
    at = slice(i, i + 1)
    one_by_one = block_math.fold(one_by_one, z[:, at], dz[:, at], hit[:, at], valid[:, at])
  assert_close(block_math.finish(one_by_one), whole, 1e-6)


@pytest.mark.parametrize("kernel", ["statistics", "gradients", "tangent_statistics", "tangents"])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_tpu_blocks_fit_in_vmem_at_any_width(kind, kernel):
  chip = device.of_kind(device.TPUS, kind)
  with device.compile_for(kind):
    limit = pallas.tpu_params().vmem_limit_bytes  # that the compiler is given
  for d in (1, 1280, 4096):
    block_N, block_V, cores = pallas_tpu.block_sizes(
      16384, d, 256_000, "bfloat16", "float32", kind, kernel
    )
    size = pallas_tpu.vmem_bytes(block_N, block_V, d, "bfloat16", "float32", kernel)
    assert size < limit < chip.vmem_bytes
    assert block_N % 16 == block_V % 128 == 0
  assert (cores == 2) == (kind == "TPU v5" and kernel in ("gradients", "tangents"))
  with pytest.raises(ValueError, match="D = 1000000 needs .* bytes of VMEM.*xla"):
    pallas_tpu.block_sizes(16384, 10**6, 256_000, "bfloat16", "float32", kind, kernel)


def test_blocks_of_a_400m_model_are_these():
  tpu = lambda kind, kernel: pallas_tpu.block_sizes(
    16384, 1280, 32_000, "bfloat16", "float32", kind, kernel
  )
  assert tpu("TPU v5 lite", "gradients") == (512, 1280, 1)
  assert tpu("TPU v5", "tangents") == (256, 640, 2)
  assert tpu("TPU v6 lite", "statistics") == (2048, 640, 1)
  gpu = lambda kind, tangents: pallas_gpu.block_sizes(
    16384, 1280, 32_000, "bfloat16", kind, tangents
  )[:4]
  assert gpu("NVIDIA H100 80GB HBM3", False) == (128, 256, 64, 1280)
  assert gpu("NVIDIA A100-SXM4-40GB", True) == (128, 128, 32, 1280)


def test_chunks_of_tokens_hold_less_than_one_of_pad(monkeypatch):
  monkeypatch.setattr(xla, "CHUNK_ELEMENTS", 10)  # 7 chunks for 10 tokens; 5 of 2 tokens do
  (chunks,), n = xla._split((jnp.ones((10, 3)),), 7)
  assert chunks.shape == (5, 2, 3) and n == 10


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
    (dict(unembedding=jnp.ones((0, D))), rf"at least 1.*unembedding float32\[0, {D}\]"),
    (dict(weights=jnp.ones(N, jnp.int32)), rf"must be floating.*weights int32\[{N}\]"),
    (dict(backend="cuda"), "'cuda'.*reference, xla, pallas_tpu, pallas_gpu"),
    (dict(hidden=jnp.ones((N, D), jnp.float16), backend="pallas_gpu"), "hidden is float16.*'xla'"),
  ],
)
def test_inputs_that_do_not_fit_are_named_with_their_shapes(changes, message):
  names = ("hidden", "unembedding", "targets", "weights")
  with pytest.raises(ValueError, match=message):
    score_weighted_loss(**(dict(zip(names, _inputs(), strict=True)) | changes))


@pytest.mark.parametrize("order, minimum", loss.MINIMUM.items())
def test_matmul_units(order, minimum):
  """In 2 N D V FLOPs: the minimum dense and in chunks; the kernels recompute the logits once."""
  n, d, v = 2048, 256, 32_000
  for backend in BACKENDS:
    shapes = loss.inputs(n, d, v, "bfloat16", order)
    with device.compile_for("TPU v5 lite" if backend == "pallas_tpu" else "NVIDIA H100"):
      units = loss.matmul_flops(None, loss.orders(backend)[order], *shapes) / (2 * n * d * v)
    more = {"value": 0, "gradient": 1, "hvp": 3}[order] if backend in PALLAS else 0
    assert units == pytest.approx(minimum + more, rel=1e-2), backend


def test_matmul_counter_on_a_known_case():
  a = jnp.ones((3, 4))
  body = lambda x, _: (x @ x.T @ a + jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: 2 * x), None)
  loop = lambda a: (jax.lax.scan(body, a, None, length=5)[0], a @ a.T)[0]
  one = 2 * 3 * 3 * 4  # x [3, 4]: x x^T and its product with a cost the same
  assert loss.matmul_flops(None, jax.jit(loop), a) == 5 * 2 * one  # what is not returned is free


@pytest.mark.parametrize("backend", PALLAS)
def test_meta_gradient_through_two_inner_steps(backend, no_effects):
  """Inner and outer loss of a language model on one backend: the meta-gradient is that of `xla`."""
  config = transformer.TransformerConfig(
    vocab_size=50, d_model=16, n_layers=1, n_heads=2, head_dim=8, d_ff=32, remat="block"
  )
  tokens = jax.random.randint(jax.random.key(0), (3, 2, 12), 0, 50)
  batches = transformer.Batch(tokens, jnp.ones_like(tokens))
  inner, outer = (jax.tree.map(lambda x, i=i: x[i], batches) for i in (slice(0, 2), 2))
  optimizer = optax.sgd(0.1)  # AdamW would enlarge differences of rounding

  def meta_gradient(backend):
    model = transformer.language_model(config, backend)
    state = inner_loop.init(optimizer, jax.jit(model.init)(jax.random.key(1)))

    def outer_loss(weights):
      last, _ = inner_loop.unroll(model.loss, optimizer, state, weights, inner)
      return model.loss(last.params, jnp.full(2, 0.5), outer)[0]

    return jax.jit(jax.grad(outer_loss))(jnp.asarray([[0.7, 0.3], [0.4, 0.6]]))

  expected = meta_gradient("xla")
  assert np.abs(expected).max() > 0
  assert_close(meta_gradient(backend), expected, 1e-5)
