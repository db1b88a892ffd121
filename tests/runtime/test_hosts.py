"""Several hosts: two processes on loopback are one run, and neither waits for a dead one."""

import json
import os
import re
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

from runtime import cli, hosts

HEARTBEAT = 10  # seconds
FLAGS = (
  *jobs.SMALL,
  "--model=nano",
  "--rater=nano",
  "--meta_steps=120",
  "--mode=mixed",
)


@pytest.fixture
def start(corpus, cache, tmp_path):
  """(name of the workdir, flags) -> a process of train.py or `script`, killed after the test."""
  started = []

  def of(workdir, *flags, script="train.py"):
    where = [f"--workdir={tmp_path / workdir}", f"--cache_dir={cache}"]
    where += [f"--data={corpus}", *FLAGS] if script == "train.py" else []
    where = [f"--output={tmp_path / workdir}"] if script == "curate.py" else where
    started.append(jobs.start(script, cache, *where, *flags))
    return started[-1]

  yield of
  for process in started:
    process.kill()
    process.communicate()


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_hosts(start, workdir, *flags, **script):
  coordinator = f"--coordinator=localhost:{free_port()}"
  more = (*flags, "--num_processes=2", f"--heartbeat={HEARTBEAT}")
  return [start(workdir, coordinator, *more, f"--process_id={i}", **script) for i in range(2)]


# A line of Gloo, whose threads write their pieces into each other's lines.
GLOO = re.compile(
  r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : ?| )*"
)


def finish(processes):
  """The leader's output; all must succeed."""
  said = [process.communicate(timeout=600) for process in processes]
  for process, (_, errors) in zip(processes, said, strict=True):
    assert process.returncode == 0, errors
  outputs = [
    "\n".join(line for line in output.splitlines() if not GLOO.fullmatch(line))
    for output, _ in said
  ]
  assert not any(outputs[1:])  # only the leader prints
  return outputs[0]


