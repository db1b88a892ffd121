"""The kernels of attention: four passes over tiles of queries and keys, for TPU and GPU alike.

A program owns a block of queries or keys and loops over the blocks of the other side, for causal
attention only over the visible ones. No array of queries by keys is ever in device memory.

              keys                                            keys
            +------+------+-- -+                            +------+
  queries:  | tile | tile |    |  o, o', dq, dq'  queries   | tile |  dk, dv, dk', dv'
  a block   +------+------+-- -+                            +------+
                                                            | tile |
                                                            :      :

A unit is 2 K FLOPs per pair of a query and a key. The passes take 2 units, or 5 for tangents
(values), 3 and 7 (queries), 4 and 10 (keys). Gradients of both sides in one pass would take 5 and
12, but accumulate dq in memory. A TPU reads each array once, as all of a head's other side stays in
VMEM; a GPU's programs read the other side again, from L2.

Axes: B sequences, H heads, S tokens, K head width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import device
from kernels.pallas import tpu_params, triton_params

HIDDEN = -1e30  # score of a key that a query does not see
STAGES = 2  # of a GPU's loads


class How(NamedTuple):
  causal: bool
  backend: str


# In the kernels, `x` and `out` map names to references; a tangent's name ends in _t. A reference of
# the program's own side is its block; one of the other side is the whole, read through `other`.


class _Other(NamedTuple):
  """The other side of a program's tiles."""

  load: Callable  # (names, block) -> {name: [block, K]} for the names in x
  columns: Callable  # (names, block) -> {name: [1, block]}, the same for statistics
  visible: Callable  # block -> [own, block] bool
  along: Callable  # (step(block, sums) -> sums, sums) -> sums over all blocks that can be visible


