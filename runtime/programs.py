"""Compiled programs on disk: what one process compiled, the next one reads."""

import contextlib
import os
from pathlib import Path

import filelock
import jax

LIMIT = 2**31  # bytes of programs; then the least recently used ones are deleted


def keep(cache_dir: str | os.PathLike) -> None:
  """Keeps compiled programs in cache_dir/compiled, for all commands, workers and hosts.

  Call it before JAX compiles. JAX finds a program by its text, its compiler and its devices, and
  compiles again what it cannot read. A folder that JAX_COMPILATION_CACHE_DIR names is used instead.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = Path(cache_dir).absolute() / "compiled"
  with contextlib.suppress(OSError):  # then JAX says that it cannot write there
    folder.mkdir(parents=True, exist_ok=True)
    _delete_unfinished(folder)
  for name, value in (
    ("jax_compilation_cache_dir", str(folder)),
    ("jax_compilation_cache_max_size", LIMIT),
    ("jax_persistent_cache_min_compile_time_secs", 0.1),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for workers


def _delete_unfinished(folder: Path) -> None:
  """Deletes programs that a killed process left half written, which JAX would try to read at every
  start. JAX writes a program's -atime file after it."""
  with filelock.FileLock(folder / ".lockfile", timeout=10):  # the lock of JAX
    for path in folder.glob("*-cache"):
      if not path.with_name(path.name.removesuffix("cache") + "atime").exists():
        path.unlink()
