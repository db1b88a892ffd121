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

Keys are taken relative to their mean over the sequence. This does not change the softmax, and sums
that should be zero (of s along a row) then do not multiply large rounded numbers.

Axes: B sequences, H heads, S tokens, K head width.
"""

import jax
import jax.numpy as jnp

from kernels import device

BACKENDS = ("pallas_tpu", "pallas_gpu")
DTYPES = (jnp.float32, jnp.bfloat16)


def attention(q_BHSK, k_BHSK, v_BHSK, segments_BS, *, causal: bool, backend: str) -> jax.Array:
  """softmax(q k^T) v within each document: [B, H, S, K] in the dtype of q, which is already scaled.

  Differentiable with respect to q, k and v: forward, in reverse, and forward over reverse.

  Args:
    q_BHSK, k_BHSK, v_BHSK: float32 or bfloat16; matmuls accumulate in float32.
    segments_BS: int32; a query sees the keys of its own segment, if `causal` up to its position.
    backend: a name in BACKENDS; interpreted on a machine without such a device.

  Raises:
    ValueError: an unknown backend, another dtype, or a sequence that does not fit on chip.
  """
  if backend not in BACKENDS:
    raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
  dtype = q_BHSK.dtype
  if dtype not in DTYPES:
    raise ValueError(f"queries are {dtype}: {backend} takes float32 and bfloat16")
  from kernels.attention import operations  # with Pallas, which takes long to import

  return operations.attention(q_BHSK, k_BHSK, v_BHSK, segments_BS, causal, backend)


def fastest(dtype) -> str:
  """The backend that was measured to be fastest on this device, see benchmarks/README.md."""
  return "pallas_gpu" if device.is_hopper() and jnp.dtype(dtype) == jnp.bfloat16 else "xla"


def runs_here(backend: str | None) -> bool:
  """Whether this machine runs it compiled; "xla" and None, the fastest, run anywhere."""
  return backend in (None, "xla") or device.kind(backend) is not None
