"""kernels/attention/ against dense float64 attention, to second order.

Axes: B sequences, H heads, S tokens, K head width.
"""

import dataclasses
import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

import transformer
from kernels import pallas
from kernels.attention import BACKENDS, attention, passes
from planner import flops

pytestmark = pytest.mark.usefixtures("quick_compile")

B, H, S, K = 2, 2, 80, 24
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
  """Several blocks of either side, of unequal sizes; Triton's do not divide S."""
  monkeypatch.setattr(passes, "padding_block", lambda S, backend: 32)

  def sizes(pass_, *_):
    return (16, 32) if pass_ is passes.key_gradients else (32, 16)

  monkeypatch.setattr(passes, "block_sizes", sizes)


# One document; two, and padding; one that starts after padding and goes on to the end.
SEGMENTS = np.array([[1] * 33 + [2] * 40 + [0] * 7, [0] * 5 + [1] * 75], np.int32)


def inputs(dtype="float32", n=4, seed=0, mean=0.0):
  """n arrays [B, H, S, K]; with mean > 0, all tokens of a head share an offset."""
  rng = np.random.default_rng(seed)
  shared = mean * rng.normal(size=(n, B, H, 1, K))
  return [jnp.asarray(x, dtype) for x in rng.normal(size=(n, B, H, S, K)) * 0.7 + shared]


def dense(causal, segments=SEGMENTS):
  """(q, k, v) -> o, all scores at once."""
  visible = segments[:, :, None] == segments[:, None, :]
  visible &= np.tri(segments.shape[1], dtype=bool) if causal else True

  def attend(q, k, v):
    scores = jnp.where(visible[:, None], jnp.einsum("bhqk,bhsk->bhqs", q, k), -jnp.inf)
    return jnp.einsum("bhqs,bhsk->bhqk", jax.nn.softmax(scores), v)

  return attend


def fused(causal, backend, segments=SEGMENTS):
  return lambda *qkv: attention(*qkv, jnp.asarray(segments), causal=causal, backend=backend)


def orders(attend, qkv, along, weights):
  """((o, o'), (gradient, gradient')) of `attend` at qkv, tangents along `along`; the gradient is
  of a function of o that is not linear."""
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(wide(attend(*x))) * weights), (0, 1, 2))
  at = tuple(qkv), tuple(along)
  return jax.jit(lambda *at: (jax.jvp(attend, *at), jax.jvp(gradient, *at)))(*at)


