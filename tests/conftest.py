"""What the tests share."""

import fcntl
import importlib.metadata
import json
import os
import shutil

import jobs
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
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402


@pytest.fixture
def quick_compile():
  """Machine code that LLVM has not optimized: compiled in a third of the time, run once."""
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


LONGEST = (  # first, so that the processes of `make test` end together
  "kernels/test_loss.py",
  "kernels/test_attention.py",
  "test_train.py",
  "test_inner_loop.py",
  "test_microbatches.py",
  "test_examples.py",
  "runtime/test_sharding.py",
  "evaluation/test_evaluate.py",
  "curation/test_curate.py",
)


def pytest_collection_modifyitems(items):
  def rank(item):
    path = item.path.relative_to(jobs.ROOT / "tests").as_posix()
    return LONGEST.index(path) if path in LONGEST else len(LONGEST)

  items.sort(key=rank)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
  """(name, make) -> a path that the test processes of a session share: the first that asks for it
  calls make(path)."""
  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

  def path_of(name, make):
    path, partial = folder / name, folder / f"{name}.partial"
    with open(folder / f"{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not path.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a process that failed
        make(partial)
        partial.rename(path)
    return path

  return path_of


@pytest.fixture(scope="session")
def cache(once):
  return once("cache", lambda path: path.mkdir())


@pytest.fixture(scope="session", autouse=True)
def compile_once(cache):
  for name, value in jobs.compile_once(cache).items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # test files have compiled something as they were imported


@pytest.fixture(scope="session")
def corpus(once):
  """A JSONL of your own: two sources, half of the documents noisy at a known level."""
  rng = np.random.default_rng(0)
  words = "the rater scores each text and the inner models learn from what it likes best".split()

  def make(path):
    with open(path, "w") as file:
      for i in range(400):
        text = " ".join(rng.choice(words, 40))
        level = float(rng.choice([0, 0, 0.2, 0.4, 0.8]))
        noisy = [chr(rng.integers(33, 127)) if rng.random() < level else c for c in text]
        record = {"text": "".join(noisy), "source": "ab"[i % 2], "noise": level}
        print(json.dumps(record), file=file)

  return once("mine.jsonl", make)


@pytest.fixture(scope="session")
def small_rater(corpus, cache, once):
  """The workdir of a rater of that corpus, trained for four meta-steps."""
  flags = [f"--data={corpus}", f"--cache_dir={cache}", "--meta_steps=4", *jobs.SMALL]
  return once("rater", lambda path: jobs.succeed("train.py", cache, f"--workdir={path}", *flags))
