"""Several hosts, one run: jax.distributed, and what only one of them does.

  python train.py --workdir=/shared/run --coordinator=host0:1234 --num_processes=2 --process_id=0
  python train.py --workdir=/shared/run --coordinator=host0:1234 --num_processes=2 --process_id=1

or --coordinator=auto on all hosts of a Slurm job, a GKE job set or a Cloud TPU slice. Hosts run the
same program on the same flags and share the workdir; each reads the sequences of its own devices
(curate.py: scores shards of its own), and the leader (process 0) writes metrics and reports. If one
dies all others stop, within `heartbeat` seconds; started again, the run goes on from its last
checkpoint.
"""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from cli import UserError, check
from documents import DataError, one_line


def start(
  coordinator: str | None, processes: int | None, process: int | None, heartbeat: int = 100
) -> None:
  """Joins the run; before anything else of JAX. Does nothing without a coordinator.

  Raises:
    UserError: some of the three are missing or contradict each other, or the others do not come.
  """
  if coordinator is None:
    check(
      processes is None and process is None,
      "--num_processes and --process_id go with --coordinator=HOST:PORT of process 0",
    )
    return
  if coordinator == "auto":
    check(
      processes is None and process is None,
      "--coordinator=auto finds out --num_processes and --process_id itself: leave them out",
    )
    given = {}
  else:
    check(
      processes is not None and process is not None and 0 <= process < processes,
      f"--coordinator={coordinator} needs --num_processes={processes} and "
      f"--process_id={process}, 0 <= process_id < num_processes",
    )
    given = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat)
  except (ValueError, RuntimeError) as error:
    check(
      False,
      f"--coordinator={coordinator} does not start the run's hosts "
      f"({str(error).splitlines()[0][:200]}): see that process 0 can be reached there and that "
      "each host has its own --process_id",
    )


def define_flags() -> None:
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several hosts, or auto")
  flags.DEFINE_integer("num_processes", None, "of several hosts")
  flags.DEFINE_integer("process_id", None, "of this one of several hosts, from 0")
  flags.DEFINE_integer("heartbeat", 100, "seconds after which a silent host counts as dead")


def start_by_flags() -> None:
  FLAGS = flags.FLAGS
  start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.heartbeat)


def leader() -> bool:
  """True on the one host that writes what all of them know."""
  return jax.process_index() == 0


def say(*text: Any) -> None:
  """Prints, on the leader alone."""
  if leader():
    print(*text, flush=True)


def leader_first(function: Callable[[], Any]) -> Any:
  """Calls it on the leader, then on the others, which see the files that the leader wrote."""
  result = function() if leader() else None
  wait_for_all("leader first")
  return result if leader() else function()


def wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def as_leader(flag: bool) -> bool:
  """The leader's answer, on all hosts: they must not take different ways."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def any_host(flag: bool) -> bool:
  """True on all hosts where it is on any."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def agree_on(folder: Path, found: Any) -> None:
  """What was found in the folder says what is to be done: all hosts must have found the same. None
  goes on before all are here.

  Raises:
    UserError: they see different files.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.blake2b(repr(found).encode(), digest_size=16).digest()
  mine = np.frombuffer(digest, np.uint8)
  check(
    bool((multihost_utils.process_allgather(mine) == mine).all()),
    f"the hosts see different files in {folder}: let it be one folder that they share",
  )


@contextlib.contextmanager
def stop_together() -> Iterator[None]:
  """A host that fails says why and ends at once: JAX's own end would wait for all hosts, and they
  for this one. The others then fail in turn, by their collectives or the missing heartbeat."""
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
      raise  # asked to stop, all hosts end in the same place
    status = _report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report(error: BaseException) -> int:
  if isinstance(error, (UserError, DataError)):
    print(f"error: {error}", file=sys.stderr)
    return 2
  traceback.print_exception(error)
  # The collectives' errors come as several types: a lost host cannot be told from other failures.
  print(
    f"error: process {jax.process_index()} of {jax.process_count()} cannot go on "
    f"({one_line(error)}): if another host has died, see its output; start all of "
    "them again with the same flags, to go on where the run was last saved",
    file=sys.stderr,
  )
  return 1
