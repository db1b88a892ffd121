"""What the tests of the compute core share."""

import importlib.metadata
import os

import numpy as np
import pytest

# These tests compile much and compute little: XLA:CPU's older emitters compile small programs three
# times faster. Another JAX may not know the flag, and stops at one that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402 (reads the flag)


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
