"""The recipe for a GPU fits today's modules: its parts run dry, its flags and paths exist."""

import ast
import importlib.util
import re
import subprocess

import jax.numpy as jnp
import pytest
from jobs import ROOT

import train
from benchmarks import meta_step
from benchmarks.device import correct, flash, machine, peers, roofline
from config import PRESETS, Config
from runtime import cli

DEVICE = ROOT / "benchmarks" / "device"
ON_DEVICE = (DEVICE / "on_device.sh").read_text()
TRAIN = (DEVICE / "train_resume.sh").read_text()


@pytest.mark.parametrize("script", sorted(p.name for p in DEVICE.glob("*.sh")))
def test_scripts_parse(script):
  subprocess.run(["bash", "-n", DEVICE / script], check=True)


def test_on_device_names_modules_paths_and_stages_that_exist():
  modules = re.findall(r"^ +module \S+ \S+ ([\w.]+)", ON_DEVICE, re.M)
  assert len(modules) > 8
  assert [m for m in modules if not importlib.util.find_spec(f"benchmarks.{m}")] == []
  for path in ("benchmarks/device/train_resume.sh", "tests/kernels"):
    assert path in ON_DEVICE and (ROOT / path).exists()
  stages = re.search(r'STAGES:-"([^"]*)"', ON_DEVICE)[1].split()
  assert set(stages) <= set(re.findall(r"^(\w+)\(\)", ON_DEVICE, re.M))
  probes = "\n".join(x for x in ON_DEVICE.splitlines() if re.search("probe| size=|kernels=", x))
  flags = set(re.findall(r"--(\w+)", probes))
  assert len(flags) > 8 and flags <= set(meta_step.Settings.__dataclass_fields__)


@pytest.mark.parametrize("dry", [False, True])
def test_the_flags_of_its_training_run_are_a_configuration(dry):
  both = TRAIN.split('flags="')[1], TRAIN.split('flags="$flags')[1]
  texts = [text.split('"')[0] for text in (both if dry else both[:1])]
  values = dict(re.findall(r"--(\w+)=(\S+)", " ".join(texts)))
  place = set(train.Place.__dataclass_fields__)
  assert set(values) & place == {"preset", "workdir", "cache_dir"}

  def literal(name, text):
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError):
      return [text] if name == "data" else text

  values = {k: literal(k, v) for k, v in values.items()}
  given = {k: v for k, v in values.items() if k not in place}
  config = cli.from_values(Config, PRESETS[values["preset"]] | given)
  assert config.meta_steps > config.checkpoint_every  # so that it can be stopped in between


def test_parts_run_dry(capsys, quick_compile):
  machine.main(dry=True)
  flash.main(dry=True)
  roofline.main("nano", "nano", "none")
  lines = capsys.readouterr().out.splitlines()
  assert sum(line.startswith("CEILING") for line in lines) == 4
  xla = [line for line in lines if line.startswith("RESULT xla attention")]
  assert len(xla) == 2 and all("TFLOP/s" in line for line in xla)
  kernels = [x.split(" x ")[1] for x in lines if re.match(r" +[\d.]+ TFLOP +\d+ x ", x)]
  assert any("matmul" in k for k in kernels) and any("matmul" not in k for k in kernels)


def test_libraries_are_compared_with_float32(quick_compile):
  for name in ("xla", "jax_dense_bf16"):
    seconds, error, memory = peers.with_jax(name, 64, 64, 300)
    assert seconds > 0 and 0 < error < 1e-2 and memory > 0


@pytest.mark.parametrize("factor, fine", [(1.0, True), (1.05, False), (float("nan"), False)])
def test_a_wrong_kernel_is_found(factor, fine, capsys):
  kernels = {"pallas_gpu": lambda x: (factor * x, x), "xla": lambda x: (x, x)}
  orders = lambda backend: {"value": kernels[backend]}
  x = jnp.ones((3, 4), jnp.bfloat16)
  assert correct.agree("f", orders, "value", [x], [x.astype(jnp.float32)], bound=1e-2) == fine
  assert ("CHECK ok" if fine else "CHECK BAD") in capsys.readouterr().out


def test_a_meta_step_is_measured_and_profiled(capsys, quick_compile):
  small = dict(model="nano", batch=2, seq=16, vocab=32, repeats=2, profile=True)
  settings = meta_step.Settings(**small)
  shape = meta_step.shape(settings, None)
  measured = meta_step.measure(settings, 2, 1, shape, shape, "mixed")
  assert len(measured.seconds) == 2 and measured.memory.temp_size_in_bytes > 0
  assert 0 < measured.outer_loss < 10
  assert re.search(r"RESULT kernels of one meta-step: [\d.]+ ms in \d+", capsys.readouterr().out)
