"""What tuned first-order kernels reach: cuDNN's attention, and JAX's Mosaic GPU examples.

  python -m benchmarks.device.flash [--dry]

Attention at the sizes of benchmarks/attention.py: 2 matmuls in a value, 7 in a gradient (cuDNN has
no second order). The Mosaic GPU kernels (TMA, wgmma, warp specialization) show what a port from
Triton could gain; JAX has deprecated Pallas's Triton backend.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.device.machine import fastest, random


def main(dry: bool) -> None:
  B, S = (1, 64) if dry else (8, 2048)
  heads = [(2, 16)] if dry else [(12, 64), (10, 128)]
  library = "xla" if dry else "cudnn"
  for H, K in heads:
    qkv = [random(i, B, S, H, K) for i in range(3)]
    matmul = 2 * B * H * K * S * S / 2  # FLOPs, causal
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation=library)
    total = lambda *qkv, attend=attend: jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))
    for order, function, matmuls in (
      ("value", attend, 2),
      ("gradient", jax.grad(total, (0, 1, 2)), 7),
    ):
      name = f"{library} attention {H}x{K} {order}"
      report(name, matmuls * matmul, lambda f=function, qkv=qkv: fastest(f, *qkv))
    report(f"mosaic_gpu attention {H}x{K} value", 2 * matmul, lambda qkv=qkv: mosaic_attention(qkv))
  n = 64 if dry else 16384
  for N, V, D in [(n, n, n)] if dry else [(n, 32000, 1280), (n, 3072, 768)]:
    a, b = random(0, N, D), random(1, D, V)
    flops = 2 * N * V * D
    report(f"library matmul {N}x{V}x{D}", flops, lambda a=a, b=b: fastest(jnp.matmul, a, b))
    for cluster in (False, True):
      name = f"mosaic_gpu matmul {N}x{V}x{D} cluster {cluster}"
      report(name, flops, lambda a=a, b=b, cluster=cluster: mosaic_matmul(a, b, cluster))


def report(name: str, flops: float, measure) -> None:
  try:
    seconds = measure()
    print(f"RESULT {name} {seconds * 1e3:.2f} ms {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)
  except Exception as error:  # a failure is a result
    reason = str(error).partition("\n")[0][:300]
    print(f"RESULT {name} FAILED {type(error).__name__} {reason}", flush=True)


def mosaic_matmul(a: jax.Array, b: jax.Array, cluster: bool) -> float:
  from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as mgpu

  M, N = mgpu.MatmulDimension.M, mgpu.MatmulDimension.N
  config = mgpu.TuningConfig(
    tile_m=128,
    tile_n=128,
    tile_k=64,
    max_concurrent_steps=4,
    grid_minor_dim=M,
    grid_tile_width=8,
    wg_dimension=N,
    cluster_dimension=M if cluster else None,
  )
  return fastest(lambda a, b: mgpu.matmul(a, b, None, config=config), a, b)


def mosaic_attention(qkv: list[jax.Array]) -> float:
  from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

  config = mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
  half = [x.astype(jnp.float16) for x in qkv]  # the only dtype it takes
  return fastest(lambda *qkv: mgpu.attention(*qkv, config), *half)


if __name__ == "__main__":
  main("--dry" in sys.argv)
