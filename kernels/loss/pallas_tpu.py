"""The score-weighted loss as Mosaic kernels for TPUs.

A matmul unit is 2 N D V FLOPs; numbers for tangents are in brackets.

Statistics: lse and z[y] (with tangents also s and z'[y]) of all tokens; 1 unit [3].

              V: inner, W [block_V, D] streams by          grid (N blocks, V blocks)
            +------+------+------+-- -+
  N: outer  |  z   |  z   |  z   |    |  stays in VMEM: h [block_N, D], the running sums
            +------+------+------+-- -+  [block_N, 1]; a tile of z lives for one step

Gradients: d_h and d_W from recomputed z; 3 units [7], 4 [10] in total.

              V: outer, in 1 or 2 cores        grid (cores, V blocks of a core, N blocks)
            +------+------+
  N: inner  |  q   |      |  stays in VMEM: W [block_V, D] in the matmuls' dtype, d_W [block_V, D]
            +------+------+  in float32. d_h [N, D] float32 stays in HBM: a step reads its block,
            |  q   |      |  adds q W and writes it back; the read overlaps with the step's matmuls,
            +------+------+  the write with the next step's
            :      :      :

HBM traffic in bytes, with element sizes e (h) and w (W):
  statistics  e N D [2x] + w V D [2x] N / block_N       minimum e N D + w V D
  gradients   (e [2x] + 8) N D V / block_V + 2 w V D [1.5x]
A gradient step does 6 block_N block_V D FLOPs per 10 block_N D bytes (bfloat16): 0.6 block_V FLOPs
per byte [1.2 block_V].

Tokens of weight 0 pad N to whole blocks and zeros pad D to whole lanes; the end of V is masked. v4
and v5p have two cores per chip: each takes half of the vocabulary and sums its own d_h.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import device
from kernels.loss import block_math
from kernels.loss.second_order import differentiable
from kernels.pallas import tpu_params

INTERPRET: bool | pltpu.InterpretParams = True  # without a TPU; tests watch for races

LANES = 128
TABLES = "w", "dw"  # the inputs that have a row per column of the vocabulary

# (block_N, block_V) of each pass, halved until they fit in VMEM. Derived from the FLOPs per byte
# above, not measured: v6e needs 560, v5e 240, v5p 166.
PASSES = "statistics", "gradients", "tangent_statistics", "tangents"
PREFERRED = {
  "TPU v5 lite": ((1024, 1280), (512, 1280), (1024, 640), (512, 640)),
  "TPU v6 lite": ((2048, 640), (512, 1280), (1024, 640), (512, 640)),
  "TPU v5": ((1024, 640), (512, 640), (512, 640), (256, 640)),
  "TPU v4": ((512, 256), (256, 256), (256, 256), (128, 256)),
  "": ((1024, 640), (512, 640), (512, 640), (256, 640)),
}


def block_sizes(n, d, v, dtype, w_dtype, kind: str, kernel: str) -> tuple[int, int, int]:
  """(block_N, block_V, cores) of `kernel`, a name in PASSES, for hidden [n, d] and W [v, d].

  Raises:
    ValueError: the smallest blocks do not fit in VMEM (d in the tens of thousands).
  """
  chip = device.of_kind(device.TPUS, kind)
  block_N, block_V = device.of_kind(PREFERRED, kind)[PASSES.index(kernel)]
  cores = chip.cores if kernel in ("gradients", "tangents") else 1
  while True:
    even_N = _round_up(pl.cdiv(n, pl.cdiv(n, block_N)), 16)
    even_V = _even_block(v, block_V, cores)
    needed = vmem_bytes(even_N, even_V, d, dtype, w_dtype, kernel)
    if needed <= chip.vmem_bytes * 7 // 8:
      break
    if block_V > LANES and block_V >= block_N:
      block_V = _round_up(block_V // 2, LANES)
    elif block_N > 16:
      block_N //= 2
    else:
      raise ValueError(
        f"pallas_tpu: {kernel} with D = {d} needs {needed} bytes of VMEM in the smallest blocks, "
        f"{kind or 'this TPU'} has {chip.vmem_bytes}; use backend='xla'"
      )
  cores = cores if pl.cdiv(v, even_V) % cores == 0 else 1
  return even_N, even_V, cores


def _even_block(v, block_V, cores):
  """A size up to block_V: it divides the work among the cores, is not small, and pads least."""

  def badness(size):
    blocks = pl.cdiv(v, size)
    return blocks % cores > 0, size <= block_V // 2, blocks * size, -size

  return min(range(LANES, min(block_V, _round_up(v, LANES)) + 1, LANES), key=badness)


def vmem_bytes(block_N, block_V, d, dtype, w_dtype, kernel) -> int:
  """VMEM of one kernel, the sum of its buffers."""
  size, w_size = jnp.dtype(dtype).itemsize, jnp.dtype(w_dtype).itemsize
  d = _round_up(d, LANES)
  sides = 2 if kernel.startswith("tangent") else 1  # values, and their tangents
  tokens = 2 * sides * block_N * d * size  # h, double-buffered
  table = 2 * sides * block_V * d * w_size  # W, double-buffered
  columns = 14 * block_N * LANES * 4  # [block_N, 1] fills a whole lane tile
  tiles = (2 + 2 * sides) * block_N * block_V * 4  # z, p, q, z', q'
  cast = sides * block_V * d * size  # W in the matmuls' dtype
  operands = sides * ((block_N + block_V) * d + block_N * block_V)
  # Float32 matmuls split operands into three bfloat16 parts, held in both orientations. The factor
  # is fitted to Mosaic's report: 38.5 MB of temporaries for 256 x 640 tangents at D = 1280.
  parts = 12 * operands if size == 4 else 0
  if "statistics" in kernel:
    return tokens + table + columns + tiles + cast + parts
  d_table = block_V * d * (4 + 2 * w_size)  # accumulator; output, double-buffered
  d_tokens = block_N * d * 4 * 3  # two blocks in flight, one product
  product = block_V * d * 4
  return tokens + table + columns + tiles + cast + parts + d_table + d_tokens + product


def _statistics(x):
  tangents = "dh" in x or "dw" in x
  kernel = "tangent_statistics" if tangents else "statistics"
  n, v = x["h"].shape[0], x["w"].shape[0]
  block_N, block_V, _ = _blocks(x, kernel)
  rows, blocks_V = pl.cdiv(n, block_N), pl.cdiv(v, block_V)
  x = _padded(x, rows * block_N)
  token = lambda width: pl.BlockSpec((block_N, width), lambda i, j: (i, 0))
  table = pl.BlockSpec((block_V, x["h"].shape[1]), lambda i, j: (j, 0))
  column = jax.ShapeDtypeStruct((rows * block_N, 1), jnp.float32)
  running = pltpu.VMEM((block_N, 1), jnp.float32)
  outputs = (0, 0, 0, 0) if tangents else (0, 0, None, None)
  (out,) = pl.pallas_call(
    partial(_statistics_kernel, vocabulary=v),
    name=f"{kernel}_{block_N}x{block_V}",
    grid=(rows, blocks_V),
    in_specs=[_specs(x, token, table)],
    out_specs=[jax.tree.map(lambda _: token(1), outputs)],
    out_shape=[jax.tree.map(lambda _: column, outputs)],
    scratch_shapes=[jax.tree.map(lambda _: running, block_math.empty(1, tangents))],
    interpret=device.kind("pallas_tpu") is None and INTERPRET,
    compiler_params=tpu_params("parallel", "arbitrary"),
    cost_estimate=_cost(x, v, 3 if tangents else 1, table_passes=rows),
  )(x)
  return jax.tree.map(lambda column: column[:n, 0], out)


def _statistics_kernel(x, out, stats, *, vocabulary):
  j = pl.program_id(1)
  values = lambda: jax.tree.map(lambda ref: ref[...], stats)

  @pl.when(j == 0)
  def _():
    empty = block_math.empty(x["h"].shape[0], stats.weighted is not None)
    jax.tree.map(_write, stats, empty)

  z, dz = block_math.logits(*_read(x, ("h", "w", "dh", "dw"), x["h"].dtype))
  hit, valid = _columns(x["y"][...], z.shape, j, vocabulary)
  jax.tree.map(_write, stats, block_math.fold(values(), z, dz, hit, valid))

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    jax.tree.map(_write, out, block_math.finish(values()))


def _gradients(x):
  """(d_h, d_W), or (d_h', d_W') if `x` has `mean`."""
  tangents = "mean" in x
  kernel = "tangents" if tangents else "gradients"
  (n, d), v, dtype = x["h"].shape, x["w"].shape[0], x["h"].dtype
  block_N, block_V, cores = _blocks(x, kernel)
  rows, blocks_V = pl.cdiv(n, block_N), pl.cdiv(v, block_V) // cores
  x = _padded(x, rows * block_N)
  wide = x["h"].shape[1]
  token = lambda width: pl.BlockSpec((block_N, width), lambda core, j, i: (i, 0))
  table = pl.BlockSpec((block_V, wide), lambda core, j, i: (core * blocks_V + j, 0))
  d_hidden, d_table = pl.pallas_call(
    partial(_gradients_kernel, vocabulary=v),
    name=f"{kernel}_{block_N}x{block_V}",
    grid=(cores, blocks_V, rows),
    in_specs=[_specs(x, token, table)],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY), table],
    out_shape=[
      jax.ShapeDtypeStruct((cores, rows * block_N, wide), jnp.float32),
      jax.ShapeDtypeStruct((v, wide), x["w"].dtype),
    ],
    scratch_shapes=[
      {name: pltpu.VMEM((block_V, wide), dtype) for name in TABLES if name in x},
      pltpu.VMEM((block_V, wide), jnp.float32),
      pltpu.VMEM((2, block_N, wide), jnp.float32),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    interpret=device.kind("pallas_tpu") is None and INTERPRET,
    compiler_params=tpu_params("parallel", "arbitrary", "arbitrary"),
    cost_estimate=_cost(x, v, 7 if tangents else 3, token_passes=cores * blocks_V),
  )(x)
  return jnp.sum(d_hidden, 0)[:n, :d].astype(dtype), d_table[:, :d]


def _gradients_kernel(x, d_hidden, d_table, tables, total, slots, reading, writing, *, vocabulary):
  core, j, i = (pl.program_id(axis) for axis in range(3))
  blocks_V, blocks_N = pl.num_programs(1), pl.num_programs(2)
  block_V, block_N = total.shape[0], x["h"].shape[0]
  step = j * blocks_N + i
  slot = jax.lax.rem(step, 2)
  in_hbm = lambda i: d_hidden.at[core, pl.ds(i * block_N, block_N)]
  read = pltpu.make_async_copy(in_hbm(i), slots.at[slot], reading.at[slot])

  def written(step):
    slot, block = jax.lax.rem(step, 2), jax.lax.rem(step, blocks_N)
    return pltpu.make_async_copy(slots.at[slot], in_hbm(block), writing.at[slot])

  # If there is one block, it must be written before it is read again.
  pl.when((blocks_N == 1) & (step > 0))(lambda: written(step - 1).wait())
  pl.when(j > 0)(read.start)

  @pl.when(i == 0)
  def _():  # rows past the end of V may hold NaN, and 0 times NaN is not 0
    row = (core * blocks_V + j) * block_V + jax.lax.broadcasted_iota(jnp.int32, (block_V, 1), 0)
    for name, ref in tables.items():
      ref[...] = jnp.where(row < vocabulary, x[name][...], 0).astype(ref.dtype)
    total[...] = jnp.zeros(total.shape, total.dtype)

  h, dh, w, dw = _read(x | tables, ("h", "dh", "w", "dw"), x["h"].dtype)
  z, dz = block_math.logits(h, w, dh, dw)
  hit, valid = _columns(x["y"][...], z.shape, core * blocks_V + j, vocabulary)
  columns = {name: x[name][...] for name in ("lse", "c", "mean", "dc") if name in x}
  q, dq = block_math.logit_cotangents(z, dz, columns, hit, valid)
  q, dq = q.astype(h.dtype), dq.astype(h.dtype)
  contribution = device.matmul_tangent(q, dq, w, dw, (1, 0))
  total[...] = device.matmul_tangent(q, dq, h, dh, (0, 0), total[...])

  # Frees the other slot for the next step's read.
  pl.when((blocks_N > 1) & (step > 0))(lambda: written(step - 1).wait())

  @pl.when(j > 0)
  def _():
    read.wait()
    slots[slot] += contribution

  @pl.when(j == 0)
  def _():
    slots[slot] = contribution

  written(step).start()
  pl.when(step == blocks_V * blocks_N - 1)(lambda: written(step).wait())

  @pl.when(i == blocks_N - 1)
  def _():
    d_table[...] = total[...].astype(d_table.dtype)


def _columns(targets_N1, shape, block, vocabulary):
  """(hit, valid) of a tile: the target's column, and the columns within the vocabulary."""
  column = block * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  return column == targets_N1, column < vocabulary


