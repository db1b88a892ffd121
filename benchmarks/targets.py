"""Devices to compile for that this machine need not have.

`libtpu` beside JAX compiles for TPUs; `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's own
version and `ptxas` on the PATH compile for an H100. Nothing can be run.
"""

import contextlib
import os

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
NAMES = (*TPU_TOPOLOGIES, "h100")

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
"""  # an H100 SXM, from its datasheet


def device(name: str):
  """A device of the target, for shardings and its `device_kind`."""
  if name in TPU_TOPOLOGIES:
    for key, value in (
      ("TPU_SKIP_MDS_QUERY", "1"),
      ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
      ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
      os.environ.setdefault(key, value)
    return topologies.get_topology_desc(TPU_TOPOLOGIES[name], platform="tpu").devices[0]
  if name == "h100":
    return topologies.get_topology_desc(
      platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
    ).devices[0]
  raise ValueError(f"unknown target {name!r}; choose one of {', '.join(NAMES)}")


def compile_for(name: str, function, *shapes):
  """`function` of jax.ShapeDtypeStructs, its kernels compiled by the target's own compiler."""
  from kernels import pallas_gpu, pallas_tpu

  target = device(name)
  platform = "cuda" if name == "h100" else "tpu"
  backend = pallas_gpu if platform == "cuda" else pallas_tpu
  here = SingleDeviceSharding(target)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
  before, backend.DEVICE = backend.DEVICE, target.device_kind
  try:
    with _abstract_device(platform, target.device_kind):
      traced = jax.jit(function, out_shardings=here).trace(*shapes)
      return traced.lower(lowering_platforms=(platform,)).compile()
  finally:
    backend.DEVICE = before


def _abstract_device(platform, kind):
  """From JAX 0.11 on Triton kernels ask JAX for the device that they are lowered for."""
  if platform != "cuda" or jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
