"""train.py from the command line: resume to the same bytes, bad input in one line, the report."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import jobs
import numpy as np
import orbax.checkpoint as ocp
import pytest
from chex import assert_trees_all_equal
from jobs import SMALL, assert_one_line_error, wait_until

import rating
from runtime import cli
from runtime.workdir import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def flags(corpus, cache):
  """A workdir -> the flags of a run on that corpus."""

  def of(workdir, *more, data=corpus):
    return [f"--workdir={workdir}", f"--data={data}", f"--cache_dir={cache}", *SMALL, *more]

  return of


@pytest.fixture(scope="module")
def run(flags, cache):
  return lambda *arguments, **named: jobs.run("train.py", cache, *flags(*arguments, **named))


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  result = run(workdir, "--meta_steps=12")
  assert result.returncode == 0, result.stderr
  return workdir, result


def test_a_run_leaves_its_rater_metrics_scores_and_figures(finished):
  workdir, result = finished
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, 13))
  assert np.shape(rows[0]["inner_loss"]) == (2, 2) and np.shape(rows[0]["outer_loss"]) == (2,)
  assert rows[0]["effective_sample_size"] == pytest.approx([4, 4])  # uniform at the start
  compared = [row["step"] for row in rows if "score_autocorrelation" in row]
  assert compared == [4, 6, 8, 10, 12]  # a line for each call but the first
  for name in ("noise_vs_weight", "scores_by_source", "losses", "meta_gradients"):
    assert (workdir / f"{name}.png").stat().st_size > 5000
  results = json.loads((workdir / "results.json").read_text())
  scores = [json.loads(x) for x in (workdir / "validation_scores.jsonl").read_text().splitlines()]
  assert results["documents"] == len(scores) > 20
  assert "DataRater after 12 meta-steps" in result.stdout


def test_the_loaded_rater_gives_the_scores_of_the_report(finished, corpus):
  texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
  rows = map(json.loads, (finished[0] / "validation_scores.jsonl").read_text().splitlines())
  expected = {int(row["id"].removeprefix("mine:")): row["score"] for row in rows}
  scores = rating.load_rater(finished[0])(texts[i] for i in expected)
  assert len(set(scores.tolist())) > 20  # it did learn to tell them apart
  np.testing.assert_allclose(scores, list(expected.values()), rtol=1e-5)


def test_ages_show_that_resets_are_staggered(finished):
  rows = [json.loads(x) for x in (finished[0] / "metrics.jsonl").read_text().splitlines()]
  ages = np.array([row["age"] for row in rows])  # lifetime 6, T 2: member 1 starts half-way
  assert ages[:6].tolist() == [[2, 2], [4, 4], [6, 2], [2, 4], [4, 6], [6, 2]]


def test_starting_a_finished_run_again_changes_nothing(finished, run):
  workdir, _ = finished
  before = {p: p.read_bytes() for p in workdir.glob("*.json*")}
  result = run(workdir, "--meta_steps=12")
  assert result.returncode == 0, result.stderr
  assert "resuming after meta-step 12 of 12" in result.stdout
  assert {p: p.read_bytes() for p in before} == before


def test_a_resumed_run_is_the_same_program(finished, flags, cache, tmp_path):
  """Whether its arguments are fresh or from a checkpoint: else it would be compiled again."""
  workdir, _ = finished
  compiled = lambda: {p.name for p in cache.glob("compiled/jit_meta_steps-*-cache")}
  before = compiled()
  shutil.copytree(workdir, tmp_path / "w")
  shutil.rmtree(tmp_path / "w" / "checkpoints" / "12")
  said = jobs.succeed("train.py", cache, *flags(tmp_path / "w", "--meta_steps=12"))
  assert "resuming after meta-step 8 of 12" in said
  assert before and compiled() == before
  same_run(workdir, tmp_path / "w")


def test_sigterm_checkpoints_exits_0_and_the_rest_equals_an_uninterrupted_run(
  finished, run, flags, cache, tmp_path
):
  process = jobs.start("train.py", cache, *flags(tmp_path / "w", "--meta_steps=12"))
  metrics = tmp_path / "w" / "metrics.jsonl"
  wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  if "stopped: checkpoint written" in output:  # else it was already at its end
    assert run(tmp_path / "w", "--meta_steps=12").returncode == 0
  same_run(finished[0], tmp_path / "w")


@pytest.mark.slow
def test_killed_at_random_moments_five_times_the_rater_is_bitwise_the_same(
  run, flags, cache, tmp_path
):
  assert run(tmp_path / "whole", "--meta_steps=240").returncode == 0
  rng, metrics = random.Random(0), tmp_path / "killed" / "metrics.jsonl"
  killed = flags(tmp_path / "killed", "--meta_steps=240")
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

  def lines():
    return metrics.read_text().count("\n") if metrics.exists() else 0

  for kill in range(5):
    process = jobs.start("train.py", cache, *killed, **quiet)
    if kill % 2:  # anywhere, most likely while it starts
      time.sleep(rng.uniform(1, 8))
    else:  # in the middle of training or of a checkpoint
      before = lines()
      wait_until(lambda before=before: lines() > max(before, 4), process)
      time.sleep(rng.uniform(0, 0.5))
    assert process.poll() is None, "it finished before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
  result = run(tmp_path / "killed", "--meta_steps=240")
  assert result.returncode == 0 and "resuming after meta-step" in result.stdout, result.stderr
  same_run(tmp_path / "whole", tmp_path / "killed")


def same_run(a, b):
  for name in ("metrics.jsonl", "validation_scores.jsonl", "results.json"):
    assert (a / name).read_bytes() == (b / name).read_bytes(), name
  assert_trees_all_equal(final_state(a), final_state(b))  # eta, meta-Adam, all inner models


def final_state(workdir):
  manager = Checkpoints(workdir).manager
  return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


@pytest.mark.parametrize(
  "wrong, message",
  [
    (["--meta_steps=0"], "--meta_steps=0 must be at least 1"),
    (["--meta_steps=13"], "must be a multiple of --steps_per_call=2"),
    (["--members_per_step=3"], "must be at most --n_models=2"),
    (["--lifetime=1"], "shorter than one window of --inner_steps=2"),
    (["--mode=sideways"], "choose one of mixed"),
    (["--seed=-1"], "--seed=-1 must be at least 0"),
    (["--model=huge"], "choose one of nano"),
    (["--loss_backend=cuda"], "choose one of reference"),
    (["--mode=reverse", "--attention_backend=pallas_gpu"], "use --attention_backend=xla"),
    (["--attention_backend=cuda"], "choose one of xla, pallas_tpu, pallas_gpu"),
    (["--tokenizer=missing.json"], "missing.json"),
    (["--text_field=body"], "text"),
    (["--outer_batch=4000"], "sequences"),
    (["--outer_fraction=0.9", "--validation_fraction=0.2"], "fraction"),
    (["stray"], "unexpected argument"),
  ],
)
def test_contradictory_flags_end_in_one_line_that_says_what_to_do(wrong, message, run, tmp_path):
  assert_one_line_error(run(tmp_path / "w", *wrong), message)


def test_missing_data_and_no_workdir_are_one_line(run, cache, tmp_path):
  absent = tmp_path / "absent.jsonl"
  assert_one_line_error(run(tmp_path / "w", data=absent), "absent.jsonl")
  assert_one_line_error(jobs.run("train.py", cache), "--workdir")


def test_a_workdir_of_another_configuration_is_refused_untouched(finished, run):
  workdir, _ = finished
  before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
  assert_one_line_error(run(workdir, "--meta_steps=12", "--seed=1"), "seed was 0, is 1")
  assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*")) == before


def test_a_workdir_of_an_earlier_version_is_refused(finished, run, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "earlier")
  saved = json.loads((workdir / "config.json").read_text())
  del saved["format"]
  (workdir / "config.json").write_text(json.dumps(saved))
  assert_one_line_error(run(workdir, "--meta_steps=12"), "holds a run of an earlier version")
  with pytest.raises(cli.UserError, match="holds a rater of an earlier version.*train it again"):
    rating.open_rater(workdir)


def test_a_text_that_is_not_in_a_list_is_refused(finished):
  with pytest.raises(TypeError, match="list of texts"):
    rating.load_rater(finished[0])("one text")


def test_a_folder_with_other_things_is_refused(run, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  assert_one_line_error(run(tmp_path), "neither empty nor a run")


def test_a_truncated_checkpoint_is_named_with_the_way_out(finished, run, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(finished[0], broken)
  last = broken / "checkpoints" / "12"
  for path in last.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert_one_line_error(run(broken, "--meta_steps=12"), "delete that folder")
  shutil.rmtree(last)
  assert run(broken, "--meta_steps=12").returncode == 0
  same_run(finished[0], broken)


def test_a_rater_trained_with_kernels_is_opened_without_them(small_rater, tmp_path):
  """On a machine that would run them in an interpreter."""
  workdir = shutil.copytree(small_rater, tmp_path / "rater")
  saved = json.loads((workdir / "config.json").read_text())
  saved["config"]["attention_backend"] = "pallas_gpu"
  (workdir / "config.json").write_text(json.dumps(saved))
  rater, texts = rating.open_rater(workdir), ["the rater scores each text " * 5]
  assert rater.config.attention_backend == "xla"
  assert rater.fingerprint == rating.open_rater(small_rater).fingerprint
  np.testing.assert_array_equal(
    rating.load_rater(workdir)(texts), rating.load_rater(small_rater)(texts)
  )
