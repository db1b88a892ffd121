"""The score-weighted language-model loss, fused with the unembedding, to second order.

  loss = sum_n weights[n] * nll[n],    nll = logsumexp(hidden @ unembedding.T) - logit of the target

`score_weighted_loss` is the one public function. Its backends agree:
  reference   dense float32, a few lines: the definition, for tests
  xla         a scan over chunks of tokens, no [N, V] array at any order
  pallas_tpu  Mosaic kernels; interpreted on a machine without a TPU
  pallas_gpu  Triton kernels and the library's matmuls; interpreted without an NVIDIA GPU
`fastest` is the default.

A gradient computes d_hidden and d_unembedding in its forward pass, where the weights are known.
That pass is differentiable in forward mode, so `jax.jvp(jax.grad(loss))`, MixFlow-MG's
Hessian-vector product, works in blocks too. `xla` and `reference` also support jax.grad twice.

Axes: N tokens, D model width, V vocabulary.
"""

import importlib
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels import device

BACKENDS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
DTYPES = (jnp.float32, jnp.bfloat16)  # of the Pallas backends


def score_weighted_loss(
  hidden: jax.Array,
  unembedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  backend: str | None = None,
  vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (sum_n weights[n] * nll[n], nll): float32 [] and [N].

  Differentiable with respect to hidden, unembedding and weights, through either output. A gradient
  through `nll` costs a second pass; a gradient of the loss alone does not.

  Inside shard_map, pass check_vma=False to it and differentiate the sharded function from outside:
  the gradients of replicated arrays are summed over the shards there.

  Args:
    hidden: [N, D] float32 or bfloat16; the model's last hidden states.
    unembedding: [V, D]; cast to hidden's dtype, matmuls accumulate in float32.
    targets: [N] integers in [0, V).
    weights: [N]; 0 for a masked token (its nll is still computed).
    backend: a name in BACKENDS; None: `fastest`.
    vocab_axis: inside shard_map, the mesh axis that the vocabulary is sharded over: `unembedding`
      is then this shard's rows, in the order of the axis, and `targets` still count from 0 to V.

  Raises:
    ValueError: for shapes or dtypes that do not fit, or an unknown backend.
  """
  _check(hidden=hidden, unembedding=unembedding, targets=targets, weights=weights)
  name = backend or fastest(len(unembedding), hidden.dtype)
  if name not in BACKENDS:
    raise ValueError(f"unknown loss backend {name!r}; choose one of {', '.join(BACKENDS)}")
  weights = weights.astype(jnp.promote_types(hidden.dtype, jnp.float32))
  if name.startswith("pallas") and hidden.dtype not in DTYPES:
    raise ValueError(
      f"hidden is {hidden.dtype}: {name} takes float32 and bfloat16, backend='xla' any float"
    )
  targets = targets.astype(jnp.int32)  # counts columns: a narrower type would wrap
  return _loss(name, vocab_axis, hidden, unembedding, targets, weights)


def fastest(vocab_size: int, dtype) -> str:
  """The backend that was measured to be fastest on this device, see benchmarks/README.md."""
  measured = device.is_hopper() and jnp.dtype(dtype) == jnp.bfloat16
  large = vocab_size >= 64_000  # equal there in time, with a third of the memory
  return "pallas_gpu" if measured and large else "xla"


def _check(**arrays):
  hidden, unembedding, targets, weights = arrays.values()
  shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in arrays.items())
  if hidden.ndim != 2 or unembedding.ndim != 2 or hidden.shape[1] != unembedding.shape[1]:
    raise ValueError(f"hidden must be [N, D] and unembedding [V, D]: {shapes}")
  if not (hidden.size and unembedding.size):
    raise ValueError(f"N, D and V must be at least 1: {shapes}")
  if targets.shape != hidden.shape[:1] or weights.shape != hidden.shape[:1]:
    raise ValueError(f"targets and weights must be [N], N = hidden.shape[0]: {shapes}")
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"targets must be integers: {shapes}")
  if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (hidden, unembedding, weights)):
    raise ValueError(f"hidden, unembedding and weights must be floating: {shapes}")


def _backend(name: str) -> ModuleType:
  """Imported when it is first used: Pallas takes long."""
  return importlib.import_module(f"kernels.loss.{name}")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(backend, vocab_axis, hidden, unembedding, targets, weights):
  nll = _backend(backend).token_nll(hidden, unembedding, targets, vocab_axis)
  return jnp.sum(weights * nll), nll


def _loss_fwd(backend, vocab_axis, *arrays):
  perturbed = any(x.perturbed for x in arrays[:2])
  *inputs, weights = (x.value for x in arrays)
  if perturbed:
    nll, *grads = _backend(backend).nll_and_grads(*inputs, weights, vocab_axis)
    residuals = nll, inputs, grads
  else:  # only d loss / d weights = nll is needed: no gradient matmuls
    nll = _backend(backend).token_nll(*inputs, vocab_axis)
    residuals = nll, None, None
  return (jnp.sum(weights * nll), nll), residuals


def _loss_bwd(backend, vocab_axis, residuals, cotangents):
  nll, inputs, grads = residuals
  ct_loss, ct_nll = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
  if ct_loss is None:
    ct_loss = jnp.zeros((), nll.dtype)
  ct_weights = ct_loss * nll
  if inputs is None:
    return None, None, None, ct_weights
  if vocab_axis is not None:  # every shard's loss depends on this shard's hidden and unembedding
    ct_loss, ct_nll = jax.lax.psum((ct_loss, ct_nll), vocab_axis)
  # In float32: rounding the cotangent to bfloat16 would scale the whole gradient by the error.
  ct_inputs = [(ct_loss * grad).astype(grad.dtype) for grad in grads]
  if ct_nll is not None:  # nll was read too: its cotangent takes the place of the weights
    _, *more = _backend(backend).nll_and_grads(*inputs, ct_nll, vocab_axis)
    ct_inputs = [x + y for x, y in zip(ct_inputs, more, strict=True)]
  return *ct_inputs, None, ct_weights


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)
