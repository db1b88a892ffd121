"""A Chinchilla-style transformer in Haiku: pre-RMSNorm, RoPE, GELU MLP, tied embeddings.

With causal attention it is the inner language model theta; without, the body of the DataRater.
Sequences are packed: `segments` numbers the documents of a sequence from 1 (0 = padding). Attention
stays within a document, and positions restart in each.

Axes: B sequences, S tokens, D model width, H heads, K head width, Q queries of one block,
V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention as attention_kernels
from kernels import score_weighted_loss
from runtime import sharding


class Batch(NamedTuple):
  """Packed sequences; leading axes are free."""

  tokens: chex.Array  # int32 [..., S]
  segments: chex.Array  # int32 [..., S]: 0 = padding, documents of a sequence count from 1


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  head_dim: int
  d_ff: int
  dtype: str = "float32"  # of activations and matmul inputs; parameters and reductions are float32
  remat: str = "none"  # what a block recomputes in the backward pass: a name in REMAT
  scan_layers: bool = False  # one compiled block for all layers; unrolling is faster for few layers
  attention_backend: str | None = None  # a name in ATTENTION; None: the fastest on the device
  query_block: int = 256  # queries per block in the xla backend


REMAT = {  # name -> wrapper of a block
  "none": lambda block: block,
  "products": partial(  # keeps its input and its matmuls with weights
    hk.remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
  "block": hk.remat,  # keeps its input
}

# The shapes of Chinchilla's table A9. With a vocabulary of 32,000 the parameter counts equal the
# table's (a test checks), except 1b: 944M. `nano` to `small` are for CPUs.
PRESETS = {
  name: dict(d_model=d, n_layers=layers, n_heads=heads, head_dim=k, d_ff=4 * d)
  for name, (d, layers, heads, k) in {
    "nano": (32, 1, 2, 16),
    "tiny": (64, 2, 2, 32),
    "mini": (128, 2, 4, 32),
    "small": (256, 4, 4, 64),
    "50m": (576, 9, 9, 64),
    "150m": (768, 18, 12, 64),
    "400m": (1280, 18, 10, 128),
    "1b": (1792, 23, 14, 128),
  }.items()
}


def preset(name: str, vocab_size: int, **overrides) -> TransformerConfig:
  """The named shape; from 50m on with scanned, rematerialized blocks, for accelerators."""
  if name not in PRESETS:
    raise ValueError(f"unknown model preset {name!r}; choose one of {', '.join(PRESETS)}")
  deep = PRESETS[name]["n_layers"] > 4
  defaults = PRESETS[name] | dict(remat="block" if deep else "none", scan_layers=deep)
  return TransformerConfig(vocab_size=vocab_size, **(defaults | overrides))


@dataclasses.dataclass
class Transformer(hk.Module):
  """(tokens, segments) [B, S] -> (hidden [B, S, D] in config.dtype, unembedding [V, D] float32)."""

  config: TransformerConfig
  causal: bool

  def __call__(self, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    c = self.config
    chex.assert_equal_shape([tokens, segments])
    chex.assert_rank(tokens, 2)
    init = hk.initializers.RandomNormal(c.d_model**-0.5)
    embedding_VD = hk.get_parameter("embedding", [c.vocab_size, c.d_model], init=init)
    # Embeddings are small, for logits of unit scale; the factor gives inputs of unit scale too.
    x_BSD = (sharding.lookup(embedding_VD, tokens) * math.sqrt(c.d_model)).astype(c.dtype)
    rotation = rope_table(restarting_positions(segments), c.head_dim, _wide(x_BSD))

    def block(x_BSD):
      x_BSD = sharding.constrain_batch(x_BSD)
      return Block(c, self.causal)(x_BSD, segments, rotation)

    block = REMAT[c.remat](block)
    if c.scan_layers:
      x_BSD = hk.layer_stack(c.n_layers)(block)(x_BSD)
    else:
      for _ in range(c.n_layers):
        x_BSD = block(x_BSD)
    return rms_norm(sharding.constrain_batch(x_BSD), "final_norm"), embedding_VD


@dataclasses.dataclass
class Block(hk.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)); both read and write [B, S, D]."""

  config: TransformerConfig
  causal: bool

  def __call__(self, x_BSD, segments_BS, rotation):
    c = self.config
    shrink = (2 * c.n_layers) ** -0.5  # the residual stream keeps unit scale at any depth
    qkv = linear(rms_norm(x_BSD, "attention_norm"), 3 * c.n_heads * c.head_dim, "qkv")
    heads = (*x_BSD.shape[:2], c.n_heads, c.head_dim)
    q, k, v = (x.reshape(heads) for x in jnp.split(qkv, 3, -1))
    q, k = apply_rope(q, rotation), apply_rope(k, rotation)
    mixed_BSHK = attention(q, k, v, segments_BS, c, self.causal)
    mixed = mixed_BSHK.reshape(*x_BSD.shape[:2], c.n_heads * c.head_dim)
    x_BSD = x_BSD + linear(mixed, c.d_model, "attention_out", shrink)
    h = jax.nn.gelu(linear(rms_norm(x_BSD, "mlp_norm"), c.d_ff, "mlp_in"))
    return x_BSD + linear(h, c.d_model, "mlp_out", shrink)


