"""The backends that run where nobody names one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import config
import transformer
from kernels import attention, device, loss, score_weighted_loss


@pytest.mark.parametrize(
  "kind, dtype, V, of_attention, of_loss",
  [
    ("NVIDIA H200", "bfloat16", 32_000, "pallas_gpu", "xla"),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 256_000, "pallas_gpu", "pallas_gpu"),
    ("NVIDIA H100 80GB HBM3", "float32", 256_000, "xla", "xla"),  # not measured
    ("NVIDIA A100-SXM4-40GB", "bfloat16", 256_000, "xla", "xla"),  # not measured
    ("TPU v5p", "bfloat16", 256_000, "xla", "xla"),
  ],
)
def test_the_default_is_what_was_measured_to_be_fastest(kind, dtype, V, of_attention, of_loss):
  with device.compile_for(kind):
    assert attention.fastest(dtype) == of_attention
    assert loss.fastest(V, dtype) == of_loss


def test_the_default_device_counts():
  with jax.default_device(jax.devices("cpu")[0]):
    assert device.kind("pallas_gpu") is None


def test_on_a_cpu_xla_is_the_default():
  assert attention.fastest("bfloat16") == loss.fastest(256_000, "bfloat16") == "xla"
  assert config.Config().backends_here(256_000) == ("xla", "xla")


@pytest.mark.parametrize("kind, kernel", [("NVIDIA H200", True), ("cpu", False)])
def test_the_model_and_the_loss_take_the_default(kind, kernel):
  small = transformer.preset("nano", 300)
  qkv = [jnp.ones((1, 32, 2, 16), jnp.bfloat16)] * 3
  attend = lambda *qkv: transformer.attention(*qkv, jnp.ones((1, 32), int), small, causal=True)
  V = 64_000
  x = jnp.ones((16, 8), jnp.bfloat16), jnp.ones((V, 8)), np.zeros(16, int), jnp.ones(16)
  with device.compile_for(kind):
    for program in (jax.make_jaxpr(attend)(*qkv), jax.make_jaxpr(score_weighted_loss)(*x)):
      assert ("pallas_call" in str(program)) == kernel


def test_a_mode_that_needs_two_reverse_passes_takes_xla():
  assert config.Config(mode="reverse").backends == ("xla", "xla")
  assert config.Config(mode="mixed").backends == (None, None)
  assert config.Config(loss_backend="reference").backends == ("reference", None)
