"""Chips to plan and compile for; this machine needs none of them.

A target is a chip, `v5e`, or a slice of a pod, `v5e:8x8`: chips per axis, three axes for v5p.
Compiling for TPUs needs `libtpu`; for an H100 `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's
version, and `ptxas`. Nothing is executed.
"""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import kernels.device
from runtime.cli import check, user_error


class Chip(NamedTuple):
  """Peaks from the datasheet."""

  flops: float  # per second, bfloat16 matmuls
  bandwidth: float  # bytes per second, of its memory
  memory: float  # bytes
  smallest: str  # topology that a single TPU is taken from; "" of a GPU

  @property
  def platform(self) -> str:
    return "cuda" if self.smallest == "" else "tpu"


CHIPS = {
  "v5e": Chip(197e12, 819e9, 16e9, "1x1"),
  "v5p": Chip(459e12, 2765e9, 95e9, "2x2x1"),
  "v6e": Chip(918e12, 1640e9, 32e9, "1x1"),
  "h100": Chip(989e12, 3352e9, 80e9, ""),  # SXM
}
NAMES = tuple(CHIPS)

LIBTPU = {  # environment variables, for a machine without a TPU
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}

H100 = pathlib.Path(__file__).with_name("h100.textproto")


def chip(target: str) -> Chip:
  """The chip of "v5e" or "v5e:8x8". Raises UserError if there is none."""
  name = target.split(":")[0]
  choices = f"a chip ({', '.join(CHIPS)}), with a TPU's topology v5e:8x8"
  check(name in CHIPS, f"--target={target} is unknown: {choices}")
  return CHIPS[name]


def devices(target: str) -> list[Any]:
  """The devices of a target. Raises UserError if it does not exist or lacks its compiler."""
  name, _, topology = target.partition(":")
  gpu = chip(target).platform == "cuda"
  _put_ptxas_on_path()
  has = importlib.util.find_spec
  check(
    (has("jax_cuda13_plugin") and shutil.which("ptxas")) if gpu else has("libtpu"),
    f"--target={target} needs {'jax-cuda13-plugin and ptxas' if gpu else 'libtpu'}: "
    "`make .venv-compile/ready` once, then .venv-compile/bin/python",
  )
  if gpu:
    check(not topology, f"--target={target}: GPUs are planned one at a time: --target=h100")
    options = dict(topology_name="1x1x1", topology="1x1x1", target_config=H100.read_text())
    return topologies.get_topology_desc(platform="cuda", **options).devices
  os.environ.update(LIBTPU | dict(os.environ))
  full = f"{name}:{topology or CHIPS[name].smallest}"
  errors = RuntimeError, ValueError, NotImplementedError
  with user_error(errors, f"--target={target} is unknown to libtpu"):
    found = topologies.get_topology_desc(full, platform="tpu").devices
  return found if topology else found[:1]


def device(target: str) -> Any:
  return devices(target)[0]


def compile_for(target: str, function: Callable, *shapes: Any) -> tuple[jax.stages.Compiled, str]:
  """Compiles `function` of jax.ShapeDtypeStructs for one device; also returns the module's text."""
  here = SingleDeviceSharding(device(target))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
  with lowering_for(target):
    traced = jax.jit(function, out_shardings=here).trace(*shapes)
    return compile_with_text(traced.lower(lowering_platforms=(chip(target).platform,)))


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """`lowered.compile()`, and the module's text as the compiler prints it: `as_text` fails where JAX
  cannot read the modules of a newer libtpu."""
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=dump)
    (path,) = pathlib.Path(folder).glob("*after_optimizations.txt")
    return compiled, path.read_text()


@contextlib.contextmanager
def lowering_for(target: str):
  """Context in which kernels are traced for the target and its compiler."""
  kind, lowering = device(target).device_kind, contextlib.nullcontext()
  if chip(target).platform == "cuda" and jax.__version_info__ >= (0, 11):
    # From then on, Triton kernels ask JAX which device they are lowered for.
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    lowering = jax.sharding.use_abstract_mesh(mesh)
  with kernels.device.compile_for(kind), lowering:
    yield


def _put_ptxas_on_path():
  """Finds ptxas in the wheel nvidia-cuda-nvcc."""
  if not shutil.which("ptxas"):
    folders = [os.path.join(root, "nvidia", "cu13", "bin") for root in sys.path]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *folders])