ATTENTION = ("xla", *attention_kernels.BACKENDS)


def attention(q_BSHK, k_BSHK, v_BSHK, segments_BS, config: TransformerConfig, causal: bool):
  """softmax(q k^T / sqrt(K)) v within each document: [B, S, H, K]."""
  q_BSHK = q_BSHK * q_BSHK.shape[-1] ** -0.5
  heads_first = [jnp.swapaxes(x, 1, 2) for x in (q_BSHK, k_BSHK, v_BSHK)]
  backend = config.attention_backend or attention_kernels.fastest(q_BSHK.dtype)
  if backend == "xla":
    kernel = partial(blockwise_attention, causal=causal, query_block=config.query_block)
  else:
    kernel = partial(attention_kernels.attention, causal=causal, backend=backend)
    kernel = sharding.by_sequence(kernel)
  return jnp.swapaxes(kernel(*heads_first, segments_BS), 1, 2)


def blockwise_attention(q_BHSK, k_BHSK, v_BHSK, segments_BS, *, causal: bool, query_block: int):
  """softmax(q k^T) v within each document: [B, H, S, K], q scaled already.

  Works on one block of queries at a time, rematerialized, so beyond one block no [B, H, S, S]
  array exists at any order of differentiation. A causal block reads no key after its last query.
  """
  S = q_BHSK.shape[2]

  def attend(q, k, v, q_segments, k_segments, first_query):
    scores_BHQS = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=_wide(q))
    visible_BQS = q_segments[:, :, None] == k_segments[:, None, :]
    if causal:
      query = first_query + jnp.arange(q.shape[2])
      visible_BQS &= query[:, None] >= jnp.arange(k.shape[2])[None, :]
    scores_BHQS = jnp.where(visible_BQS[:, None], scores_BHQS, -1e30)
    weights = jax.nn.softmax(scores_BHQS, -1).astype(v.dtype)
    return jnp.einsum("bhqs,bhsk->bhqk", weights, v)

  if S <= query_block:
    return attend(q_BHSK, k_BHSK, v_BHSK, segments_BS, segments_BS, 0)
  attend = jax.checkpoint(attend, static_argnums=(5,))
  blocks = []
  for start in range(0, S, query_block):
    stop = min(start + query_block, S)
    seen = stop if causal else S
    q, k, v = q_BHSK[:, :, start:stop], k_BHSK[:, :, :seen], v_BHSK[:, :, :seen]
    blocks.append(attend(q, k, v, segments_BS[:, start:stop], segments_BS[:, :seen], start))
  return jnp.concatenate(blocks, axis=2)


def linear(x, output_size: int, name: str, init_scale: float = 1.0):
  """x @ w, w [input, output] ~ N(0, init_scale^2 / input).

  The parameter is w or its transpose, the smaller side first: on CPUs its gradient is then faster.
  x is flattened to [tokens, input], as the backward pass of a 3-D matmul takes twice as long there.
  """
  input_size = x.shape[-1]
  init = hk.initializers.RandomNormal(init_scale * input_size**-0.5)
  w = hk.get_parameter(name, sorted([input_size, output_size]), init=init).astype(x.dtype)
  y = x.reshape(-1, input_size) @ (w.T if input_size > output_size else w)
  return y.reshape(*x.shape[:-1], output_size)


def rms_norm(x, name: str):
  scale = hk.get_parameter(name, [x.shape[-1]], init=jnp.ones)
  wide = x.astype(_wide(x))
  normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
  return (normed * scale).astype(x.dtype)


def restarting_positions(segments_BS: jax.Array) -> jax.Array:
  """Position of each token within its document: [[1, 1, 2, 2, 2]] -> [[0, 1, 0, 1, 2]]."""
  index = jnp.arange(segments_BS.shape[-1])
  starts = jnp.pad(segments_BS[..., 1:] != segments_BS[..., :-1], [(0, 0), (1, 0)])
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=segments_BS.ndim - 1)


def rope_table(positions_BS: jax.Array, head_dim: int, dtype) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) [B, S, K / 2] of rotary position embeddings, base 10,000.

  A constant table: otherwise XLA recomputes the sines in each layer and head.
  """
  S = positions_BS.shape[-1]
  angles = np.arange(S)[:, None] * 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
  return tuple(jnp.asarray(t, dtype)[positions_BS] for t in (np.cos(angles), np.sin(angles)))


def apply_rope(x_BSHK, rotation):
  """Rotates the pairs (x[i], x[i + K / 2]) by their position's angle."""
  cos, sin = (t[:, :, None] for t in rotation)
  a, b = jnp.split(x_BSHK.astype(_wide(x_BSHK)), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x_BSHK.dtype)


