"""hosts.py: two processes on loopback are one run, and none waits for the dead."""

import json
import os
import signal
import socket
import subprocess
import time

import jax
import jobs
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import assert_close

import cli
import hosts

HEARTBEAT = 10  # seconds
FLAGS = (
  *jobs.SMALL,
  "--model=nano",
  "--rater=nano",
  "--meta_steps=120",
  "--mesh=data=2",
  "--mode=mixed",
)


@pytest.fixture
def start(corpus, cache, tmp_path):
  """(name of the workdir, flags) -> a process; none outlives the test."""
  started = []

  def of(workdir, *flags):
    where = [f"--workdir={tmp_path / workdir}", f"--data={corpus}", f"--cache_dir={cache}"]
    started.append(jobs.start("train.py", cache, *where, *FLAGS, *flags))
    return started[-1]

  yield of
  for process in started:
    process.kill()
    process.communicate()


def start_hosts(start, workdir):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  coordinator = f"--coordinator=localhost:{port}"
  more = ("--num_processes=2", f"--heartbeat={HEARTBEAT}")
  return [start(workdir, coordinator, *more, f"--process_id={i}") for i in range(2)]


def latest(workdir):
  names = [p.name for p in (workdir / "checkpoints").glob("*")]
  return max((int(name) for name in names if name.isdecimal()), default=0)


def state_and_metrics(workdir):
  path = workdir / "checkpoints" / "120" / "default"
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as checkpointer:
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    state = checkpointer.restore(
      path, jax.tree.map(shape, checkpointer.metadata(path).item_metadata.tree)
    )
  rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  scores = {p.name: np.load(p) for p in sorted((workdir / "scores").iterdir())}
  return state, rows, scores


@pytest.mark.slow
def test_two_hosts_with_deaths_between_are_one_run(start, tmp_path, monkeypatch):
  for dies, after in ((1, 8), (0, 40)):
    both = start_hosts(start, "two")
    jobs.wait_until(lambda after=after: latest(tmp_path / "two") >= after, both[0])
    assert both[dies].poll() is None, both[dies].communicate()[1]
    both[dies].send_signal(signal.SIGKILL)
    died = time.monotonic()
    _, errors = both[1 - dies].communicate(timeout=120)
    assert time.monotonic() - died < 2 * HEARTBEAT + 10
    assert both[1 - dies].returncode != 0
    print(errors)
    assert "another host" in errors or "another task died" in errors, errors
    both[dies].communicate()
  both = start_hosts(start, "two")
  (output, errors), (other, _) = (host.communicate(timeout=600) for host in both)
  assert [host.returncode for host in both] == [0, 0], errors
  assert "resuming after meta-step" in output and "DataRater after 120 meta-steps" in output
  said = [line for line in other.splitlines() if not line.startswith("[Gloo]")]
  assert not said  # the leader speaks

  monkeypatch.setenv(
    "XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
  )
  alone = start("one")
  _, errors = alone.communicate(timeout=600)
  assert alone.returncode == 0, errors
  (state, rows, scores), (expected, expected_rows, expected_scores) = (
    state_and_metrics(tmp_path / name) for name in ("two", "one")
  )
  assert_close(state, expected, 1e-6)
  assert_close(rows, expected_rows, 1e-6)
  assert_close(scores, expected_scores, 1e-6)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ((None, 2, None), "go with --coordinator"),
    (("localhost:1", None, 0), "needs --num_processes"),
    (("localhost:1", 2, 2), "0 <= process_id"),
    (("auto", 2, None), "leave them out"),
  ],
)
def test_flags_that_do_not_fit(wrong, message):
  with pytest.raises(cli.UserError, match=message):
    hosts.start(*wrong)


def test_no_cluster_to_be_found_is_one_line(start):
  process = start("never", "--coordinator=auto")
  _, errors = process.communicate(timeout=60)
  jobs.assert_one_line_error(
    subprocess.CompletedProcess([], process.returncode, "", errors), "--coordinator=auto"
  )
