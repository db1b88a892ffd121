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

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import device
from kernels.attention import passes
from kernels.attention.passes import How
from kernels.operation import Operation

BACKENDS = ("pallas_tpu", "pallas_gpu")


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
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"queries are {dtype}: {backend} takes float32 and bfloat16")
  S, K = q_BHSK.shape[2:]
  # Triton's arrays have powers of two; blocks are whole.
  more_K = max(16, pl.next_power_of_2(K)) - K if backend == "pallas_gpu" else 0
  more_S = -S % passes.padding_block(S, backend)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, more_S), (0, more_K)])
  k_BHSK = k_BHSK - jax.lax.stop_gradient(_mean(k_BHSK))
  segments = jnp.pad(segments_BS, [(0, 0), (0, more_S)], constant_values=-1)[:, None]
  x = dict(q=pad(q_BHSK), k=pad(k_BHSK), v=pad(v_BHSK), segments=segments)
  o, _ = VALUES(How(causal, backend), x)
  return o[:, :, :S, :K].astype(dtype)


def runs_here(backend: str) -> bool:
  """Whether this machine runs it compiled; "xla" runs anywhere."""
  return backend == "xla" or device.kind(backend) is not None


# The four operations. Arrays are padded; segments are [B, 1, S], lse and delta [B, H, 1, S]. Matmul
# inputs have the dtype of q, the rest is float32: o too, as delta is a difference of large sums.


def _values_jvp(how, x, results, tangents):
  o, lse = results
  return VALUE_TANGENTS(how, (x | dict(o=o, lse=lse), _named(tangents, x)))


def _value_tangents(how, arrays):
  x, tangents = arrays
  return passes.run(passes.value_tangents, ("o", "lse"), how, x | tangents)


def _value_cotangents(how, x, cotangents):
  do, _ = cotangents  # only these rules read lse
  delta = jnp.sum(do * x["o"], -1)[:, :, None]
  inputs = {name: x[name] for name in ("segments", "q", "k", "v", "lse")}
  dq, dk, dv = GRADIENTS(how, inputs | dict(do=do.astype(x["q"].dtype), delta=delta))
  return dict(q_t=dq, k_t=dk, v_t=dv)


def _gradients(how, x):
  """(dq, dk, dv), or (dq', dk', dv') if x has tangents."""
  of_queries = passes.run(passes.query_gradients, ("q",), how, x)
  return *of_queries, *passes.run(passes.key_gradients, ("k", "v"), how, x)


def _gradients_jvp(how, x, results, tangents):
  return GRADIENT_TANGENTS(how, x | _named(tangents, x))


def _named(tangents, x):
  """Tangents by name, zeros for None: the kernels take all or none."""
  of = lambda name: jnp.zeros_like(x[name]) if tangents[name] is None else tangents[name]
  named = {f"{name}_t": of(name) for name in x if name != "segments"}
  return named | dict(k_t=named["k_t"] - _mean(named["k_t"]))


def _mean(k_BHSK):
  return jnp.mean(k_BHSK, 2, jnp.float32, keepdims=True).astype(k_BHSK.dtype)


VALUES = Operation("attention", partial(passes.run, passes.values, ("o", "lse")), _values_jvp)
VALUE_TANGENTS = Operation("attention's tangent", _value_tangents, transpose=_value_cotangents)
GRADIENTS = Operation("attention's gradient", _gradients, _gradients_jvp)
GRADIENT_TANGENTS = Operation("attention's gradient", _gradients)
