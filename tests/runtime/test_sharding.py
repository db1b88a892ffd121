"""Sharding and meshes, in processes that see 8 CPU devices."""

import json
import os

import jobs
import numpy as np
import pytest


@pytest.fixture
def on_devices(monkeypatch):
  """(n) -> the jobs started from then on see n CPU devices."""
  before = os.environ.get("XLA_FLAGS", "")
  return lambda n: monkeypatch.setenv(
    "XLA_FLAGS", f"{before} --xla_force_host_platform_device_count={n}"
  )


@pytest.fixture
def holds(on_devices, cache):
  """(part) -> the lines that this part of sharded_meta_step.py prints on eight CPU devices."""
  on_devices(8)
  return lambda part: jobs.succeed("tests/runtime/sharded_meta_step.py", cache, part).splitlines()


def test_meshes_and_shardings(holds):
  assert holds("layout") == ["meshes", "shardings"]


def test_meta_steps_are_the_same_on_any_mesh_and_gather_only_parameters(holds):
  assert holds("meshes") == [
    "same numbers on 1 8",
    "same numbers on 8 1",
    "same numbers on 2 4",
    "gathers at most a parameter of a member",
    "a checkpoint of 2 4 resumes on 8 1 and on one device",
  ]


def test_kernels_run_under_the_mesh(holds):
  expected = ["kernels under the mesh", "fresh members are the same on any mesh"]
  assert holds("kernels") == expected


def test_curation_on_eight_devices_is_that_of_one(on_devices, small_rater, corpus, cache, tmp_path):
  records = []
  for n in (1, 8):
    on_devices(n)
    flags = [f"--rater={small_rater}", f"--data={corpus}", "--discard=0.5"]
    said = jobs.succeed("curate.py", cache, *flags, f"--output={tmp_path / str(n)}")
    assert f"cpu x {n}," in said
    lines = (tmp_path / str(n) / "part-00000.jsonl").read_text().splitlines()
    records.append([json.loads(line) for line in lines])
  one, eight = ({k: [r[k] for r in x] for k in x[0]} for x in records)
  assert one["text"] == eight["text"]
  assert np.std(one["datarater_score"]) > 1e-3
  np.testing.assert_allclose(one["datarater_score"], eight["datarater_score"], atol=1e-5)
  assert np.mean(np.array(one["datarater_keep"]) != eight["datarater_keep"]) < 0.02


def test_evaluation_on_four_devices_is_that_of_one(on_devices, small_rater, cache, tmp_path):
  curves = []
  for n in (1, 4):
    on_devices(n)
    # Some parameters of `mini` are large enough to be sharded.
    flags = [f"--rater={small_rater}", f"--cache_dir={cache}", "--models=mini", "--seeds=0"]
    flags += ["--steps=12", "--batch=4", "--evaluations=3", "--eval_sequences=20"]
    flags += ["--policies=none,datarater,pplx_bottom", f"--workdir={tmp_path / str(n)}"]
    jobs.succeed("evaluate.py", cache, *flags)
    runs = sorted((tmp_path / str(n) / "runs").iterdir())
    curves.append({run.name: [json.loads(x) for x in (run / "curve.jsonl").open()] for run in runs})
  one, four = curves
  assert len(one) == 4 and list(one) == list(four)
  for name in one:
    for a, b in zip(one[name], four[name], strict=True):
      assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)
  losses = [run[-1]["nll"]["validation"] for run in one.values()]
  assert len({round(x, 3) for x in losses}) == 4  # the four runs differ from each other
  refused = jobs.run(
    "evaluate.py", cache, *flags[:-1], "--batch=6", f"--workdir={tmp_path / 'never'}"
  )
  jobs.assert_one_line_error(refused, "a batch of 6 sequences (mini) is not a multiple of the 4")
