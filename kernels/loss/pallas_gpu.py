"""The score-weighted loss as Triton kernels and the library's matmuls, for NVIDIA GPUs.

          V: chunks [chunk_V, D] of W one by one, each cast to the matmuls' dtype
        +------------------+------------------+--------- -+
        | t  t  t  t       |                  |           |   t: a program's tile of logits,
  N:    | t  t  t  t       |                  |           |   [block_N, block_V], summed over D in
        | t  t  t  t       |                  |           |   steps of block_D in registers; the
        +------------------+------------------+--------- -+   operands' blocks in shared memory

Kernels, one program per tile, V fastest so that a chunk of W is read from L2:
  statistics  max, sum exp, z[y] (with tangents s, z'[y]) of each tile, [V tiles, N], merged by XLA
  cotangents  q (and q') of the chunk from recomputed logits, [N, chunk_V] in the matmuls' dtype
The library's matmuls follow: d_h += q W, d_W[chunk] = q^T h (tangents by the product rule).

Matmul units (2 N D V FLOPs): statistics 1 [tangents 3], q 1 [3], library 2 [4]: 4 [10] in total.
HBM traffic per chunk in bytes, element sizes e and w (of W): e N D to read h, 3 e N chunk_V to
write q and read it twice, 16 N D to add to d_h in float32, (w + 2 e) chunk_V D for W and its cast,
w chunk_V D for d_W. The kernels mask ragged ends, and the last chunk has its own size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import device
from kernels.loss import block_math
from kernels.loss.second_order import differentiable
from kernels.pallas import triton, triton_params

CHUNK_ELEMENTS = 2**25  # of q: 64 MiB in bfloat16

# Tiles (block_N, block_V, block_D) without and with tangents, and the pipeline. Derived from shared
# memory and registers (64 per thread for a 128 x 128 float32 tile in 8 warps), not measured.
# block_D and the stages shrink until they fit in shared memory.
PREFERRED = {
  "NVIDIA H": ((128, 256, 64), (128, 128, 64)),
  "NVIDIA A100": ((128, 256, 32), (128, 128, 32)),
  "": ((128, 128, 32), (128, 64, 32)),
}
WARPS, STAGES = 8, 3


class Blocks(NamedTuple):
  block_N: int
  block_V: int
  block_D: int
  chunk_V: int
  stages: int


def block_sizes(n: int, d: int, v: int, dtype, kind: str, tangents: bool) -> Blocks:
  """Tile, chunk and pipeline for hidden [n, d] and unembedding [v, d]."""
  tiles, available = (device.of_kind(t, kind) for t in (PREFERRED, device.SHARED_BYTES))
  # Not far beyond the array's size; tensor cores take at least 16.
  block_N, block_V, block_D = (
    min(block, max(16, pl.next_power_of_2(size)))
    for block, size in zip(tiles[tangents], (n, v, d), strict=True)
  )
  # A block each of h and W (and of their tangents) per stage of the pipeline.
  row = (block_N + block_V) * jnp.dtype(dtype).itemsize * (2 if tangents else 1)
  stages = STAGES
  while stages * block_D * row > available:
    if stages > 2:
      stages -= 1
    else:
      block_D //= 2
  # Whole tiles. A chunk size that divides V, if there is one, saves a smaller last chunk's buffers.
  most = min(max(CHUNK_ELEMENTS // n, 1024) // block_V, pl.cdiv(v, block_V)) * block_V
  chunk_V = min(range(block_V, most + 1, block_V), key=lambda c: (c <= most // 2, v % c > 0, -c))
  return Blocks(block_N, block_V, block_D, min(v, chunk_V), stages)


def _statistics(x):
  tangents = "dh" in x or "dw" in x
  blocks = _blocks(x, tangents)
  empty = block_math.empty(len(x["h"]), tangents)

  def chunk(start, size, total):
    parts = _call(_statistics_kernel, _inputs(x, start, size), blocks, size, empty)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), total, parts)
    return block_math.merge(both)

  total = jax.tree.map(lambda x: x[:, 0], empty)
  return block_math.finish(_chunks(chunk, x["w"].shape[0], blocks.chunk_V, total))


def _gradients(x):
  """(d_h, d_W), or their tangents if x has `mean`."""
  h, w = x["h"], x["w"]
  tangents = "mean" in x
  blocks = _blocks(x, tangents)

  def chunk(start, size, carry):
    d_hidden, d_table = carry
    inputs = _inputs(x, start, size)
    out = _call(_cotangent_kernel, inputs, blocks, size, (0, 0) if tangents else (0,))
    q, dq = out[0], out[-1]
    d_hidden = device.matmul_tangent(q, dq, inputs["w"], inputs.get("dw"), (1, 0), d_hidden)
    rows = device.matmul_tangent(q, dq, h, x.get("dh"), (0, 0)).astype(w.dtype)
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, rows, start, 0)

  zero = jnp.zeros(h.shape, jnp.float32), jnp.zeros_like(w)
  d_hidden, d_table = _chunks(chunk, w.shape[0], blocks.chunk_V, zero)
  return d_hidden.astype(h.dtype), d_table


token_nll, nll_and_grads = differentiable("pallas_gpu", _statistics, _gradients)


def _blocks(x, tangents):
  n, d = x["h"].shape
  kind = device.kind("pallas_gpu") or ""
  return block_sizes(n, d, x["w"].shape[0], x["h"].dtype, kind, tangents)


def _inputs(x, start, size):
  """The inputs of a chunk of the vocabulary, in the matmuls' dtype."""
  rows = lambda table: jax.lax.dynamic_slice_in_dim(table, start, size).astype(x["h"].dtype)
  return x | {k: rows(x[k]) for k in ("w", "dw") if k in x} | dict(y=x["y"] - start)


