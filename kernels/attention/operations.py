"""Attention as four operations with derivative rules, on padded arrays.

Axes: B sequences, H heads, S tokens, K head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention import passes
from kernels.attention.passes import How
from kernels.operation import Operation


def attention(q_BHSK, k_BHSK, v_BHSK, segments_BS, causal: bool, backend: str) -> jax.Array:
  S, K = q_BHSK.shape[2:]
  # Triton's arrays have powers of two; blocks are whole.
  more_K = max(16, pl.next_power_of_2(K)) - K if backend == "pallas_gpu" else 0
  more_S = -S % passes.padding_block(S, backend)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, more_S), (0, more_K)])
  k_BHSK = k_BHSK - jax.lax.stop_gradient(_mean(k_BHSK))
  segments = jnp.pad(segments_BS, [(0, 0), (0, more_S)], constant_values=-1)[:, None]
  x = dict(q=pad(q_BHSK), k=pad(k_BHSK), v=pad(v_BHSK), segments=segments)
  o, _ = VALUES(How(causal, backend), x)
  return o[:, :, :S, :K].astype(q_BHSK.dtype)


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
