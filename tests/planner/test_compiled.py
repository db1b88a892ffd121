"""Kernels and runs compiled for TPU v5e, v5p, v6e and H100; nothing is executed.

Skipped where libtpu, or the CUDA plugin and ptxas, are not installed: `make test-compile` installs
them in an environment of its own.

Axes: N tokens, D model width, V vocabulary.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import shutil

import jax
import jax.numpy as jnp
import jobs
import optax
import pytest

import inner_loop
import mixflow
from benchmarks import attention, loss
from config import PRESETS, Config
from kernels import device
from kernels.loss import pallas_gpu
from planner import plan, targets

N, D = 16384, 1280  # 8 sequences of 2,048 tokens in a 400M model
VOCABULARIES = {32_000: 10, 256_000: 50}  # V -> how many times less temporary memory than dense
UNITS = {"value": 1, "gradient": 4, "hvp": 10}

has = importlib.util.find_spec
missing = {name: not has("libtpu") for name in targets.NAMES}
missing["h100"] = not (has("jax_cuda13_plugin") and shutil.which("ptxas"))
reason = "needs libtpu, or jax-cuda13-plugin and ptxas: make test-compile"
TARGETS = [
  pytest.param(name, marks=pytest.mark.skipif(missing[name], reason=reason))
  for name in targets.NAMES
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
  """The plugins only compile. libtpu ends the process at a CPU flag that conftest sets."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  monkeypatch.delenv("XLA_FLAGS", raising=False)


def _backend(target):
  return "pallas_gpu" if target == "h100" else "pallas_tpu"


def _compile(target, backend, order, V, dtype="bfloat16"):
  return targets.compile_for(
    target, loss.orders(backend)[order], *loss.inputs(N, D, V, dtype, order)
  )


def _temp(compiled):
  return compiled[0].memory_analysis().temp_size_in_bytes


def _largest_temporary(text, V):
  """Elements of the largest array that is not the table's own [V, D]."""
  shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)}
  return max(math.prod(shape) for shape in shapes if shape not in ((V, D), (D, V)))


@pytest.mark.parametrize("order", UNITS)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_small(target, V, order):
  compiled = _compile(target, _backend(target), order, V)  # too large blocks are refused
  _, text = compiled
  kernel_call = "xla.gpu.triton" if target == "h100" else "tpu_custom_call"
  assert kernel_call in text  # not an interpreter
  assert _largest_temporary(text, V) < N * V / 5
  # Dense needs at least float32 logits for a value, and another [N, V] for a gradient and its HVP.
  assert _temp(compiled) < (4 if order == "value" else 6) * N * V / VOCABULARIES[V]
  if V == 32_000 or target == "h100":  # compilers for TPUs refuse a dense module that does not fit
    dense = _compile(target, "reference", order, V)
    assert _largest_temporary(dense[1], V) >= N * V  # the search finds the logits
    assert _temp(compiled) < _temp(dense) / VOCABULARIES[V]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_odd_sizes_compile(target, dtype):
  for order in UNITS:
    shapes = loss.inputs(37, 96, 1003, dtype, order)
    targets.compile_for(target, loss.orders(_backend(target))[order], *shapes)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_compiles_at_full_size(target):
  """Twice the bytes in every block, and matmuls of several passes."""
  _compile(target, _backend(target), "hvp", 32_000, "float32")


