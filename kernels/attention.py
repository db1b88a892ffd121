"""Attention within documents as Pallas kernels for TPUs and GPUs, differentiable to second order.

  z = q k^T where a query sees a key,    p = softmax(z),    o = p v

With do the cotangent of o, delta = sum_k do o, and ' for a tangent, on a tile of queries and keys:

  p  = exp(z - lse)            p'  = p (z' - lse'),      lse' = sum p z'
  r  = do v^T - delta          r'  = do' v^T + do v'^T - delta'
  s  = p r                     s'  = p' r + p r'

  values           o  = p v                  tangents  o'  = (p z') v - lse' o + p v'
  query gradients  dq = s k                            dq' = s' k + s k'
  key gradients    dk = s^T q                          dk' = s'^T q + s^T q'
                   dv = p^T do                         dv' = p'^T do + p^T do'

A program has a block of one side and goes along the other, as far as causal queries see: no array
of queries by keys is ever in the device's memory.

              keys                                              keys
            +------+------+-- -+                              +------+
  queries:  | a tile at a time |  o, o', dq, dq'    queries   | in   |  dk, dv, dk', dv'
  a block   +------+------+-- -+                              | turn |
                                                              :      :

A unit is 2 K FLOPs a pair of a query and a key. The passes form 2 and 5 (values, their tangents),
3 and 7 (queries), 4 and 10 (keys); gradients of both sides in one pass would form 5 and 12, but add
up dq in memory. Bytes: each array once where the other side stays on chip, as all of a head does in
a TPU's VMEM; a GPU's programs read it again, from L2.

Keys are taken relative to their mean over the sequence: a softmax does not change by that, and sums
that are zero (of s along a row) are not multiplied with something large after rounding.

Axes: B sequences, H heads, S tokens, K head width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import block_math, pallas_gpu, pallas_tpu
from kernels.operation import Operation

BACKENDS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
HIDDEN = -1e30  # score of a key that a query does not see


def attention(q_BHSK, k_BHSK, v_BHSK, segments_BS, *, causal: bool, backend: str) -> jax.Array:
  """softmax(q k^T) v within each document: [B, H, S, K] in the dtype of q, which is scaled already.

  Differentiable in q, k and v: forward, in reverse, and forward over reverse.

  Args:
    q_BHSK, k_BHSK, v_BHSK: float32 or bfloat16; products are accumulated in float32.
    segments_BS: int32; a query sees the keys of its own segment, if `causal` up to its own place.
    backend: a name in BACKENDS; in the interpreter where the machine has no such device.

  Raises:
    ValueError: an unknown backend, another dtype, or a sequence that does not fit on chip.
  """
  if backend not in BACKENDS:
    raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
  dtype = q_BHSK.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"queries are {dtype}: {backend} takes float32 and bfloat16")
  S, K = q_BHSK.shape[2:]
  # Triton's arrays have powers of two; blocks are whole.
  more_K = max(16, pl.next_power_of_2(K)) - K if backend == "pallas_gpu" else 0
  more_S = -S % padding_block(S, backend)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, more_S), (0, more_K)])
  k_BHSK = k_BHSK - jax.lax.stop_gradient(_mean(k_BHSK))
  segments = jnp.pad(segments_BS, [(0, 0), (0, more_S)], constant_values=-1)[:, None]
  o, _ = VALUES(_How(causal, backend), (segments, *map(pad, (q_BHSK, k_BHSK, v_BHSK))))
  return o[:, :, :S, :K].astype(dtype)


class _How(NamedTuple):
  causal: bool
  backend: str


# The four operations. Arrays are padded; segments are [B, 1, S], lse and delta [B, H, 1, S]. What
# is not a factor of a product is float32: o too, as delta is a difference of large numbers.


def _values(how, arrays):
  """(segments, q, k, v) -> (o, lse)."""
  x = dict(zip(("segments", "q", "k", "v"), arrays, strict=True))
  return _call(_values_kernel, how, x, ("o", "lse"))


def _values_jvp(how, arrays, results, tangents):
  _, q_t, k_t, v_t = tangents
  k_t -= _mean(k_t)
  return VALUE_TANGENTS(how, (*arrays, *results, q_t, k_t, v_t), len(arrays) + len(results))


def _value_tangents(how, arrays):
  """(segments, q, k, v, o, lse, q', k', v') -> (o', lse')."""
  names = "segments", "q", "k", "v", "o", "lse", "q_t", "k_t", "v_t"
  return _call(_value_tangents_kernel, how, dict(zip(names, arrays, strict=True)), ("o", "lse"))


def _value_cotangents(how, arrays, cotangents):
  *inputs, o, lse = arrays
  do, _ = cotangents  # lse is read by these rules alone
  delta = jnp.sum(do * o, -1)[:, :, None]
  return GRADIENTS(how, (*inputs, do.astype(inputs[1].dtype), lse, delta))


def _gradients(how, arrays):
  """(segments, q, k, v, do, lse, delta, tangents of all but the first) -> (dq, dk, dv), or where
  tangents are given, theirs."""
  names = "q", "k", "v", "do", "lse", "delta"
  names = "segments", *names, *(f"{name}_t" for name in names)
  x = dict(zip(names, arrays, strict=False))
  of_queries = _call(_query_gradients_kernel, how, x, ("q",))
  return *of_queries, *_call(_key_gradients_kernel, how, x, ("k", "v"))


def _gradients_jvp(how, arrays, results, tangents):
  _, q_t, k_t, *rest = tangents
  return GRADIENT_TANGENTS(how, (*arrays, q_t, k_t - _mean(k_t), *rest))


def _mean(k_BHSK):
  return jnp.mean(k_BHSK, 2, jnp.float32, keepdims=True).astype(k_BHSK.dtype)


VALUES = Operation("attention", _values, _values_jvp)
VALUE_TANGENTS = Operation("attention's tangent", _value_tangents, transpose=_value_cotangents)
GRADIENTS = Operation("attention's gradient", _gradients, _gradients_jvp)
GRADIENT_TANGENTS = Operation("attention's gradient", _gradients)


# Their kernels. `x` has a reference for each array (tangents end in _t): of the program's own side
# to its block, of the other to all of it, which `other` reads a block at a time.


class _Other(NamedTuple):
  """The other side of a program's tiles."""

  load: Callable  # (names, block) -> those of them that there are, {name: [block, K]}
  columns: Callable  # the same of statistics, {name: [1, block]}
  visible: Callable  # block -> [own, block] bool
  along: Callable  # (step(block, sums) -> sums, sums) -> sums, over all blocks that can be visible


def _values_kernel(x, out, other):
  q = x["q"][...]

  def step(block, sums):
    maximum, total, acc = sums
    k, v = other.load("k v", block).values()
    z = jnp.where(other.visible(block), _scores(q, k), HIDDEN)
    now = jnp.maximum(maximum, jnp.max(z, 1, keepdims=True))
    decay, e = jnp.exp(maximum - now), jnp.exp(z - now)
    total = total * decay + jnp.sum(e, 1, keepdims=True)
    return now, total, acc * decay + _times(e.astype(v.dtype), v)

  row, acc = jnp.zeros((q.shape[0], 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  maximum, total, acc = other.along(step, (row + HIDDEN, row, acc))
  out["o"][...] = acc / total
  out["lse"][...] = (maximum + jnp.log(total)).reshape(1, -1)


def _value_tangents_kernel(x, out, other):
  q, q_t, lse = x["q"][...], x["q_t"][...], _rows(x, "lse")["lse"]

  def step(block, sums):
    lse_t, acc = sums
    k, k_t, v, v_t = other.load("k k_t v v_t", block).values()
    p = jnp.where(other.visible(block), jnp.exp(_scores(q, k) - lse), 0)
    p_z_t = p * (_scores(q_t, k) + _scores(q, k_t))
    acc += _times(p_z_t.astype(v.dtype), v) + _times(p.astype(v.dtype), v_t)
    return lse_t + jnp.sum(p_z_t, 1, keepdims=True), acc

  row, acc = jnp.zeros((q.shape[0], 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  lse_t, acc = other.along(step, (row, acc))
  out["o"][...] = acc - lse_t * x["o"][...]
  out["lse"][...] = lse_t.reshape(1, -1)


def _query_gradients_kernel(x, out, other):
  own, stats = _own(x, "q q_t do do_t"), _rows(x, _STATISTICS)

  def step(block, dq):
    keys = other.load("k k_t v v_t", block)
    _, s, _, s_t = _slopes(own, keys, "q k do v", stats, other.visible(block))
    if s_t is None:
      return dq + _times(s, keys["k"])
    return dq + _times(s_t, keys["k"]) + _times(s, keys["k_t"])

  dq = other.along(step, jnp.zeros(own["q"].shape, jnp.float32))
  out["q"][...] = dq.astype(out["q"].dtype)


def _key_gradients_kernel(x, out, other):
  own = _own(x, "k k_t v v_t")

  def step(block, sums):
    dk, dv = sums
    queries, stats = other.load("q q_t do do_t", block), other.columns(_STATISTICS, block)
    p, s, p_t, s_t = _slopes(own, queries, "k q v do", stats, other.visible(block))
    if s_t is None:
      return dk + _times(s, queries["q"]), dv + _times(p, queries["do"])
    dk += _times(s_t, queries["q"]) + _times(s, queries["q_t"])
    return dk, dv + _times(p_t, queries["do"]) + _times(p, queries["do_t"])

  zero = jnp.zeros(own["k"].shape, jnp.float32)
  dk, dv = other.along(step, (zero, zero))
  out["k"][...], out["v"][...] = dk.astype(out["k"].dtype), dv.astype(out["v"].dtype)


_STATISTICS = "lse lse_t delta delta_t"


def _slopes(own, other, names, stats, visible):
  """(p, s, p', s') [own, other] as factors of products; without tangents the last two are None.

  `names` a b c d: z is own[a] other[b]^T, and do v^T, or its transpose, own[c] other[d]^T."""
  a, b, c, d = names.split()
  dtype = own[a].dtype
  p = jnp.where(visible, jnp.exp(_scores(own[a], other[b]) - stats["lse"]), 0)
  r = _scores(own[c], other[d]) - stats["delta"]
  if "lse_t" not in stats:
    return p.astype(dtype), (p * r).astype(dtype), None, None
  z_t = _scores(own[f"{a}_t"], other[b]) + _scores(own[a], other[f"{b}_t"])
  r_t = _scores(own[f"{c}_t"], other[d]) + _scores(own[c], other[f"{d}_t"]) - stats["delta_t"]
  p_t = p * (z_t - stats["lse_t"])
  return tuple(tile.astype(dtype) for tile in (p, p * r, p_t, p_t * r + p * r_t))


def _scores(a, b):
  return block_math.dot(a, b, (1, 1))


def _times(tile, b):
  return block_math.dot(tile, b, (1, 0))


def _own(x, names):
  return {name: x[name][...] for name in names.split() if name in x}


def _rows(x, names):
  return {name: value.reshape(-1, 1) for name, value in _own(x, names).items()}


def _program(x, out, *, kernel, causal, own_queries, block):
  own, S = x["own_segments"].shape[1], x["segments"].shape[1]
  start = pl.program_id(2) * own
  segments = _rows(x, "own_segments")["own_segments"]
  place = lambda i: pl.ds(pl.multiple_of(i * block, block), block)

  def load(names, i):
    return {name: x[name][place(i), :] for name in names.split() if name in x}

  def columns(names, i):
    return {name: x[name][:, place(i)] for name in names.split() if name in x}

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


UNITS = {  # kernel -> its units, and those of its tangents
  _values_kernel: (2, None),
  _value_tangents_kernel: (None, 5),
  _query_gradients_kernel: (3, 7),
  _key_gradients_kernel: (4, 10),
}


def _call(kernel, how, x, outputs):
  """`kernel` on every block of the side that it owns. Outputs are like arrays of their names."""
  B, H, S, K = x["q"].shape
  dtype, own_queries, tangents = x["q"].dtype, kernel is not _key_gradients_kernel, "q_t" in x
  device = _device(how.backend)
  own, block = block_sizes(kernel, S, K, dtype, tangents, how.backend, device or "")

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
    wide = name in ("o", "lse")
    return jax.ShapeDtypeStruct(
      (B, H, 1, S) if name == "lse" else (B, H, S, K), jnp.float32 if wide else dtype
    )

  x = x | dict(own_segments=x["segments"])
  specs, shapes = {name: spec(name) for name in x}, {name: shape(name) for name in outputs}
  tiles = sum(
    (i * own + own + block - 1) // block if own_queries else (S - i * own + block - 1) // block
    for i in range(S // own)
  )
  pairs = B * H * (tiles * own * block if how.causal else S * S)
  (result,) = pl.pallas_call(
    partial(_program, kernel=kernel, causal=how.causal, own_queries=own_queries, block=block),
    name=f"{kernel.__name__.strip('_').removesuffix('_kernel')}_{own}x{block}",
    grid=(B, H, S // own),
    in_specs=[specs],
    out_specs=[{name: spec(name) for name in outputs}],
    out_shape=[shapes],
    interpret=device is None,
    compiler_params=_compiler_params(how.backend, device or ""),
    cost_estimate=pl.CostEstimate(
      2 * UNITS[kernel][tangents] * K * pairs,
      pairs,
      sum(a.size * a.dtype.itemsize for a in (*x.values(), *shapes.values())),
    ),
  )(x)
  return tuple(result[name] for name in outputs)


def padding_block(S: int, backend: str) -> int:
  """To whole ones of which sequences are padded: a power of two, by an eighth at most unless they
  are short."""
  most, least = (512, 128) if backend == "pallas_tpu" else (128, 16)
  sizes = [most >> i for i in range(10) if most >> i >= least]
  return next((size for size in sizes if -S % size <= S // 8), least)


def block_sizes(
  kernel: Callable, S: int, K: int, dtype, tangents: bool, backend: str, device: str
) -> tuple[int, int]:
  """(own, other): of the block that a program has and of those that it goes along; they divide S,
  which is padded.

  Raises:
    ValueError: a head's keys and values do not fit in a TPU's VMEM.
  """
  size, arrays = jnp.dtype(dtype).itemsize, 4 if tangents else 2  # of a side
  if backend == "pallas_tpu":
    block = math.gcd(S, 256 if tangents else 512)
    needed = 2 * arrays * (S + block) * max(K, 128) * size + 10 * block * block * 4
    vmem = _tpu(device).vmem_bytes
    if needed > vmem * 7 // 8:
      raise ValueError(
        f"attention over S = {S} needs {needed} bytes of VMEM, {device or 'this TPU'} has {vmem}: "
        "use the XLA backend"
      )
    return block, block
  # By what ptxas makes of it: as much as leaves registers (255 a thread) all but unspilled.
  wide = max(1, K * size // 128)
  own = max(16, 128 // max(2, wide))
  if wide == 1 and not tangents and kernel is not _key_gradients_kernel:
    own = 128
  other = max(16, 64 // wide)
  shared = next(c for n, c in pallas_gpu.CHIPS.items() if device.startswith(n)).shared_bytes
  while arrays * K * size * (own + STAGES * other) > shared and other > 16:
    own, other = max(16, own // 2), other // 2
  return math.gcd(S, own), math.gcd(S, other)


STAGES = 2  # of a GPU's loads


def _compiler_params(backend, device):
  if backend == "pallas_tpu":
    limit = _tpu(device).vmem_bytes * 15 // 16
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=limit)
  if pallas_gpu.triton is None:
    raise ValueError("pallas_gpu needs the Triton backend of Pallas, which this JAX lacks")
  return pallas_gpu.triton.CompilerParams(num_warps=4, num_stages=STAGES)


def _tpu(device):
  return next(c for n, c in pallas_tpu.CHIPS.items() if (device or "TPU").startswith(n))


def runs_here(backend: str) -> bool:
  """Whether this machine runs it compiled; "xla" does anywhere."""
  return backend == "xla" or _device(backend) is not None


def _device(backend):
  """The device kind to compile for; None for the interpreter."""
  if BACKENDS[backend].DEVICE is not None:
    return BACKENDS[backend].DEVICE
  here = jax.default_backend() == backend.removeprefix("pallas_")
  return jax.devices()[0].device_kind if here else None
