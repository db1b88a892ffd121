"""A run's folder: configuration, checkpoints and metrics, each written atomically."""

import contextlib
import json
import signal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from runtime.cli import check, user_error
from runtime.files import UNFINISHED, write_text

State = TypeVar("State", bound=NamedTuple)
FORMAT = 3  # of a run's checkpoints; raise it when a state changes its fields or shapes


def open_workdir(workdir: Path, config: Any, corpus: str, flag: str = "workdir") -> None:
  """Writes config.json into a new workdir; refuses one that holds anything but this run.

  Args:
    config: a dataclass; its fields are what must not change.
    corpus: fingerprint of the data, which must not change either.
    flag: the flag that names the folder, for messages.
  """
  advice = f"use another --{flag}"
  check(not workdir.exists() or workdir.is_dir(), f"--{flag}={workdir} is a file")
  path = workdir / "config.json"
  now = json.loads(json.dumps(dict(config=vars(config), corpus=corpus, format=FORMAT)))
  if not path.exists():
    others = [p.name for p in workdir.iterdir()] if workdir.is_dir() else []
    others = [name for name in others if not name.startswith(UNFINISHED)]
    check(not others, f"{workdir} is neither empty nor a run ({', '.join(others[:1])}): {advice}")
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=1))
    return
  problem = f"{path} is not readable as a run's configuration"
  with user_error((ValueError, KeyError, TypeError), problem, advice):
    saved = json.loads(path.read_text())
    before = saved["config"] | {"corpus": saved["corpus"]}
  check(saved.get("format") == FORMAT, f"{workdir} holds a run of an earlier version: {advice}")
  after = now["config"] | {"corpus": now["corpus"]}
  changed = [name for name in after if before.get(name) != after[name]]
  changes = "; ".join(f"{name} was {before.get(name)!r}, is {after[name]!r}" for name in changed)
  check(
    not changed,
    f"{workdir} holds a run of another configuration ({changes}): {advice}, or the same flags and "
    "data",
  )


class Checkpoints:
  """Orbax checkpoints of a state, a NamedTuple of arrays; each appears atomically."""

  def __init__(self, workdir: Path):
    import orbax.checkpoint as ocp

    self.folder = workdir.resolve() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    self.manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state: State) -> None:
    import orbax.checkpoint as ocp

    self.manager.save(step, args=ocp.args.StandardSave(state._asdict()))

  def restore_latest(self, state: State) -> State:
    """The latest state, laid out as `state`; `state` itself if there is no checkpoint."""
    import orbax.checkpoint as ocp

    step = self.manager.latest_step()
    if step is None:
      return state
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    return type(state)(**self._restore(step, ocp.args.StandardRestore(template)))

  def restore_field(self, name: str, template: Any) -> Any:
    """One field of the latest state, on this host's first device."""
    import orbax.checkpoint as ocp

    step = self.manager.latest_step()
    check(step is not None, f"{self.folder} holds no checkpoint yet")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    item = {name: jax.tree.map(place, template)}
    how = ocp.checkpoint_utils.construct_restore_args(item)
    return self._restore(step, ocp.args.PyTreeRestore(item, how, partial_restore=True))[name]

  def _restore(self, step, args):
    problem = f"the checkpoint {self.folder / str(step)} cannot be read"
    with user_error(Exception, problem, "delete that folder to resume from the one before"):
      return self.manager.restore(step, args=args)

  def close(self) -> None:
    self.manager.wait_until_finished()
    self.manager.close()


class Metrics:
  """A JSON line per step. Lines after `start`, the step that a run resumes from, are dropped.

  Without a path (on all hosts but the leader) nothing is written.
  """

  def __init__(self, path: Path | None, start: int):
    self.file = None
    if path is None:
      return
    kept = ""
    for line in path.read_text().splitlines() if path.exists() else ():
      with contextlib.suppress(ValueError, KeyError):  # the line that a kill cut short
        kept += f"{line}\n" if json.loads(line)["step"] <= start else ""
    write_text(path, kept)
    self.file = open(path, "a")

  def append(self, row: dict) -> None:
    if self.file is not None:
      print(json.dumps(row), file=self.file, flush=True)


class StopSignal:
  """`requested` turns True at SIGTERM or Ctrl-C; a second signal ends the process at once."""

  def __init__(self):
    self.requested = False
    self.before = {n: signal.signal(n, self._request) for n in (signal.SIGTERM, signal.SIGINT)}

  def close(self) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _request(self, number, _):
    self.requested = True
    signal.signal(number, signal.SIG_DFL)
