"""transformer.py: who sees whom, rotary positions, sizes, variants, and the loss against numpy.

Axes: B sequences, S tokens, D model width, V vocabulary.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

import kernels.loss.xla
import transformer
from transformer import Batch, TransformerConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

V, D, S = 13, 16, 10
CONFIG = TransformerConfig(V, D, n_layers=2, n_heads=2, head_dim=8, d_ff=24)
BLOCKED = dataclasses.replace(CONFIG, query_block=4)  # 10 queries: blocks of 4, 4 and 2
# One document, two and padding, and one that starts after padding.
SEGMENTS = jnp.array([[1] * S, [1, 1, 1, 1, 2, 2, 2, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])


def _tokens(seed=0, shape=SEGMENTS.shape, v=V):
  return jnp.asarray(np.random.default_rng(seed).integers(v, size=shape), jnp.int32)


def _transformer(config=CONFIG, causal=True):
  """(params, hidden(params, tokens, segments) [B, S, D])."""
  net = hk.without_apply_rng(
    hk.transform(lambda *x: transformer.Transformer(config, causal=causal)(*x))
  )
  params = jax.jit(net.init)(jax.random.key(0), _tokens(), SEGMENTS)
  return params, jax.jit(lambda *x: net.apply(*x)[0])


def states_by_hand(params, tokens, segments, causal):
  """Hidden states of one sequence in float64 numpy, one token and one head at a time."""
  S = len(tokens)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  K, H = CONFIG.head_dim, CONFIG.n_heads
  norm = lambda x, scale: x / np.sqrt(np.mean(x**2) + 1e-6) * scale
  gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  places = [int((segments[:s] == segments[s]).sum()) for s in range(S)]

  def rotated(x, place):
    turn = np.exp(1j * place * 10_000 ** (-2 * np.arange(K // 2) / K))
    pairs = (x[: K // 2] + 1j * x[K // 2 :]) * turn
    return np.concatenate([pairs.real, pairs.imag])

  x = params["transformer"]["embedding"][tokens] * np.sqrt(D)
  for layer in "transformer/block", "transformer/block_1":
    p, mixed = params[layer], np.zeros((S, H * K))
    q, k, v = np.moveaxis(
      np.stack([norm(row, p["attention_norm"]) @ p["qkv"] for row in x]).reshape(S, 3, H, K), 1, 0
    )
    for s in range(S):
      seen = [t for t in range(S) if segments[t] == segments[s] and not (causal and t > s)]
      for h in range(H):
        query = rotated(q[s, h], places[s])
        scores = [query @ rotated(k[t, h], places[t]) / np.sqrt(K) for t in seen]
        mixed[s, h * K : (h + 1) * K] = np.exp(scores) @ v[seen, h] / np.exp(scores).sum()
    x = x + mixed @ p["attention_out"]
    x = x + np.stack([gelu(norm(row, p["mlp_norm"]) @ p["mlp_in"]) for row in x]) @ p["mlp_out"].T
  return np.stack([norm(row, params["transformer"]["final_norm"]) for row in x])


@pytest.mark.parametrize("causal", [True, False])
def test_states_are_those_of_a_transformer_written_with_loops(causal):
  params, hidden = _transformer(causal=causal)
  # Norms start at 1: move them, or a scale that is left out goes unseen.
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: x * rng.uniform(0.5, 2, x.shape).astype(np.float32), params)
  states = hidden(params, _tokens(), SEGMENTS)
  for b in range(len(SEGMENTS)):
    real = np.asarray(SEGMENTS[b]) > 0
    expected = states_by_hand(params, np.asarray(_tokens()[b]), np.asarray(SEGMENTS[b]), causal)
    assert_close(states[b][real], expected[real], 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_reach_their_own_document_alone_and_the_past_alone_if_causal(causal):
  """Which hidden states move if one token changes: exactly those that may see it."""
  params, hidden = _transformer(BLOCKED, causal)
  tokens = _tokens()
  before = hidden(params, tokens, SEGMENTS)
  for changed in range(S):
    after = hidden(params, tokens.at[:, changed].set((tokens[:, changed] + 1) % V), SEGMENTS)
    moved = np.abs(after - before).max(-1) > 1e-6
    expected = np.array(SEGMENTS == SEGMENTS[:, changed : changed + 1])
    if causal:
      expected[:, :changed] = False
    real = np.array(SEGMENTS) > 0  # what padding sees of padding is nobody's concern
    assert (moved & real).tolist() == (expected & real).tolist(), f"token {changed}"
    assert np.array_equal(after[~expected], before[~expected])


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_have_the_states_that_they_have_alone(causal):
  params, hidden = _transformer(causal=causal)
  tokens = _tokens()
  packed = hidden(params, tokens, SEGMENTS)
  for row, start, stop in [(1, 0, 4), (1, 4, 7)]:
    alone = hidden(
      params, tokens[row : row + 1, start:stop], jnp.ones((1, stop - start), jnp.int32)
    )
    assert_close(packed[row, start:stop], alone[0], 1e-5)


@pytest.mark.parametrize(
  "segments, positions",
  [
    ([1, 1, 1], [0, 1, 2]),
    ([1, 1, 2, 2, 2], [0, 1, 0, 1, 2]),
    ([1, 2, 3, 3, 0, 0], [0, 0, 0, 1, 0, 1]),
    ([0, 0, 1, 1], [0, 1, 0, 1]),
    ([2], [0]),
  ],
)
def test_positions_restart_in_each_document(segments, positions):
  assert transformer.restarting_positions(jnp.array([segments])).tolist() == [positions]


def test_rotary_scores_depend_on_the_distance_alone():
  rng, length = np.random.default_rng(0), 40
  q, k = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(2))
  rotation = transformer.rope_table(jnp.arange(length)[None], 8, jnp.float32)
  everywhere = lambda x: jnp.broadcast_to(x, (1, length, 1, 8))
  rotated = [transformer.apply_rope(everywhere(x), rotation)[0, :, 0] for x in (q, k)]
  scores = np.asarray(rotated[0] @ rotated[1].T)
  by_distance = [np.diagonal(scores, d) for d in range(1 - length, length)]
  assert all(np.ptp(diagonal) < 1e-5 for diagonal in by_distance)
  assert len({round(float(diagonal[0]), 4) for diagonal in by_distance}) == 2 * length - 1
  assert_close(scores[0, 0], q @ k, 1e-6)


def test_rotary_angles_are_those_of_the_published_formula():
  positions = [[0, 1, 0, 1, 2, 3]]
  cos, sin = transformer.rope_table(jnp.array(positions), 6, jnp.float32)
  angles = [[[p * 10_000 ** (-2 * i / 6) for i in range(3)] for p in positions[0]]]
  assert_close((cos, sin), (np.cos(angles), np.sin(angles)), 1e-6)


@pytest.mark.parametrize(
  "causal, changes",
  [
    (True, dict(query_block=4, remat="block")),
    (True, dict(remat="products")),
    (False, dict(query_block=3)),
  ],
)
def test_variants_that_save_memory_compute_the_same(causal, changes):
  params, plain = _transformer(causal=causal)
  _, variant = _transformer(dataclasses.replace(CONFIG, **changes), causal)
  total = lambda hidden: lambda p: jnp.sum(jnp.sin(hidden(p, _tokens(), SEGMENTS)))
  value, grads = jax.jit(jax.value_and_grad(total(plain)))(params)
  assert_close(jax.jit(jax.value_and_grad(total(variant)))(params), (value, grads), 1e-5)


def test_scanned_layers_are_the_unrolled_ones_stacked():
  params, plain = _transformer()
  scanned_params, scanned = _transformer(
    dataclasses.replace(CONFIG, scan_layers=True, remat="products")
  )
  layers = [{k: v for k, v in params.items() if f"/block{i}" in k} for i in ("", "_1")]
  layers[0] = {k: v for k, v in layers[0].items() if "/block_1" not in k}
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *[jax.tree.leaves(layer) for layer in layers])
  names = [k for k in scanned_params if "block" in k]
  treedef = jax.tree.structure({k: scanned_params[k] for k in names})
  restacked = scanned_params | params | jax.tree.unflatten(treedef, stacked)
  restacked = {k: restacked[k] for k in scanned_params}
  expected = plain(params, _tokens(), SEGMENTS)
  assert_close(scanned(restacked, _tokens(), SEGMENTS), expected, 1e-5)
  matrices = [x for x in jax.tree.leaves([scanned_params[k] for k in names]) if x.ndim == 3]
  assert matrices and all(jnp.any(x[0] != x[1]) for x in matrices)  # each layer its own draw


@pytest.mark.parametrize(
  "name, millions", [("50m", 50), ("150m", 150), ("400m", 400), ("1b", 1000)]
)
def test_presets_have_the_parameter_counts_of_their_names(name, millions):
  model = transformer.language_model(transformer.preset(name, 32_000))
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert transformer.parameter_count(params) == pytest.approx(millions * 1e6, rel=0.1)


def test_preset_takes_overrides_and_names_the_known_ones():
  config = transformer.preset("50m", 100, remat="none", n_layers=3)
  assert (config.vocab_size, config.n_layers, config.remat, config.scan_layers) == (
    100,
    3,
    "none",
    True,
  )
  with pytest.raises(ValueError, match="'2b'.*tiny.*1b"):
    transformer.preset("2b", 100)


def test_bfloat16_is_close_to_float32_with_float32_parameters_and_losses():
  batch = Batch(_tokens(), SEGMENTS)
  weights = jnp.array([0.2, 0.3, 0.5])
  results = {}
  for dtype in "float32", "bfloat16":
    model = transformer.language_model(dataclasses.replace(CONFIG, dtype=dtype))
    params = jax.jit(model.init)(jax.random.key(0))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    loss = lambda p, model=model: model.loss(p, weights, batch)
    results[dtype] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert {x.dtype.name for x in jax.tree.leaves(results[dtype])} == {"float32"}
  (loss, nll), grads = results["bfloat16"]
  (exact_loss, exact_nll), exact_grads = results["float32"]
  assert_close((loss, nll), (exact_loss, exact_nll), 2e-2)
  assert_close(grads, exact_grads, 8e-2)  # 2^-8, through some twenty roundings in a row
  assert np.any(nll != exact_nll)


def test_targets_are_the_next_tokens_of_the_same_document():
  tokens = jnp.array([[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]])
  segments = jnp.array([[1, 1, 2, 2, 0], [0, 0, 0, 1, 1], [1, 2, 3, 4, 5]])
  targets, counted = transformer.next_token_targets(Batch(tokens, segments))
  assert counted.astype(int).tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
  assert targets[counted].tolist() == [6, 8, 9]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_loss_is_the_weighted_sum_of_mean_cross_entropies_of_the_sequences(backend):
  segments = jnp.concatenate([SEGMENTS, jnp.zeros_like(SEGMENTS[:1]), jnp.arange(1, S + 1)[None]])
  tokens = _tokens(shape=segments.shape)
  weights = jnp.array([0.5, -1.0, 2.0, 3.0, 4.0])
  model = transformer.language_model(CONFIG, backend)
  params = jax.jit(model.init)(jax.random.key(0))
  _, hidden = _transformer()
  states = np.asarray(hidden(params, tokens, segments), np.float64)
  table = np.asarray(params["transformer"]["embedding"], np.float64)
  expected = np.zeros(len(segments))
  for b in range(len(segments)):
    nll = []
    for s in range(S - 1):
      if segments[b, s] == segments[b, s + 1] > 0:
        logits = table @ states[b, s]
        nll.append(np.log(np.exp(logits).sum()) - logits[tokens[b, s + 1]])
    expected[b] = np.mean(nll) if nll else 0.0
  assert (expected[:3] > 1).all() and (expected[3:] == 0).all()  # the last two: nothing to predict

  batch = Batch(tokens, segments)
  loss, nll = jax.jit(model.loss)(params, weights, batch)
  assert_close(nll, expected, 1e-5)
  assert_close(loss, weights @ expected, 1e-5)
  d_weights = jax.jit(jax.grad(model.loss, 1, has_aux=True))(params, weights, batch)[0]
  assert_close(d_weights, expected, 1e-5)
  grad = jax.jit(jax.grad(model.loss, has_aux=True))
  grads, _ = grad(params, weights * (expected == 0), batch)
  assert all(not g.any() for g in jax.tree.leaves(grads))  # finite, and of no effect


def test_losses_of_the_sequences_carry_no_gradient():
  model = transformer.language_model(CONFIG)
  params = jax.jit(model.init)(jax.random.key(0))
  of_nll = lambda p: jnp.sum(jnp.sin(model.loss(p, jnp.ones(3), Batch(_tokens(), SEGMENTS))[1]))
  value, grads = jax.jit(jax.value_and_grad(of_nll))(params)
  assert value != 0 and all(not g.any() for g in jax.tree.leaves(grads))


def test_no_order_of_differentiation_forms_all_scores_or_all_logits(monkeypatch, jaxpr_shapes):
  """Sizes that occur nowhere else: S = 23 positions, V = 101 words."""
  s, v, block, rows = 23, 101, 8, 6
  tokens = _tokens(shape=(1, s), v=v)
  batch = Batch(tokens, jnp.ones_like(tokens))
  monkeypatch.setattr(kernels.loss.xla, "CHUNK_ELEMENTS", rows * v)

  def shapes(config, backend):
    model = transformer.language_model(config, backend)
    params = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    grad = jax.grad(lambda p: model.loss(p, jnp.ones(1), batch)[0])
    return jaxpr_shapes(grad, params) + jaxpr_shapes(lambda p: jax.jvp(grad, (p,), (p,)), params)

  def score_rows(shapes):
    """Queries of the largest array [..., queries, keys] of one head or more."""
    return max(a[-2] for a in shapes if len(a) == 4 and a[-1] == s)

  def logit_rows(shapes):
    return max(np.prod(a) // v for a in shapes if v in a and D not in a)

  config = dataclasses.replace(CONFIG, vocab_size=v, query_block=block)
  frugal = shapes(config, "xla")
  assert score_rows(frugal) <= block
  assert not any(a.count(s) >= 2 for a in frugal)
  assert logit_rows(frugal) <= rows
  lavish = shapes(dataclasses.replace(config, query_block=s), "reference")
  assert (score_rows(lavish), logit_rows(lavish)) == (s, s)  # the walk sees what it looks for


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_blocks_saves_no_scores_for_the_backward_pass(causal):
  length, width = 64, 5
  x_BHSK = jnp.zeros((1, 2, length, width))
  segments = jnp.ones((1, length), jnp.int32)

  def saved_scores(query_block):
    """Shapes [B, H, Q, keys] among the residuals."""

    def attention(*qkv):
      return transformer.blockwise_attention(*qkv, segments, causal=causal, query_block=query_block)

    residuals = jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], *[x_BHSK] * 3)
    return [r.shape for r in jax.tree.leaves(residuals) if r.ndim == 4 and r.shape[3] != width]

  assert saved_scores(8) == []
  assert (1, 2, length, length) in saved_scores(length)