def in_float64(attend, *arguments):
  with jax.enable_x64(True):
    widened = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arguments)
    return jax.tree.map(np.asarray, orders(attend, *widened))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_gradients_and_their_tangents_are_the_dense_ones(backend, causal, dtype):
  *qkv, weights = inputs(dtype)
  arguments = qkv, inputs(dtype, 3, seed=1), weights.astype(jnp.float32)
  actual = orders(fused(causal, backend), *arguments)
  assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
  assert_close(actual, in_float64(dense(causal), *arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_their_own_choice(backend, monkeypatch):
  """A sequence of 272 has three on a TPU; on a GPU, padded to 288, nine."""
  monkeypatch.undo()
  longer = lambda x: jnp.concatenate([x] * 4, 2)[:1, :1, :272]
  *qkv, weights = map(longer, inputs())
  along = list(map(longer, inputs(n=3, seed=1)))
  segments = np.repeat([[1, 2]], [100, 172], 1)
  attend, arguments = fused(True, backend, segments), (qkv, along, weights)
  assert_close(orders(attend, *arguments), in_float64(dense(True, segments), *arguments), 1e-5)


@pytest.mark.parametrize(
  "backend, kind, least",
  [("pallas_gpu", "NVIDIA H100", 16), ("pallas_gpu", "", 16), ("pallas_tpu", "TPU v5 lite", 128)],
)
def test_blocks_divide_a_sequence_that_is_padded_little(backend, kind, least, monkeypatch):
  monkeypatch.undo()
  for S in (*range(1, 520), 1000, 2048, 3000):
    padded = S + -S % passes.padding_block(S, backend)
    assert padded - S <= max(S // 8, least - 1)
    for pass_, tangents, K, dtype in itertools.product(
      passes.UNITS, (True, False), (16, 64, 128, 256), TOLERANCE
    ):
      sizes = passes.block_sizes(pass_, padded, K, dtype, tangents, backend, kind)
      assert all(size >= least and padded % size == 0 for size in sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_keys_have_in_common_costs_no_digits(backend):
  """Along a query, sums over keys are zero, and would be of their mean's size after rounding."""
  *qkv, weights = inputs("bfloat16", mean=3)
  along = inputs("bfloat16", 3, seed=1, mean=3)
  qkv[0], along[0] = (x / 16 for x in (qkv[0], along[0]))
  arguments = qkv, along, weights.astype(jnp.float32)
  expected = in_float64(dense(True), *arguments)

  def errors(attend):
    relative = lambda a, e: np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e)
    return np.array(jax.tree.leaves(jax.tree.map(relative, orders(attend, *arguments), expected)))

  def blockwise(*qkv):
    return transformer.blockwise_attention(*qkv, jnp.asarray(SEGMENTS), causal=True, query_block=16)

  assert (errors(fused(True, backend)) < 2 * errors(blockwise)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_documents_do_not_matter(backend):
  """Nor do keys that are not seen, however large their scores would be."""
  q, k, v = inputs(n=3)
  second = SEGMENTS[0] == 2
  noise = jnp.where(second[:, None], 0, 30 * q)
  o, other = (fused(True, backend)(q, *x) for x in ((k, v), (k + noise, v + noise)))
  assert_close(other[0, :, second], o[0, :, second], 1e-5)
  assert jnp.abs(other - o)[0, :, 1:33].max(-1).min() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_are_a_batch(backend):
  """vmap of a gradient's derivative, and the gradient of a vmap, one argument not mapped."""
  *qkv, weights = inputs()
  q, k, v = (jnp.stack([x, x[::-1]]) for x in qkv)
  attend = fused(True, backend, np.stack([SEGMENTS[0]] * 2))
  loss = lambda *x: jnp.sum(jnp.sin(attend(*x)) * weights)
  gradient = jax.jit(jax.grad(loss))
  product = jax.jit(lambda q, k: jax.jvp(gradient, (q, k, qkv[2]), (k, q, qkv[2]))[1])
  one_by_one = [product(q[i], k[i]) for i in range(2)]
  assert_close(jax.jit(jax.vmap(product))(q, k), jnp.stack(one_by_one), 1e-5)
  of_all = jax.jit(jax.grad(lambda q: jnp.sum(jax.vmap(loss, (0, 0, None))(q, k, qkv[2]))))(q)
  each = [gradient(q[i], k[i], qkv[2]) for i in range(2)]
  assert_close(of_all, jnp.stack(each), 1e-5)


@pytest.mark.parametrize(
  "backend, remat, scan, causal",
  [
    ("pallas_gpu", "block", True, True),
    ("pallas_gpu", "products", True, False),
    ("pallas_tpu", "block", True, True),
    ("pallas_tpu", "none", False, False),
  ],
)
def test_a_transformer_is_the_same_with_it(backend, remat, scan, causal):
  """To second order, in layers that are scanned and rematerialized."""
  config = transformer.TransformerConfig(13, 16, 2, 2, 8, 24, remat=remat, scan_layers=scan)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(13, size=SEGMENTS.shape), jnp.int32)

  def product(config):
    net = hk.without_apply_rng(
      hk.transform(lambda *x: transformer.Transformer(config, causal)(*x)[0])
    )
    params = jax.jit(net.init)(jax.random.key(0), tokens, SEGMENTS)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(net.apply(p, tokens, SEGMENTS))))
    along = jax.tree.map(jnp.cos, params)
    return jax.jit(lambda p: jax.jvp(gradient, (p,), (along,)))(params)

  expected = product(config)
  assert_close(product(dataclasses.replace(config, attention_backend=backend)), expected, 2e-5)


def test_orders_that_there_are_not_say_so():
  attend = lambda x: jnp.sum(jnp.sin(fused(True, "pallas_gpu")(x, x, x)))
  (x,) = inputs(n=1)
  with pytest.raises(
    NotImplementedError, match="not for reverse mode twice.*use the 'xla' backend"
  ):
    jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(attend)(x) ** 2)), x)
  along = lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]
  with pytest.raises(NotImplementedError, match="attention's tangent has no forward derivative"):
    jax.eval_shape(along(along(attend)), x)


def test_inputs_that_do_not_fit_are_told(monkeypatch):
  q, k, v = inputs(n=3)
  with pytest.raises(ValueError, match="'cuda'; choose one of pallas_tpu, pallas_gpu"):
    fused(True, "cuda")(q, k, v)
  with pytest.raises(ValueError, match="float16: pallas_gpu takes float32 and bfloat16"):
    fused(True, "pallas_gpu")(q.astype(jnp.float16), k, v)
  monkeypatch.setattr(pallas, "triton", None)
  with pytest.raises(ValueError, match="needs the Triton backend"):
    fused(True, "pallas_gpu")(q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_operations_are_counted_by_pairs(causal):
  """Tiles on the causal diagonal count in full."""
  shape = jax.ShapeDtypeStruct((B, H, 96, 32), jnp.float32)
  attend = fused(causal, "pallas_gpu", np.ones((B, 96), np.int32))
  gradient = jax.grad(lambda *x: jnp.sum(attend(*x)), (0, 1, 2))
  product = lambda q, k, v: jax.jvp(gradient, (q, k, v), (q, k, v))[1]
  # Tiles of 32 x 16 (16 x 32 of a block of keys); those that a causal query can see.
  pairs = (2 + 4 + 6) * 32 * 16 if causal else 96 * 96
  unit = 2 * 32 * B * H * pairs
  assert flops.count(attend, *[shape] * 3).matmuls == 2 * unit
  assert flops.count(gradient, *[shape] * 3).matmuls == (2 + 3 + 4) * unit
  assert flops.count(product, *[shape] * 3).matmuls == (2 + 5 + 7 + 10) * unit