def _chunks(body, v, chunk_V, carry):
  """body(start, size, carry) over the whole chunks and then the smaller last one."""
  whole = v // chunk_V
  carry = jax.lax.fori_loop(0, whole, lambda k, carry: body(k * chunk_V, chunk_V, carry), carry)
  rest = v - whole * chunk_V
  return body(v - rest, rest, carry) if rest else carry


def _call(kernel, x, blocks, size, outputs):
  """`kernel` on every tile of [N, size]; the outputs have the tree structure of `outputs`."""
  n, d = x["h"].shape
  block_N, block_V, block_D, *_ = blocks
  tiles = pl.cdiv(size, block_V), pl.cdiv(n, block_N)
  padded_D = pl.cdiv(d, block_D) * block_D
  token = pl.BlockSpec((block_N, padded_D), lambda j, i: (i, 0))
  table = pl.BlockSpec((block_V, padded_D), lambda j, i: (j, 0))
  column = pl.BlockSpec((block_N,), lambda j, i: (i,))
  specs = {"h": token, "dh": token, "w": table, "dw": table}
  if kernel is _statistics_kernel:
    out_spec = pl.BlockSpec((None, block_N), lambda j, i: (j, i))
    out_shape = jax.ShapeDtypeStruct((tiles[0], n), jnp.float32)
  else:
    out_spec = pl.BlockSpec((block_N, block_V), lambda j, i: (i, j))
    out_shape = jax.ShapeDtypeStruct((n, size), x["h"].dtype)
  (out,) = pl.pallas_call(
    partial(kernel, shape=(n, size, d), block_D=block_D),
    name=f"{kernel.__name__.strip('_')}_{block_N}x{block_V}x{block_D}",
    grid=tiles,
    in_specs=[{name: specs.get(name, column) for name in x}],
    out_specs=[jax.tree.map(lambda _: out_spec, outputs)],
    out_shape=[jax.tree.map(lambda _: out_shape, outputs)],
    interpret=device.kind("pallas_gpu") is None,
    compiler_params=triton_params(WARPS, blocks.stages),
    cost_estimate=pl.CostEstimate(
      flops=2 * n * d * size * (1 + ("dh" in x) + ("dw" in x)),
      transcendentals=n * size,
      bytes_accessed=sum(value.nbytes for value in x.values()),
    ),
  )(x)
  return out


def _statistics_kernel(x, out, *, shape, block_D):
  z, dz, hit, valid, token = _tile(x, shape, block_D)
  stats = block_math.fold(block_math.empty(z.shape[0], dz is not None), z, dz, hit, valid)
  write = lambda ref, value: triton.store(ref, value[:, 0], mask=token)
  jax.tree.map(write, out, stats)


def _cotangent_kernel(x, out, *, shape, block_D):
  z, dz, hit, valid, token = _tile(x, shape, block_D)
  columns = {name: _column(x[name], token) for name in ("lse", "c", "mean", "dc") if name in x}
  values = block_math.logit_cotangents(z, dz, columns, hit, valid)
  for ref, value in zip(out, values, strict=False):  # q alone without tangents
    triton.store(ref, value.astype(ref.dtype), mask=valid & token[:, None])


def _tile(x, shape, block_D):
  """(z, z' or None, hit, valid [block_N, block_V], which tokens exist [block_N])."""
  n, v, d = shape
  block_N, block_V = x["h"].shape[0], x["w"].shape[0]
  token = pl.program_id(1) * block_N + jnp.arange(block_N) < n
  column = pl.program_id(0) * block_V + jnp.arange(block_V)

  def step(k, sums):
    within = jnp.arange(block_D) + k * block_D < d

    def load(name, exists):
      if name not in x:
        return None
      ref = x[name].at[:, pl.ds(k * block_D, block_D)]
      return triton.load(ref, mask=exists[:, None] & within[None], other=0)

    h, dh = (load(name, token) for name in ("h", "dh"))
    w, dw = (load(name, column < v) for name in ("w", "dw"))
    return jax.tree.map(jnp.add, sums, block_math.logits(h, w, dh, dw))

  zero = jnp.zeros((block_N, block_V), jnp.float32)
  sums = zero, zero if "dh" in x or "dw" in x else None
  z, dz = jax.lax.fori_loop(0, pl.cdiv(d, block_D), step, sums)
  hit = _column(x["y"], token) == column[None]
  valid = jnp.broadcast_to((column < v)[None], z.shape)
  return z, dz, hit, valid, token


def _column(ref, token):
  return triton.load(ref, mask=token, other=0)[:, None]
