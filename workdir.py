"""The folder of a run: its configuration, checkpoints and metrics, each of which appears whole."""

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
import tqdm

import report
from cli import UserError, check

State = TypeVar("State", bound=NamedTuple)


def open_workdir(
  workdir: Path, config: Any, corpus_fingerprint: str, flag: str = "workdir"
) -> None:
  """Writes config.json into a new workdir; refuses a workdir of another configuration.

  `flag` is the one that names the folder. What a kill left of an unfinished file does not count."""
  path = workdir / "config.json"
  mine = json.loads(json.dumps({"config": vars(config), "corpus": corpus_fingerprint}))
  if path.exists():
    try:
      saved = json.loads(path.read_text())
      before, now = saved["config"] | {"corpus": saved["corpus"]}, mine["config"]
    except (ValueError, KeyError, TypeError):
      raise UserError(
        f"{path} is not readable as a run's configuration: use another --{flag}"
      ) from None
    now = now | {"corpus": corpus_fingerprint}
    changed = [
      f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in now if before.get(k) != now[k]
    ]
    check(
      not changed,
      f"{workdir} holds a run of another configuration ({'; '.join(changed)}): "
      f"use another --{flag}, or the same flags and data",
    )
    return
  other = [p.name for p in workdir.iterdir()] if workdir.is_dir() else []
  other = [name for name in other if not name.startswith(".writing-")]
  check(
    not other, f"{workdir} is neither empty nor a run ({other[0] if other else ''}): use another"
  )
  check(not workdir.exists() or workdir.is_dir(), f"--{flag}={workdir} is a file")
  workdir.mkdir(parents=True, exist_ok=True)
  report.write_atomically(path, lambda f: f.write(json.dumps(mine, indent=1).encode()))


class Checkpoints:
  """Orbax checkpoints of a state, a NamedTuple of arrays; each appears atomically."""

  def __init__(self, workdir: Path):
    self.folder = workdir.resolve() / "checkpoints"
    self.manager = ocp.CheckpointManager(
      self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )

  def save(self, step: int, state: State):
    self.manager.save(step, args=ocp.args.StandardSave(state._asdict()))

  def restore_latest(self, state: State) -> State:
    step = self.manager.latest_step()
    if step is None:
      return state
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    return type(state)(**self._restore(step, ocp.args.StandardRestore(template)))

  def restore_eta(self, template):
    step = self.manager.latest_step()
    check(step is not None, f"{self.folder} holds no checkpoint yet")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), template
    )
    item = {"eta": template}
    how = ocp.checkpoint_utils.construct_restore_args(item)
    return self._restore(step, ocp.args.PyTreeRestore(item, how, partial_restore=True))["eta"]

  def _restore(self, step, args):
    try:
      return self.manager.restore(step, args=args)
    except Exception as error:
      raise UserError(
        f"the checkpoint {self.folder / str(step)} cannot be read "
        f"({type(error).__name__}: {str(error).splitlines()[0][:120]}): "
        "delete that folder to go on from the one before"
      ) from error

  def close(self):
    self.manager.wait_until_finished()
    self.manager.close()


class Metrics:
  """A line per step, up to the step of the checkpoint from which a run resumes.

  Without a path (on all hosts but one) nothing is written.
  """

  def __init__(self, path: Path | None, start: int):
    self.file = None
    if path is None:
      return
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          kept += [line] if json.loads(line)["step"] <= start else []
        except (ValueError, KeyError):
          pass  # the line that a kill cut short
    report.write_atomically(path, lambda f: f.write("".join(x + "\n" for x in kept).encode()))
    self.file = open(path, "a")

  def append(self, row: dict):
    if self.file is None:
      return
    print(json.dumps(row), file=self.file, flush=True)

  def write(self, last_step: int, metrics: dict, bar: tqdm.tqdm):
    """A line for each meta-step of one call of meta_step.meta_steps, from its metrics [M, ...].

    The last line has `score_autocorrelation`, unless the scores before the call were all equal.
    """
    if self.file is None:
      return
    metrics = dict(jax.device_get(metrics))
    correlation = float(metrics.pop("score_autocorrelation"))
    comparable = metrics["score_std"][0].max() > 0  # the scores before the call; 0 in a fresh rater
    M = len(metrics["outer_loss"])
    for i in range(M):
      row = {"step": last_step - M + 1 + i} | {k: v[i].tolist() for k, v in metrics.items()}
      if i == M - 1 and comparable:
        row["score_autocorrelation"] = correlation
      self.append(row)
    skipped = int(metrics["skipped"].sum())
    bar.set_postfix_str(
      f"outer loss {metrics['outer_loss'][-1].mean():.3f}, "
      f"score spread {metrics['score_std'][-1].mean():.2f}, "
      f"effective batch {metrics['effective_sample_size'][-1].mean():.1f}"
      + (f", skipped {skipped}" if skipped else "")
    )


class StopSignal:
  """True in `requested` once SIGTERM or Ctrl-C came; a second one ends the process at once."""

  def __init__(self):
    self.requested = False
    self.before = {n: signal.signal(n, self._request) for n in (signal.SIGTERM, signal.SIGINT)}

  def close(self):
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _request(self, number, _):
    self.requested = True
    signal.signal(number, signal.SIG_DFL)
