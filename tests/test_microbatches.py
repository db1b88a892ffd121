"""Batches computed in parts: the numbers of the whole batch, in less memory.

Axes: N inner models, T inner steps, B sequences, S tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close

import datarater
import inner_loop
import meta_step
import transformer
from config import Config
from runtime.cli import UserError

T, B, S, V = 2, 6, 8, 19
SHAPE = dict(vocab_size=V, d_model=8, n_layers=1, n_heads=2, head_dim=4, d_ff=16)


def _problem(microbatches, remat=False, backend=None, dtype="float64"):
  config = transformer.TransformerConfig(
    **SHAPE, dtype=dtype, remat="block" if remat else "none", scan_layers=remat
  )
  model = transformer.language_model(config, backend, microbatches)
  rater = datarater.rater(config)
  return rater, model, meta_step.datarater_problem(model, rater, microbatches, not remat)


def _batches(*shape):
  """Documents of several lengths, padding, and a sequence with nothing to predict."""
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(0, 4, (*shape, S)))[..., ::-1]
  segments[..., 1, :] = 0
  tokens = rng.integers(0, V, (*shape, S))
  return transformer.Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, segments)))


def _wide(tree):
  """A point where no derivative is zero by chance, in float64."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(1)
  return structure.unflatten([jnp.asarray(rng.normal(size=x.shape) / 2) for x in leaves])


def test_loss_and_its_gradients_are_those_of_the_whole_batch(x64, quick_compile):
  batch, weights = _batches(B), jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(B)))

  def everything(microbatches):
    _, model, _ = _problem(microbatches)
    params = _wide(jax.jit(model.init)(jax.random.key(0)))
    gradient = lambda *point: jax.grad(model.loss, (0, 1), has_aux=True)(*point, batch)
    point = (params, weights)
    along = (params, 2 * weights)
    return jax.jit(
      lambda: (model.loss(*point, batch), gradient(*point), jax.jvp(gradient, point, along)[1])
    )()

  assert_close(everything(3), everything(1), 1e-10)


@functools.cache
def _meta_gradient(microbatches, mode, remat=False):
  """Of one member: (meta-gradient, last inner state, diagnostics), and the scores of a probe."""
  optimizer = meta_step.inner_adamw(1e-2)
  inner_batches, outer_batch = _batches(T, B), _batches(B)
  rater, model, problem = _problem(microbatches, remat)
  eta = _wide(jax.jit(rater.init)(jax.random.key(1)))
  inner = inner_loop.init(optimizer, _wide(jax.jit(model.init)(jax.random.key(0))))
  algorithm = meta_step.Algorithm(problem, optimizer, optax.sgd(1.0), 1, lifetime=T, mode=mode)
  return jax.jit(
    lambda eta, inner: (
      meta_step.meta_gradient(algorithm, eta, inner, inner_batches, outer_batch),
      problem.probe(eta, outer_batch),
    )
  )(eta, inner)


@pytest.mark.parametrize(
  "mode, remat", [*((mode, False) for mode in inner_loop.MODES), ("mixed", True)]
)
def test_meta_gradient_is_that_of_the_whole_batch(x64, quick_compile, mode, remat):
  """All exact modes against one: they have the same derivatives."""
  (g, _, _), _ = whole = _meta_gradient(1, mode if mode == "first_order" else "mixed_save", remat)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(g))
  assert_close(_meta_gradient(3, mode, remat), whole, 1e-10)


def test_pallas_kernels_take_parts(quick_compile):
  batch, weights = _batches(B), jnp.full(B, 1 / B)

  def gradient(microbatches, backend):
    _, model, _ = _problem(microbatches, backend=backend, dtype="float32")
    params = jax.jit(model.init)(jax.random.key(0))
    return jax.jit(jax.grad(model.loss, has_aux=True))(params, weights, batch)[0]

  assert_close(gradient(3, "pallas_gpu"), gradient(1, "reference"), 1e-5)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_compiled_memory_falls(quick_compile, mode):
  """Activations outweigh the parameters here: with an eighth of the batch, well under a half."""

  def temp(microbatches):
    config = transformer.TransformerConfig(
      **SHAPE | dict(d_model=32, d_ff=128), dtype="float32", remat="block", scan_layers=True
    )
    rater = datarater.rater(config)
    model = transformer.language_model(config, None, microbatches)
    problem = meta_step.datarater_problem(model, rater, microbatches)
    optimizer = meta_step.inner_adamw()
    algorithm = meta_step.Algorithm(problem, optimizer, optax.sgd(1.0), 1, lifetime=T, mode=mode)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((T, 64, 64), jnp.int32)
    outer = jax.ShapeDtypeStruct((64, 64), jnp.int32)
    step = jax.jit(
      lambda eta, params, inner, outer: meta_step.meta_gradient(
        algorithm, eta, inner_loop.init(optimizer, params), inner, outer
      )
    )
    shapes = (transformer.Batch(tokens, tokens), transformer.Batch(outer, outer))
    eta = jax.eval_shape(rater.init, jax.random.key(0))
    return step.lower(eta, params, *shapes).compile().memory_analysis().temp_size_in_bytes

  assert temp(8) < temp(1) / 2


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="--inner_batch=16 must be a multiple of --microbatches=3"):
    Config(microbatches=3)