def _wide(x):
  return jnp.promote_types(x.dtype, jnp.float32)


class LanguageModel(NamedTuple):
  """The inner model theta as pure functions."""

  init: Callable[[chex.PRNGKey], Any]  # key -> params
  loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]
  token_loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]


def language_model(
  config: TransformerConfig, loss_backend: str | None = None, microbatches: int = 1
) -> LanguageModel:
  """A causal transformer with the weighted next-token loss

    loss(params, weights_B, batch) -> (sum_i weights_B[i] * l_i, l_B)

  where l_i is the mean of -log P(next token | earlier tokens of its document) over the tokens of
  sequence i that have a next token in the same document, 0 if there are none. Weights that sum to 1
  give the paper's weighted gradient, weights of 1 / B the plain mean. l_B has no gradient.

  `token_loss(params, weights_BS, batch) -> (sum of weights * nll, nll_BS)` has a weight for each
  prediction: position s is that of token s + 1. Weights must be 0 where `next_token_targets` counts
  no prediction; the nll there has no meaning.

  microbatches: parts of a batch that `loss` computes in turn, see `accumulate`.
  """
  forward = hk.without_apply_rng(hk.transform(lambda *x: Transformer(config, causal=True)(*x)))
  init = lambda key: forward.init(key, *[jnp.ones((1, 2), jnp.int32)] * 2)
  score_weighted = sharding.shard_loss(partial(score_weighted_loss, backend=loss_backend))

  def token_loss(params, weights_BS, batch):
    hidden_BSD, unembedding_VD = forward.apply(params, *batch)
    total, nll_N = score_weighted(
      hidden_BSD.reshape(-1, config.d_model),
      unembedding_VD,
      next_token_targets(batch)[0].reshape(-1),
      weights_BS.reshape(-1),
    )
    return total, jax.lax.stop_gradient(nll_N).reshape(weights_BS.shape)

  def loss(params, weights_B, batch):
    counted_BS = next_token_targets(batch)[1]
    counts_B = jnp.maximum(counted_BS.sum(-1), 1)
    total, nll_BS = token_loss(params, counted_BS * (weights_B / counts_B)[:, None], batch)
    return total, jnp.sum(nll_BS * counted_BS, -1) / counts_B

  return LanguageModel(init, accumulate(loss, microbatches), token_loss)


def accumulate(loss: Callable, microbatches: int) -> Callable:
  """Computes `loss` one microbatch at a time, so only one microbatch's activations are in memory.
  The result is that of the whole batch, as the loss is a weighted sum. A microbatch's gradient is
  taken with its loss, so none is computed twice."""
  if microbatches == 1:
    return loss

  @jax.custom_vjp
  def whole(params, weights_B, batch):
    parts = split_batch((weights_B, batch), microbatches)
    totals, nll = jax.lax.map(lambda part: loss(params, *part), parts)
    return totals.sum(), merge_batch(nll)

  def forward(params, weights_B, batch):
    # The checkpoint keeps an outer reverse pass from saving this scan's activations.
    @partial(jax.checkpoint, prevent_cse=False)
    def add_part(of_params, part):
      (total, nll), (more, of_weights) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        params, *part
      )
      return jax.tree.map(jnp.add, of_params, more), (total, nll, of_weights)

    zero = jax.tree.map(jnp.zeros_like, params)
    parts = split_batch((weights_B, batch), microbatches)
    of_params, (totals, nll, of_weights) = jax.lax.scan(add_part, zero, parts)
    return (totals.sum(), merge_batch(nll)), (of_params, merge_batch(of_weights))

  def backward(grads, cotangents):
    of_total, _ = cotangents  # l_B has no gradient
    return *jax.tree.map(lambda g: of_total * g, grads), None

  whole.defvjp(forward, backward)
  return whole


def split_batch(batch: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]: part j takes sequences j, j + parts, ..., so each
  microbatch is spread evenly over the devices."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )


def merge_batch(parts: jax.Array) -> jax.Array:
  """[parts, B / parts] -> [B]: the inverse."""
  return parts.swapaxes(0, 1).reshape(-1)


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(targets, counted) [B, S]: counted is False where the document has no next token."""
  targets_BS = jnp.roll(batch.tokens, -1, axis=-1)
  counted_BS = (batch.segments == jnp.roll(batch.segments, -1, axis=-1)) & (batch.segments > 0)
  return targets_BS, counted_BS.at[..., -1].set(False)


def parameter_count(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(params))
