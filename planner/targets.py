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
from runtime.cli import check


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

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # H100 SXM, from its datasheet


def chip(target: str) -> Chip:
  """The chip of "v5e" or "v5e:8x8".

  Raises:
    UserError: no such chip.
  """
  name = target.split(":")[0]
  check(
    name in CHIPS,
    f"--target={target} is unknown: a chip ({', '.join(CHIPS)}), with a TPU's topology v5e:8x8",
  )
  return CHIPS[name]


def devices(target: str) -> list[Any]:
  """The devices of a target, for meshes and shardings.

  Raises:
    UserError: no such target, or its compiler is not installed.
  """
  name, _, topology = target.partition(":")
  cuda = chip(target).platform == "cuda"
  _put_ptxas_on_path()
  has = importlib.util.find_spec
  check(
    (has("jax_cuda13_plugin") and shutil.which("ptxas")) if cuda else has("libtpu"),
    f"--target={target} needs {'jax-cuda13-plugin and ptxas' if cuda else 'libtpu'}: "
    "`make .venv-compile/ready` once, then .venv-compile/bin/python",
  )
  if cuda:
    check(not topology, f"--target={target}: GPUs are planned one at a time: --target=h100")
    return topologies.get_topology_desc(
      platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
    ).devices
  for key, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # several processes may compile at once
    ("TPU_STDERR_LOG_LEVEL", "3"),
    ("TPU_MIN_LOG_LEVEL", "3"),
  ):
    os.environ.setdefault(key, value)
  full = f"{name}:{topology or CHIPS[name].smallest}"
  try:
    found = topologies.get_topology_desc(full, platform="tpu").devices
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0][:100]
    check(False, f"--target={target} is unknown to libtpu: {reason}")
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
  platform, kind = chip(target).platform, device(target).device_kind
  with kernels.device.compile_for(kind), _abstract_device(platform, kind):
    yield


def _abstract_device(platform, kind):
  """From JAX 0.11 on, Triton kernels ask JAX which device they are lowered for."""
  if platform != "cuda" or jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def _put_ptxas_on_path():
  """Finds ptxas in the wheel nvidia-cuda-nvcc."""
  if not shutil.which("ptxas"):
    folders = [os.path.join(root, "nvidia", "cu13", "bin") for root in sys.path]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *folders])
