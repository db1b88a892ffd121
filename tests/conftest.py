"""What the tests of the compute core share."""

import importlib.metadata
import os

import numpy as np
import pytest

# These tests compile much and compute little: XLA:CPU's older emitters, in one LLVM module, compile
# small programs three times faster. Another JAX may not know a flag, and stops at such a one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_cpu_use_fusion_emitters=false",
      "--xla_cpu_parallel_codegen_split_count=1",
    ]
  )

import jax  # noqa: E402 (reads the flag)


@pytest.fixture
def quick_compile():
  """Machine code that LLVM has not optimised: compiled in a third of the time, run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
  """float64 for this test alone."""
  with jax.enable_x64(True):
    yield


def assert_close(actual, expected, tolerance):
  """Trees agree leaf by leaf: the largest error is within `tolerance` of the largest entry.

  Entries are not compared one by one: one that cancels to almost nothing keeps the rounding of the
  terms that it is made of.
  """
  actual, structure = jax.tree.flatten(actual)
  expected, expected_structure = jax.tree.flatten(expected)
  assert structure == expected_structure
  for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    assert a.shape == e.shape, f"leaf {i}: {a.shape} is not {e.shape}"
    assert np.isfinite(e).all(), f"leaf {i}: the reference is not finite"
    error = np.abs(a - e).max(initial=0)
    bound = tolerance * np.abs(e).max(initial=0)
    assert error <= bound, f"leaf {i} {a.shape}: error {error:.3g} is over {bound:.3g}"


@pytest.fixture
def jaxpr_shapes():
  """(function, *args) -> the shapes of all that is computed in it, in the bodies of loops too."""
  return lambda function, *args: list(_shapes(jax.make_jaxpr(function)(*args).jaxpr))


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(inner):
        yield from _shapes(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x):
  return hasattr(x, "eqns")
