"""Floating-point operations of a program, counted in its jaxpr, and the fewest a meta-step needs.

XLA's own count takes the body of a loop once. Here loops are multiplied by their trip counts, the
work of all devices is added up, and what remat recomputes is also counted apart.

Symbols: T inner steps, B sequences, S tokens, D width, H heads, K head width, V vocabulary, F FLOPs
of a forward pass of the inner model over a batch, R of the rater.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from transformer import TransformerConfig


class Flops(NamedTuple):
  matmuls: float = 0.0  # matmuls and convolutions, 2 per multiply-add, recomputed ones included
  recomputed: float = 0.0  # the part of them that remat repeats in a backward pass
  elementwise: float = 0.0  # 1 per result, or per input of a reduction
  unknown_loops: int = 0  # while loops, counted once; a loop of static bounds is a scan

  def __add__(self, other):
    return Flops(*map(sum, zip(self, other, strict=True)))

  def times(self, n: float):
    return Flops(self.matmuls * n, self.recomputed * n, self.elementwise * n, self.unknown_loops)


def count(function: Callable, *args: Any, estimates: bool = True) -> Flops:
  """FLOPs of one call on all devices.

  Args:
    args: arrays or jax.ShapeDtypeStructs.
    estimates: take a Pallas kernel's own estimate, not the matmuls in its body.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, estimates)


def count_jaxpr(jaxpr: Jaxpr, estimates: bool = True) -> Flops:
  return _count(operations(jaxpr, estimates))


def operations(jaxpr: Jaxpr, estimates: bool = True) -> Iterator[tuple[JaxprEqn, float, bool]]:
  """Yields (equation, how often all devices run it, whether remat repeats it) of a whole program.

  Dead code is eliminated first, as XLA does. Calls and loops are resolved, and the most expensive
  branch is taken. A while loop, of unknown length, is counted once, and is yielded itself too.
  """
  return _walk(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], estimates, 1.0, False)


def matmul_flops(equation: JaxprEqn) -> float | None:
  """FLOPs of a matmul or convolution, or a kernel's estimate; None for other operations."""
  name, params = equation.primitive.name, equation.params
  if name == "pallas_call":
    return params["cost_estimate"].flops
  if name not in ("dot_general", "conv_general_dilated"):
    return None
  left, right = (v.aval.shape for v in equation.invars[:2])
  out = math.prod(equation.outvars[0].aval.shape)
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * out * math.prod(left[i] for i in contracted)
  return 2.0 * out * math.prod(right) / right[params["dimension_numbers"].rhs_spec[0]]


class Minimum(NamedTuple):
  """The fewest FLOPs of one member's meta-step, if memory holds the activations of one pass."""

  inner_gradients: float  # T x 3 F: each matmul forward needs two backward
  hvps: float  # (T - 1) x 8 F, 9 F in attention: `minimum` says why
  first_step: float  # 3 F: the losses and their derivative along u
  outer_gradient: float  # 3 F of the outer batch
  rater: float  # T x 3 R
  kept: float  # the part that memory for the matmuls of earlier passes would save

  @property
  def total(self) -> float:
    return sum(self) - self.kept


def minimum(
  model: TransformerConfig, rater: TransformerConfig, T: int, B: int, B_outer: int, S: int
) -> Minimum:
  """Counts mode "mixed" without remat on full sequences.

  F = 2 S B (weights outside the embedding lookup) + attention's 4 H K per layer and pair of a query
  and a visible key; R likewise.

  A Hessian-vector product (HVP) is the derivative of the gradient along u. For a matmul x w it
  needs x w and two tangent matmuls, the gradient of x and two, and two of the gradient of w, but
  not that gradient itself: 8. In attention both factors are activations: 9. `kept` are the matmuls
  that the inner gradient has done before: two per HVP (three in attention), one of the first step.
  """
  weights, attention = forward(model, B, S, causal=True)
  F = weights + attention
  return Minimum(
    inner_gradients=3 * T * F,
    hvps=(T - 1) * (8 * weights + 9 * attention),
    first_step=3 * F,
    outer_gradient=3 * sum(forward(model, B_outer, S, causal=True)),
    rater=3 * T * sum(forward(rater, B, S, causal=False)),
    kept=(T - 1) * (2 * weights + 3 * attention) + F,
  )


def forward(config: TransformerConfig, B: int, S: int, causal: bool) -> tuple[float, float]:
  """FLOPs (with weights, in attention) of a language model (causal) or a rater (not causal)."""
  c = config
  of_layer = 4 * c.d_model * c.n_heads * c.head_dim + 2 * c.d_model * c.d_ff
  weights = c.n_layers * of_layer + (c.d_model * c.vocab_size if causal else 0)
  pairs = S * (S + 1) / 2 if causal else S * S
  return 2.0 * B * S * weights, 4.0 * B * c.n_layers * pairs * c.n_heads * c.head_dim


# Operations that only move numbers or change their type.
_MOVES = frozenset(
  """broadcast_in_dim reshape transpose slice dynamic_slice dynamic_update_slice concatenate pad
  gather scatter convert_element_type bitcast_convert_type iota copy copy_p squeeze expand_dims rev
  select_n split name stop_gradient device_put sharding_constraint optimization_barrier
  random_wrap random_unwrap get swap pvary reduce_precision""".split()
)
_REDUCTIONS = ("reduce", "argm", "scatter")


def _count(equations):
  total = Flops()
  for equation, times, again in equations:
    name, flops = equation.primitive.name, matmul_flops(equation)
    if name == "while":
      total += Flops(unknown_loops=1)
    elif flops is not None:
      total += Flops(matmuls=flops * times, recomputed=flops * times * again)
    elif name not in _MOVES:
      operands = equation.invars if name.startswith(_REDUCTIONS) else equation.outvars
      total += Flops(elementwise=times * sum(math.prod(v.aval.shape) for v in operands))
  return total


def _walk(jaxpr, estimates, times, recomputing):
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    again = recomputing or "rematted_computation" in str(equation.source_info.name_stack)
    inner, repeats = list(jaxprs_in_params(params)), 1
    if name.startswith((*_REDUCTIONS, "sort", "select_and")):
      inner = []  # their jaxpr takes a pair of numbers
    elif name == "scan":
      repeats = params["length"]
    elif name == "while":
      yield equation, times, again
    elif name == "cond":
      cost = lambda branch: sum(_count(_walk(branch, estimates, 1.0, False))[::2])
      inner = [max(inner, key=cost)]
    elif name == "shard_map":  # the jaxpr is one device's
      axes = params.get("newly_manual_axes", params.get("manual_axes"))  # JAX 0.10; newer
      repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
    elif name == "pallas_call" and estimates and params["cost_estimate"] is not None:
      inner = []
    elif name == "pallas_call":
      repeats = math.prod(params["grid_mapping"].grid)
    if not inner:
      yield equation, times, again
    for body in inner:
      yield from _walk(body, estimates, times * repeats, again)