@pytest.mark.parametrize("order", ["value", "gradient", "hvp"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_attention_compiles_and_holds_no_scores(target, K, order):
  B, S, H = 1, 4096, 2
  shapes = attention.inputs(B, S, H, K, "bfloat16", order)
  compiled = targets.compile_for(target, attention.orders(_backend(target))[order], *shapes)
  assert ("xla.gpu.triton" if target == "h100" else "tpu_custom_call") in compiled[1]
  assert _largest_temporary(compiled[1], 0) == B * S * H * K  # S S would be 16 times as much
  # 3 inputs (6 with tangents) and 3 results; TPUs pad head width 64 to 128.
  assert _temp(compiled) < 20 * (128 // K) * 4 * B * S * H * K


@pytest.mark.parametrize("target", TARGETS)
def test_attention_in_float32_and_at_odd_sizes_compiles(target):
  for S, K, dtype in ((300, 32, "float32"), (77, 40, "bfloat16")):
    shapes = attention.inputs(2, S, 2, K, dtype, "hvp")
    targets.compile_for(target, attention.orders(_backend(target))["hvp"], *shapes)


@pytest.mark.skipif(missing["v5e"], reason=reason)
def test_a_sequence_too_long_for_vmem_is_an_error():
  shapes = attention.inputs(1, 2**17, 1, 128, "bfloat16", "value")
  with pytest.raises(ValueError, match="needs .* bytes of VMEM.*use the XLA backend"):
    targets.compile_for("v5e", attention.orders("pallas_tpu")["value"], *shapes)


@pytest.mark.parametrize("spread", ["population=2,data=2", "population=4,data=1"])
def test_kernels_compile_under_a_mesh(spread):
  if missing["v5e"]:
    pytest.skip(reason)
  small = dict(model="nano", rater="nano", n_models=4, inner_batch=8, outer_batch=8)
  small |= dict(mode="mixed", steps_per_call=2, meta_steps=2, checkpoint_every=2)
  backends = dict(loss_backend="pallas_tpu", attention_backend="pallas_tpu")
  compiled = plan.compile_run(Config(**small, **backends), "v5e:2x2", spread, 259)
  assert compiled.fits and compiled.work.unknown_loops == 0


@pytest.mark.parametrize(
  "target, mesh",
  [("v5e", None), ("v5e:2x2", "population=2,data=2"), ("v5p:2x2x1", None), ("h100", None)],
)
def test_a_small_run_is_planned(target, mesh):
  if missing[target.split(":")[0]]:
    pytest.skip(reason)
  small = dict(model="nano", rater="nano", n_models=2, inner_batch=8, outer_batch=8)
  config = Config(**small, mode="mixed", steps_per_call=2, meta_steps=2, checkpoint_every=2)
  compiled = plan.compile_run(config, target, mesh, 259)
  assert compiled.fits and 0 < compiled.arguments < compiled.peak < 1e9 and compiled.temp > 0
  assert compiled.work.unknown_loops == 0 and compiled.traffic.unknown_loops == 0
  least = config.n_models * plan.minimum(config, 259).total
  assert least < compiled.work.matmuls < 1.5 * least
  exchanged = compiled.traffic.collectives
  if compiled.devices == 1:
    assert exchanged == {}
  else:
    assert exchanged["all-reduce"][1] > 0
    assert plan.report(config, target, 259, compiled).count("\nfits\n") == 1


@pytest.mark.skipif(missing["v5e"], reason=reason)
def test_the_command_reports_its_configuration(tmp_path):
  flags = ["--preset=paper", "--sequence_length=64", "--model=nano", "--rater=nano"]
  flags += ["--n_models=2", "--inner_batch=8", "--outer_batch=8"]
  flags += ["--target=v5e:2x2", "--mesh=population=2,data=2"]
  said = jobs.succeed("-m", tmp_path, "planner", *flags)
  assert said.startswith(f"$ python -m planner {' '.join(flags)}\nv5e:2x2: 4 devices;")
  small = dict(model="nano", rater="nano", n_models=2, inner_batch=8, outer_batch=8)
  least = plan.minimum(Config(**PRESETS["paper"] | small | dict(sequence_length=64)), 32_000)
  assert "\nfits\n" in said and f"minimum of mode mixed  {2 * least.total:.4g} FLOPs" in said


def _memory_of_a_layer(target, T, meta_gradient):
  """Compiled memory of meta_gradient(loss, optimizer, state, weights [T, B], x [T, B, W]) for a
  layer of W x W, whose parameters dwarf its activations; and the bytes of the parameters."""
  if missing[target]:
    pytest.skip(reason)
  B, W = 64, 2048

  def loss(w_WW, weights_B, x_BW):
    return jnp.mean(weights_B * jnp.sum(jnp.tanh(x_BW @ w_WW) ** 2, -1)), ()

  optimizer = optax.adam(1e-3, eps_root=1e-8)
  weights, w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((T, B), (W, W), (T, B, W)))
  state = jax.eval_shape(functools.partial(inner_loop.init, optimizer), w)
  function = functools.partial(meta_gradient, loss, optimizer)
  compiled, _ = targets.compile_for(target, function, state, weights, x)
  return compiled.memory_analysis(), 4 * W * W


@pytest.mark.parametrize("target, T, replay", [("h100", 100, 1), ("h100", 100, 2), ("v5e", 100, 1)])
def test_a_long_horizon_takes_what_its_plan_saves(target, T, replay):
  def meta_gradient(loss, optimizer, state, weights_TB, x_TBW):
    def outer(weights_TB):
      after, _ = inner_loop.unroll(loss, optimizer, state, weights_TB, x_TBW, replay=replay)
      return loss(after.params, jnp.ones_like(weights_TB[0]), x_TBW[0])[0]

    return jax.grad(outer)(weights_TB)

  memory, size = _memory_of_a_layer(target, T, meta_gradient)
  assert memory.temp_size_in_bytes < (mixflow.plan(T, replay=replay).saved() + 25) * size


@pytest.mark.parametrize("target, T, most", [("h100", 2, 2.5), ("h100", 8, 14), ("v5e", 8, 10)])
def test_states_are_recomputed_though_the_compiler_could_keep_them(target, T, most):
  """`most` in copies of the parameters: T gradients and one step's own. (3.6, 16.5 and 12.2 without
  the barriers of mixflow.py.)"""

  def meta_gradient(loss, optimizer, state, weights_TB, x_TBW):
    outer = lambda w: loss(w, jnp.ones_like(weights_TB[0]), x_TBW[0])[0]
    return inner_loop.window_gradient(outer, loss, optimizer, state, weights_TB, x_TBW)

  memory, size = _memory_of_a_layer(target, T, meta_gradient)
  assert memory.temp_size_in_bytes < most * size


@pytest.mark.skipif(missing["v5e"], reason=reason)
def test_a_program_that_does_not_fit_is_reported():
  config = Config(**PRESETS["paper"] | dict(model="nano", rater="nano", n_models=1))
  config = dataclasses.replace(config, steps_per_call=1, inner_batch=2**13, outer_batch=2**13)
  compiled = plan.compile_run(config, "v5e", None, 259)
  assert not compiled.fits and "exceeds available HBM" in compiled.refusal
  assert compiled.peak > 16e9


@pytest.mark.skipif(missing["h100"], reason=reason)
def test_too_much_shared_memory_is_refused(monkeypatch):
  """Hence a passing compile means that the kernels fit."""
  monkeypatch.setattr(pallas_gpu, "STAGES", 9)
  monkeypatch.setattr(device, "SHARED_BYTES", {"": 10**9})
  with pytest.raises(jax.errors.JaxRuntimeError, match="[Ss]hared memory"):
    _compile("h100", "pallas_gpu", "value", 32_000)