token_nll, nll_and_grads = differentiable("pallas_tpu", _statistics, _gradients)


def _blocks(x, kernel):
  (n, d), (v, _), kind = x["h"].shape, x["w"].shape, device.kind("pallas_tpu") or ""
  return block_sizes(n, d, v, x["h"].dtype, x["w"].dtype, kind, kernel)


def _padded(x, rows):
  """Pads tokens to `rows` and D to whole lanes with zeros; makes vectors columns."""

  def pad(name, value):
    value = value[:, None] if value.ndim == 1 else value
    lanes = -value.shape[1] % LANES if name in ("h", "w", "dh", "dw") else 0
    more = 0 if name in TABLES else rows - value.shape[0]
    return jnp.pad(value, [(0, more), (0, lanes)]) if more or lanes else value

  return {name: pad(name, value) for name, value in x.items()}


def _specs(x, token, table):
  """A block spec for each input: table, tokens or columns."""
  return {name: table if name in TABLES else token(value.shape[1]) for name, value in x.items()}


def _cost(x, v, units, token_passes=1, table_passes=1):
  n, d = x["h"].shape
  passes = lambda name: table_passes if name in TABLES else token_passes
  inputs = sum(value.nbytes * passes(name) for name, value in x.items())
  results = 8 * n * d * token_passes + x["w"].nbytes if "lse" in x else 0
  return pl.CostEstimate(2 * units * n * d * v, n * v, inputs + results)


def _read(refs, names, dtype):
  """The arrays of these names, None where absent."""
  return [refs[name][...].astype(dtype) if name in refs else None for name in names]


def _write(ref, value):
  ref[...] = value


def _round_up(x, multiple):
  return pl.cdiv(x, multiple) * multiple
