"""Floating-point operations of a program, counted in its jaxpr, and the least a meta-step needs.

XLA's own count takes the body of a loop once. Here loops are multiplied out, the work of all
devices is added up, and what rematerialisation forms again is counted apart.

Symbols: T inner steps, B sequences, S tokens, D width, H heads, K head width, V vocabulary,
F operations of one forward pass of an inner model over a batch, R of the rater's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
from jax.interpreters import partial_eval

from transformer import TransformerConfig


class Flops(NamedTuple):
  products: float = 0.0  # of matrix products and convolutions, 2 a multiply-add; remat's included
  recomputed: float = 0.0  # that part of `products` which remat forms again for a backward pass
  elementwise: float = 0.0  # 1 a result, or 1 an input of a reduction
  unknown_loops: int = 0  # loops whose trip count the jaxpr does not tell, counted once

  def __add__(self, other):
    return Flops(*map(sum, zip(self, other, strict=True)))

  def times(self, n: float):
    return Flops(self.products * n, self.recomputed * n, self.elementwise * n, self.unknown_loops)


def count(function: Callable, *args: Any) -> Flops:
  """Of one call, on all devices; args are arrays or jax.ShapeDtypeStructs."""
  return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr(jaxpr: jax.extend.core.Jaxpr) -> Flops:
  """What no result depends on is left out, as XLA leaves it out."""
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr, recomputing=False)


class Minimum(NamedTuple):
  """The least operations of one member's meta-step, with activations of one pass at a time."""

  inner_gradients: float  # T x 3 F: forward, and two products backward for each of its own
  hessian_products: float  # (T - 1) x 8 F, 9 F in attention: `minimum` says why
  first_step: float  # 3 F: the losses and their derivative along u
  outer_gradient: float  # 3 F of the outer batch
  rater: float  # T x 3 R
  kept: float  # of these, T x 2 F that memory for every product of the forward passes would save

  @property
  def total(self) -> float:
    return sum(self) - self.kept


def minimum(
  model: TransformerConfig, rater: TransformerConfig, T: int, B: int, B_outer: int, S: int
) -> Minimum:
  """Of a member's meta-step in mode "mixed", sequences full, no remat.

  F = 2 S B (weights outside the embedding look-up) + attention's 4 H K a layer and pair of a query
  and a key that it may see; so R.

  A Hessian-vector product is a derivative of the gradient along u. For a product x w it forms x w
  and its two tangent products, the gradient of x and its two, the two tangents of that of w, but
  not that of w itself: 8. In attention both factors are activations: 9. Two of them (the forward
  pass, and the primal backward's; three in attention) were formed by the inner gradient already,
  and one of the first step's three: `kept`.
  """
  weights, attention = forward(model, B, S, causal=True)
  F = weights + attention
  return Minimum(
    inner_gradients=3 * T * F,
    hessian_products=(T - 1) * (8 * weights + 9 * attention),
    first_step=3 * F,
    outer_gradient=3 * sum(forward(model, B_outer, S, causal=True)),
    rater=3 * T * sum(forward(rater, B, S, causal=False)),
    kept=(T - 1) * (2 * weights + 3 * attention) + F,
  )


def forward(config: TransformerConfig, B: int, S: int, causal: bool) -> tuple[float, float]:
  """(products with weights, attention's) of a language model (causal) or a rater (not causal)."""
  c = config
  of_layer = 4 * c.d_model * c.n_heads * c.head_dim + 2 * c.d_model * c.d_ff
  weights = c.n_layers * of_layer + (c.d_model * c.vocab_size if causal else 0)
  pairs = S * (S + 1) / 2 if causal else S * S
  return 2.0 * B * S * weights, 4.0 * B * c.n_layers * pairs * c.n_heads * c.head_dim


# Results that are an input's numbers, in other places or other types.
_MOVES = frozenset(
  """broadcast_in_dim reshape transpose slice dynamic_slice dynamic_update_slice concatenate pad
  gather scatter convert_element_type bitcast_convert_type iota copy copy_p squeeze expand_dims rev
  select_n split name stop_gradient device_put sharding_constraint optimization_barrier
  random_wrap random_unwrap get swap pvary reduce_precision""".split()
)


def _count(jaxpr, recomputing):
  total = Flops()
  for equation in jaxpr.eqns:
    again = recomputing or "rematted_computation" in str(equation.source_info.name_stack)
    total += _count_equation(equation, again)
  return total


def _count_equation(equation, recomputing):
  name, params = equation.primitive.name, equation.params
  inner = [_count(j, recomputing) for j in jax.extend.core.jaxprs_in_params(params)]
  if name in ("dot_general", "conv_general_dilated"):
    flops = _product(name, equation)
    return Flops(products=flops, recomputed=flops * recomputing)
  if name == "scan":
    return inner[0].times(params["length"])
  if name == "while":
    once = sum(inner, Flops())
    trips = _trip_count(equation)
    return once.times(trips) if trips is not None else once + Flops(unknown_loops=1)
  if name == "cond":  # the dearest branch
    return max(inner, key=lambda f: f.products + f.elementwise)
  if name == "shard_map":  # its body is what one device does
    axes = params.get("newly_manual_axes", params.get("manual_axes"))  # JAX 0.10; newer
    devices = math.prod(params["mesh"].shape[axis] for axis in axes)
    return inner[0].times(devices)
  if name == "pallas_call":
    estimate = params["cost_estimate"]
    if estimate is not None:
      return Flops(products=estimate.flops, recomputed=estimate.flops * recomputing)
    return sum(inner, Flops()).times(math.prod(params["grid_mapping"].grid))
  if inner:  # a call: jit, remat, custom_jvp, custom_vjp, an operation of kernels/, ...
    # A sort's, scatter's or reduction's body is for one pair of numbers: it falls below.
    if not name.startswith(("reduce", "scatter", "sort", "select_and", "argm")):
      return sum(inner, Flops())
  if name in _MOVES:
    return Flops()
  size = lambda variables: sum(math.prod(v.aval.shape) for v in variables)
  reduces = name.startswith(("reduce", "argm", "scatter"))
  return Flops(elementwise=float(size(equation.invars if reduces else equation.outvars)))


def _product(name, equation):
  left, right = (v.aval.shape for v in equation.invars[:2])
  out = math.prod(equation.outvars[0].aval.shape)
  if name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * out * math.prod(left[i] for i in contracted)
  features = equation.params["dimension_numbers"].rhs_spec[0]
  return 2.0 * out * math.prod(right) / right[features]


def _trip_count(equation):
  """Of a loop that counts a whole number up by one to a bound, both known; otherwise None."""
  condition, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr
  n_cond, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
  value = lambda v: int(v.val) if isinstance(v, jax.extend.core.Literal) else None
  if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
    return None
  counter, bound = condition.eqns[0].invars
  if counter not in condition.invars[n_cond:]:
    return None
  i = condition.invars[n_cond:].index(counter)
  if bound in condition.invars[:n_cond]:
    bound = equation.invars[condition.invars.index(bound)]
  step = [e for e in body.eqns if body.outvars[i] in e.outvars]
  counts = step and step[0].primitive.name == "add" and body.invars[n_body + i] in step[0].invars
  if not counts or 1 not in map(value, step[0].invars):
    return None
  start, stop = value(equation.invars[n_cond + n_body + i]), value(bound)
  return None if start is None or stop is None else max(stop - start, 0)