def values(x, out, other):
  q = x["q"][...]

  def step(block, sums):
    maximum, total, acc = sums
    k, v = other.load("k v", block).values()
    z = jnp.where(other.visible(block), device.dot(q, k, (1, 1)), HIDDEN)
    now = jnp.maximum(maximum, jnp.max(z, 1, keepdims=True))
    decay, e = jnp.exp(maximum - now), jnp.exp(z - now)
    total = total * decay + jnp.sum(e, 1, keepdims=True)
    return now, total, acc * decay + device.dot(e.astype(v.dtype), v, (1, 0))

  row, acc = jnp.zeros((q.shape[0], 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  maximum, total, acc = other.along(step, (row + HIDDEN, row, acc))
  out["o"][...] = acc / total
  out["lse"][...] = (maximum + jnp.log(total)).reshape(1, -1)


def value_tangents(x, out, other):
  q, q_t, lse = x["q"][...], x["q_t"][...], _rows(x, "lse")["lse"]

  def step(block, sums):
    lse_t, acc = sums
    k, k_t, v, v_t = other.load("k k_t v v_t", block).values()
    p = jnp.where(other.visible(block), jnp.exp(device.dot(q, k, (1, 1)) - lse), 0)
    p_z_t = p * device.matmul_tangent(q, q_t, k, k_t, (1, 1))
    acc += device.matmul_tangent(p.astype(v.dtype), p_z_t.astype(v.dtype), v, v_t, (1, 0))
    return lse_t + jnp.sum(p_z_t, 1, keepdims=True), acc

  row, acc = jnp.zeros((q.shape[0], 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  lse_t, acc = other.along(step, (row, acc))
  out["o"][...] = acc - lse_t * x["o"][...]
  out["lse"][...] = lse_t.reshape(1, -1)


def query_gradients(x, out, other):
  own, stats = _read(x, "q q_t do do_t"), _rows(x, _STATISTICS)

  def step(block, dq):
    keys = other.load("k k_t v v_t", block)
    _, s, _, s_t = _slopes(own, keys, "q k do v", stats, other.visible(block))
    return device.matmul_tangent(s, s_t, keys["k"], keys.get("k_t"), (1, 0), dq)

  dq = other.along(step, jnp.zeros(own["q"].shape, jnp.float32))
  out["q"][...] = dq.astype(out["q"].dtype)


def key_gradients(x, out, other):
  own = _read(x, "k k_t v v_t")

  def step(block, sums):
    dk, dv = sums
    queries, stats = other.load("q q_t do do_t", block), other.columns(_STATISTICS, block)
    p, s, p_t, s_t = _slopes(own, queries, "k q v do", stats, other.visible(block))
    dk = device.matmul_tangent(s, s_t, queries["q"], queries.get("q_t"), (1, 0), dk)
    return dk, device.matmul_tangent(p, p_t, queries["do"], queries.get("do_t"), (1, 0), dv)

  zero = jnp.zeros(own["k"].shape, jnp.float32)
  dk, dv = other.along(step, (zero, zero))
  out["k"][...], out["v"][...] = dk.astype(out["k"].dtype), dv.astype(out["v"].dtype)


_STATISTICS = "lse lse_t delta delta_t"


def _slopes(own, other, names, stats, visible):
  """(p, s, p', s') [own, other] in the matmuls' dtype; (p, s, p, s) without tangents.

  `names` are a b c d: z is own[a] other[b]^T; do v^T or its transpose is own[c] other[d]^T."""
  a, b, c, d = names.split()
  scores = lambda a, b: device.dot(own[a], other[b], (1, 1))
  scores_t = lambda a, b: device.matmul_tangent(
    own[a], own[f"{a}_t"], other[b], other[f"{b}_t"], (1, 1)
  )
  p = jnp.where(visible, jnp.exp(scores(a, b) - stats["lse"]), 0)
  r = scores(c, d) - stats["delta"]
  s = p * r
  p_t, s_t = p, s
  if "lse_t" in stats:
    p_t = p * (scores_t(a, b) - stats["lse_t"])
    s_t = p_t * r + p * (scores_t(c, d) - stats["delta_t"])
  return tuple(tile.astype(own[a].dtype) for tile in (p, s, p_t, s_t))


def _read(x, names, index=...):
  return {name: x[name][index] for name in names.split() if name in x}


def _rows(x, names):
  return {name: value.reshape(-1, 1) for name, value in _read(x, names).items()}


def _program(x, out, *, kernel, causal, own_queries, block):
  own, S = x["own_segments"].shape[1], x["segments"].shape[1]
  start = pl.program_id(2) * own
  segments = _rows(x, "own_segments")["own_segments"]
  place = lambda i: pl.ds(pl.multiple_of(i * block, block), block)
  load = lambda names, i: _read(x, names, (place(i), slice(None)))
  columns = lambda names, i: _read(x, names, (slice(None), place(i)))

  def visible(i):
    seen = segments == columns("segments", i)["segments"]
    if causal:
      here = start + jax.lax.broadcasted_iota(jnp.int32, seen.shape, 0)
      there = i * block + jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1)
      seen &= here >= there if own_queries else here <= there
    return seen

  first, last = 0, S // block
  if causal and own_queries:
    last = pl.cdiv(start + own, block)
  elif causal:
    first = jax.lax.div(start, block)
  along = lambda step, sums: jax.lax.fori_loop(first, last, step, sums)
  kernel(x, out, _Other(load, columns, visible, along))


UNITS = {  # kernel -> (units, units with tangents)
  values: (2, None),
  value_tangents: (None, 5),
  query_gradients: (3, 7),
  key_gradients: (4, 10),
}


def run(kernel: Callable, outputs: tuple[str, ...], how: How, x: dict[str, jax.Array]) -> tuple:
  """Runs a kernel on every block of its own side; outputs are shaped like x of the same name."""
  B, H, S, K = x["q"].shape
  dtype, own_queries, tangents = x["q"].dtype, kernel is not key_gradients, "q_t" in x
  kind = device.kind(how.backend)
  own, block = block_sizes(kernel, S, K, dtype, tangents, how.backend, kind or "")
  if how.backend == "pallas_gpu":
    compiler_params = triton_params(warps=4, stages=STAGES)
  else:
    compiler_params = tpu_params("parallel", "parallel", "parallel")

  def spec(name):
    if name == "segments":
      return pl.BlockSpec((None, 1, S), lambda b, h, i: (b, 0, 0))
    if name == "own_segments":
      return pl.BlockSpec((None, 1, own), lambda b, h, i: (b, 0, i))
    mine = (name[0] not in "kv") == own_queries
    size, place = (own, lambda i: i) if mine else (S, lambda i: 0)
    if name in _STATISTICS.split():
      return pl.BlockSpec((None, None, 1, size), lambda b, h, i: (b, h, 0, place(i)))
    return pl.BlockSpec((None, None, size, K), lambda b, h, i: (b, h, place(i), 0))

  def shape(name):
    of = (B, H, 1, S) if name == "lse" else (B, H, S, K)
    return jax.ShapeDtypeStruct(of, jnp.float32 if name in ("o", "lse") else dtype)

  x = x | dict(own_segments=x["segments"])
  specs, shapes = {name: spec(name) for name in x}, {name: shape(name) for name in outputs}
  tiles = sum(pl.cdiv((i + 1) * own, block) for i in range(S // own))  # from either side
  pairs = B * H * (tiles * own * block if how.causal else S * S)
  (result,) = pl.pallas_call(
    partial(_program, kernel=kernel, causal=how.causal, own_queries=own_queries, block=block),
    name=f"{kernel.__name__}_{own}x{block}",
    grid=(B, H, S // own),
    in_specs=[specs],
    out_specs=[{name: spec(name) for name in outputs}],
    out_shape=[shapes],
    interpret=kind is None,
    compiler_params=compiler_params,
    cost_estimate=pl.CostEstimate(
      flops=2 * UNITS[kernel][tangents] * K * pairs,
      transcendentals=pairs,
      bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*x.values(), *shapes.values())),
    ),
  )(x)
  return tuple(result[name] for name in outputs)


def padding_block(S: int, backend: str) -> int:
  """Block size that S is padded to a multiple of: the largest power of two that adds at most S / 8
  tokens, or the smallest size if S is short."""
  most, least = (512, 128) if backend == "pallas_tpu" else (128, 16)
  sizes = [most >> i for i in range(10) if most >> i >= least]
  return next((size for size in sizes if -S % size <= S // 8), least)


def block_sizes(
  kernel: Callable, S: int, K: int, dtype, tangents: bool, backend: str, kind: str
) -> tuple[int, int]:
  """(own, other): sizes of a program's block and of the blocks that it loops over; divisors of S.

  Raises:
    ValueError: a head's keys and values do not fit in a TPU's VMEM.
  """
  size, arrays = jnp.dtype(dtype).itemsize, 4 if tangents else 2  # per side
  if backend == "pallas_tpu":
    block = math.gcd(S, 256 if tangents else 512)
    needed = 2 * arrays * (S + block) * max(K, 128) * size + 10 * block * block * 4
    vmem = device.of_kind(device.TPUS, kind).vmem_bytes
    if needed > vmem * 7 // 8:
      raise ValueError(
        f"attention over S = {S} needs {needed} bytes of VMEM, {kind or 'this TPU'} has {vmem}: "
        "use the XLA backend"
      )
    return block, block
  # From ptxas: the largest blocks that spill next to none of the 255 registers per thread.
  wide = max(1, K * size // 128)
  own = max(16, 128 // max(2, wide))
  if wide == 1 and not tangents and kernel is not key_gradients:
    own = 128
  other = max(16, 64 // wide)
  shared = device.of_kind(device.SHARED_BYTES, kind)
  while arrays * K * size * (own + STAGES * other) > shared and other > 16:
    own, other = max(16, own // 2), other // 2
  return math.gcd(S, own), math.gcd(S, other)