@pytest.fixture
def two_devices(monkeypatch):
  """() -> the jobs started from then on see two CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
  return lambda: monkeypatch.setenv("XLA_FLAGS", flags)


def assert_same_run(two, one):
  actual, expected = state_and_metrics(two), state_and_metrics(one)
  for a, e in zip(actual, expected, strict=True):
    assert_close(a, e, 1e-6)


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
def test_two_hosts_with_deaths_between_are_one_run(start, tmp_path, two_devices):
  sharing = "--mesh=data=2"
  for dies, after in ((1, 8), (0, 40)):
    both = start_hosts(start, "two", sharing)
    jobs.wait_until(lambda after=after: latest(tmp_path / "two") >= after, both[0])
    assert both[dies].poll() is None, both[dies].communicate()[1]
    both[dies].send_signal(signal.SIGKILL)
    assert_ends_by_itself(both[1 - dies])
    both[dies].communicate()
  output = finish(start_hosts(start, "two", sharing))
  assert "resuming after meta-step" in output and "DataRater after 120 meta-steps" in output
  two_devices()
  finish([start("one", sharing)])
  assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_hosts_one_of_which_is_asked_to_stop_then_freezes(start, tmp_path, two_devices):
  sharing = "--mesh=population=2"
  both = start_hosts(start, "two", sharing)
  jobs.wait_until(lambda: latest(tmp_path / "two") >= 8, both[0])
  both[1].send_signal(signal.SIGTERM)  # one is asked, both stop
  assert "stopped: checkpoint written after" in finish(both)
  stopped = latest(tmp_path / "two")
  assert 8 <= stopped < 120
  both = start_hosts(start, "two", sharing)
  jobs.wait_until(lambda: latest(tmp_path / "two") >= stopped + 8, both[0])
  both[1].send_signal(signal.SIGSTOP)  # alive, and silent
  assert_ends_by_itself(both[0])
  both[1].kill()
  output = finish(start_hosts(start, "two", sharing))
  assert "DataRater after 120 meta-steps" in output
  two_devices()
  finish([start("one", sharing)])
  assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_hosts_evaluate_what_one_does(start, small_rater, tmp_path, two_devices):
  flags = [f"--rater={small_rater}", "--models=nano", "--seeds=0", "--steps=12", "--batch=4"]
  flags += ["--evaluations=3", "--policies=none,datarater,pplx_bottom", "--sweep_discard=0.25,0.5"]
  said = finish(start_hosts(start, "two", *flags, script="evaluate.py"))

  long = [*flags[:3], "--steps=40000", "--batch=4", "--evaluations=4000", "--policies=none"]
  both = start_hosts(start, "asked", *long, script="evaluate.py")
  curve = tmp_path / "asked" / "runs" / "nano-none-0-seed0" / "curve.jsonl"
  jobs.wait_until(lambda: curve.exists() and curve.read_text(), both[0])
  both[1].send_signal(signal.SIGTERM)  # one is asked, both stop
  assert "stopped: checkpoint written after step" in finish(both)

  two_devices()
  assert finish([start("one", *flags, script="evaluate.py")]) == said.replace("two", "one")
  two, one = (json.loads((tmp_path / x / "results.json").read_text()) for x in ("two", "one"))
  assert two == one


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_texts(path, count, bad=(), odd=()):
  """A --data= flag. Lines `bad` are not JSON; lines `odd` hold a text instead of a number."""
  rng = np.random.default_rng(0)
  words = "the rater scores each text and the inner models learn from what it likes best".split()
  texts = [f"{i} " + " ".join(rng.choice(words, rng.integers(1, 40))) for i in range(count)]
  records = [{"text": text, "n": "" if i in odd else i} for i, text in enumerate(texts)]
  lines = ["{" if i in bad else json.dumps(record) for i, record in enumerate(records)]
  path.write_text("\n".join(lines))
  return f"--data={path}"


@pytest.mark.slow
def test_two_hosts_curate_to_the_bytes_of_one_whatever_happens(start, small_rater, tmp_path):
  flags = [f"--rater={small_rater}", write_texts(tmp_path / "in.jsonl", 4000, bad=(9, 77, 3999))]
  flags += ["--discard=0.5", "--shard_records=8"]
  two, of = tmp_path / "two", dict(script="curate.py")
  count = lambda files: len(list(two.glob(files)))

  def running(files, n=2):
    enough = count(files) + 30
    of_run = start_hosts(start, "two", *flags, **of) if n > 1 else [start("two", *flags, **of)]
    jobs.wait_until(lambda: count(files) >= enough, of_run[0])
    assert [host.poll() for host in of_run] == [None] * n, of_run[0].communicate()[1]
    return of_run

  for dies in (1, 0):
    both = running("scores/*.npz")
    both[dies].send_signal(signal.SIGKILL)
    assert_ends_by_itself(both[1 - dies])
    both[dies].communicate()
  (two / "scores" / "00003.npz").unlink()  # leaves a gap
  for files, n, asked in (("scores/*.npz", 2, 1), ("scores/*.npz", 1, 0), ("part-*", 2, 0)):
    of_run = running(files, n)
    of_run[asked].send_signal(signal.SIGTERM)  # one is asked, all stop
    assert "stopped: start again to resume" in finish(of_run)
    assert count(files) < 500
  parts = {int(path.stem.removeprefix("part-")) for path in two.glob("part-*")}
  assert max(parts) > len(parts)  # of both hosts, with a gap between
  said = finish(start_hosts(start, "two", *flags, **of))
  assert count("part-*") == 500
  assert finish([start("one", *flags, **of)]).endswith(said)
  assert "records rejected: 3 broken JSON" in said
  assert contents(two) == contents(tmp_path / "one")


@pytest.mark.slow
def test_two_hosts_of_two_devices_curate_what_one_does(start, small_rater, tmp_path, two_devices):
  two_devices()
  flags = [f"--rater={small_rater}", write_texts(tmp_path / "in.jsonl", 110), "--score_only"]
  flags += ["--shard_records=9", "--format=parquet", "--max_documents=100"]
  of = dict(script="curate.py")
  said = finish(start_hosts(start, "two", *flags, "--mesh=data=4", **of))
  assert "x 2 on each of 2 hosts" in said
  one = finish([start("one", *flags, "--mesh=data=2", **of)])
  assert said.replace(" on each of 2 hosts", "") == one
  assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
  "wrong, by, message",
  [
    (dict(bad=range(500, 1000)), (0, 1), "500 of 1000 records are unusable"),
    (dict(odd=[5]), (0,), "have fields of two kinds"),  # seen by the host that scores this shard
    (dict(odd=[105]), (1,), "have fields of two kinds"),
  ],
)
def test_input_that_two_hosts_cannot_curate(wrong, by, message, start, small_rater, tmp_path):
  flags = [f"--rater={small_rater}", write_texts(tmp_path / "in.jsonl", 1000, **wrong)]
  flags += ["--discard=0.5", "--shard_records=100", "--format=parquet"]
  both = start_hosts(start, "two", *flags, script="curate.py")
  said = [host.communicate(timeout=120)[1].replace("\r", "\n").splitlines() for host in both]
  assert all(host.returncode not in (0, None) for host in both)
  told = [i for i in range(2) if any(x.startswith("error: ") and message in x for x in said[i])]
  assert told and set(told) <= set(by), said
  for other in {0, 1} - set(by):
    assert any("another host" in x or "another task died" in x for x in said[other]), said[other]


@pytest.mark.slow
def test_two_hosts_that_curate_must_share_the_folder(start, small_rater, tmp_path):
  flags = [f"--rater={small_rater}", write_texts(tmp_path / "in.jsonl", 40), "--score_only"]
  flags += ["--shard_records=10", "--num_processes=2", f"--heartbeat={HEARTBEAT}"]
  flags += [f"--coordinator=localhost:{free_port()}"]
  both = [start(f"of{i}", *flags, f"--process_id={i}", script="curate.py") for i in range(2)]
  errors = "".join(host.communicate(timeout=120)[1] for host in both)
  assert "error: the hosts see different files in" in errors
  assert not any(host.returncode == 0 for host in both) and not list(tmp_path.glob("*/part-*"))


def assert_ends_by_itself(host):
  """With a message, soon after another host was lost."""
  lost = time.monotonic()
  _, errors = host.communicate(timeout=120)
  assert time.monotonic() - lost < 2 * HEARTBEAT + 10
  assert host.returncode != 0
  assert "another host" in errors or "another task died" in errors, errors


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
    hosts.start(hosts.Hosts(*wrong))


def test_a_missing_cluster_is_one_line(start):
  process = start("never", "--coordinator=auto")
  _, errors = process.communicate(timeout=60)
  jobs.assert_one_line_error(
    subprocess.CompletedProcess([], process.returncode, "", errors), "--coordinator=auto"
  )
