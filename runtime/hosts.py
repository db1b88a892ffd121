"""One run on several hosts: joining it, the leader's part, barriers and failures.

  python train.py --workdir=/shared/run --coordinator=host0:1234 --num_processes=2 --process_id=0
  python train.py --workdir=/shared/run --coordinator=host0:1234 --num_processes=2 --process_id=1

or --coordinator=auto on all hosts of a Slurm job, a GKE job set or a Cloud TPU slice. Hosts run the
same command and share the workdir. Each reads the sequences of its own devices (curate.py: scores
its own shards); the leader (process 0) writes metrics and reports. If a host dies, the others stop
within `heartbeat` seconds; started again, the run resumes from its last checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from runtime.cli import UserError, check, one_line, option, user_error


@dataclasses.dataclass(frozen=True)
class Hosts:
  """Flags of a command that runs on several hosts."""

  coordinator: str | None = option(
    None, "HOST:PORT of process 0, or auto on a cluster", section="Several hosts"
  )
  num_processes: int | None = option(None, "number of hosts")
  process_id: int | None = option(None, "index of this host, from 0")
  heartbeat: int = option(100, "seconds after which a silent host counts as dead")


def start(hosts: Hosts) -> None:
  """Joins the run. Call it before anything else of JAX; does nothing without a coordinator.

  Raises:
    UserError: flags are missing or contradict each other, or the other hosts do not join.
  """
  coordinator, processes, process = hosts.coordinator, hosts.num_processes, hosts.process_id
  named, flags = f"--coordinator={coordinator}", "--num_processes and --process_id"
  alone = processes is None and process is None
  if coordinator is None:
    check(alone, f"{flags} go with --coordinator=HOST:PORT of process 0")
    return
  cluster = {}
  if coordinator == "auto":
    check(alone, f"{named} finds {flags} itself: leave them out")
  else:
    check(
      processes is not None and process is not None and 0 <= process < processes,
      f"{named} needs --num_processes={processes} and --process_id={process}, "
      "0 <= process_id < num_processes",
    )
    cluster = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
  fix = "check that process 0 can be reached there and that each host has its own --process_id"
  with user_error((ValueError, RuntimeError), f"{named} does not start the run's hosts", fix):
    jax.distributed.initialize(**cluster, heartbeat_timeout_seconds=hosts.heartbeat)


def is_leader() -> bool:
  """True on the one host that writes shared results."""
  return jax.process_index() == 0


def say(*text: Any) -> None:
  """Prints, on the leader only."""
  if is_leader():
    print(*text, flush=True)


def progress(name: str, done: int, **options: Any) -> tqdm.tqdm:
  """A bar that starts at `done`; the other hosts' bars are hidden."""
  return tqdm.tqdm(desc=name, initial=done, disable=not is_leader(), **options)


def leader_first(function: Callable[[], Any]) -> Any:
  """Calls the function on the leader, then on the others, which see the leader's files."""
  result = function() if is_leader() else None
  wait_for_all("leader first")
  return result if is_leader() else function()


def wait_for_all(name: str) -> None:
  multihost_utils.sync_global_devices(name)


def as_leader(flag: bool) -> bool:
  """The leader's flag on all hosts, so that all take the same branch."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def any_host(flag: bool) -> bool:
  """True on all hosts if it is true on any."""
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def agree_on(folder: Path, files: Any) -> None:
  """Barrier that raises unless all hosts found the same files in `folder`, since each derives its
  work from them.

  Raises:
    UserError: hosts see different files.
  """
  own = np.frombuffer(hashlib.blake2b(repr(files).encode()).digest(), np.uint8)
  same = bool((multihost_utils.process_allgather(own) == own).all())
  check(same, f"the hosts see different files in {folder}: it must be one shared folder")


@contextlib.contextmanager
def stop_together() -> Iterator[None]:
  """Exits immediately on an error. JAX's shutdown would deadlock: it waits for all hosts, which
  wait for this one. The others then fail by their collectives or the missing heartbeat."""
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
      raise  # when asked to stop, all hosts exit at the same point
    message, status = error, 2
    if not isinstance(error, UserError):
      traceback.print_exception(error)
      # A lost host raises errors of several types, which other failures raise too.
      status = 1
      message = (
        f"process {jax.process_index()} of {jax.process_count()} cannot continue "
        f"({one_line(error)}): if another host has died, see its output; start all of them again "
        "with the same flags to resume from the last checkpoint"
      )
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
