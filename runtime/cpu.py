"""What a CPU run needs outside JAX."""

import ctypes
import importlib.util
import os
import platform


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
  """Stops glibc from returning XLA's temporary buffers to the kernel after every call (1.2-1.35x).

  Call it first in a command, before JAX starts threads. One arena, no mmap for large blocks, no
  trimming: the process keeps its peak. Does nothing without glibc or where a GPU or TPU plugin is
  installed: one arena slows XLA's compiler threads.
  """
  plugins = any(map(importlib.util.find_spec, ("libtpu", "jax_cuda13_plugin")))
  on_cpu = not plugins or os.environ.get("JAX_PLATFORMS") == "cpu"
  if on_cpu and platform.libc_ver()[0] == "glibc":
    libc = ctypes.CDLL(None)
    # malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for parameter, value in ((-8, 1), (-4, 0), (-1, -1), (-2, 2**28)):
      libc.mallopt(parameter, value)
