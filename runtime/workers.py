"""Independent tasks, in turn or (on CPUs) several at a time, each on its own core.

A small model's step uses little more than one core, so two at a time take no longer.
"""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable

import jax
import tqdm
from absl import logging

from runtime import cpu
from runtime.cli import check


class Workers:
  """Calls task(item, *arguments, progress) for `jobs` items at a time."""

  def __init__(self, arguments: tuple, jobs: int):
    self.arguments, self.pool = arguments, None
    check(
      jobs == 1 or jax.default_backend() == "cpu",
      f"--jobs={jobs} needs CPUs: one process takes all memory of a GPU or TPU",
    )
    if jobs > 1:
      context = multiprocessing.get_context("spawn")
      cores = context.Queue()
      for i in range(jobs):
        cores.put(i)
      self.pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (cores,))

  def do(self, title: str, task: Callable, items: list) -> None:
    """Returns when all items are done; the first error stops the others."""
    if self.pool is None:
      for item in items:
        task(item, *self.arguments, True)
      return
    running = [self.pool.submit(task, item, *self.arguments, False) for item in items]
    try:
      done = concurrent.futures.as_completed(running)
      for future in tqdm.tqdm(done, title, total=len(running), unit=" done"):
        future.result()
    except BaseException:
      for process in multiprocessing.active_children():
        process.terminate()
      self.close()
      raise

  def close(self) -> None:
    if self.pool is not None:
      self.pool.shutdown(cancel_futures=True)


def _start(cores):
  """Runs in a worker, before JAX starts its threads."""
  threading.Thread(target=_exit_with_parent, daemon=True).start()
  if hasattr(os, "sched_setaffinity"):
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {available[cores.get() % len(available)]})
  cpu.keep_freed_memory()
  logging.set_verbosity(logging.WARNING)


def _exit_with_parent():
  """Stops a worker whose parent died, so that no orphan writes into a resumed run."""
  multiprocessing.parent_process().join()
  os._exit(1)
