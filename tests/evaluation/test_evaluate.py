"""evaluate.py from the command line: comparison, resume by kill -9, plan, bad input in one line."""

import functools
import itertools
import json
import os
import signal
import time

import jobs
import matplotlib.text
import numpy as np
import pytest

import rating
import selection
from corpus.batches import drawn_rows
from corpus.documents import read_documents, split_of
from corpus.tokenizer import load_tokenizer
from evaluation import compare, plan, pretrain
from evaluation.runs import open_inputs, selected_batches
from runtime import cli
from transformer import Batch

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def flags(small_rater, cache, corpus):
  """A workdir -> the flags of a run with the small rater, an evaluation set and a benchmark."""
  questions = cache / "piqa.jsonl"
  row = {"goal": "Rate each text", "sol1": "the models learn", "sol2": "zq xv", "label": 0}
  questions.write_text("".join(json.dumps(row | {"label": i % 2}) + "\n" for i in range(4)))
  return lambda workdir, *more: [
    f"--eval_data={corpus}",
    f"--benchmarks=piqa={questions}",
    f"--workdir={workdir}",
    f"--rater={small_rater}",
    f"--cache_dir={cache}",
    "--models=nano",
    "--seeds=0,1",
    "--steps=12",
    "--batch=2",
    "--evaluations=3",
    "--eval_sequences=20",
    "--sweep_discard=0.25,0.5",
    *more,
  ]


@pytest.fixture(scope="module")
def finished(flags, cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("evaluations") / "whole"
  return workdir, jobs.succeed("evaluate.py", cache, *flags(workdir))


def test_all_policies_start_alike_and_are_compared(finished):
  workdir, output = finished
  results = json.loads((workdir / "results.json").read_text())
  policies = results["models"]["nano"]
  assert list(policies) == list(selection.POLICIES)
  assert policies["none"]["metrics"]["nll/validation"]["compute_fraction"] == pytest.approx(1)
  assert policies["none"]["overhead"] == policies["random"]["overhead"] == 0
  # rater and model have one size, but for the score head: 2 N / (1 - rho) over 6 N
  rho = policies["datarater"]["discard"]
  assert policies["datarater"]["overhead"] == pytest.approx(1 / (3 * (1 - rho)), rel=0.01)
  sweep = {k: np.mean(v) for k, v in results["sweep"]["selection"].items() if k != "0"}
  assert rho == float(min(sweep, key=sweep.get))
  finals = [p["metrics"]["nll/validation"]["mean"] for p in policies.values()]
  assert len(set(finals)) == len(finals)  # each policy trained on something else
  assert policies["none"]["metrics"]["accuracy/piqa"]["mean"] == 0.5  # one pair, both answers
  assert results["benchmarks"] == {"piqa": {"questions": 4, "chance": 0.5}}
  assert "nll/mine.jsonl" in policies["none"]["metrics"]
  assert (workdir / "table.md").read_text().strip() in output
  for name in ("learning_curves", "compute", "discard"):
    assert (workdir / f"{name}.png").stat().st_size > 5000


def test_the_sequences_of_a_policy_are_those_with_the_best_scores_of_each_pool(
  finished, small_rater, cache
):
  workdir, _ = finished
  config = config_of(workdir)
  corpus = open_inputs(config, cache).corpus
  scores = np.load(workdir / "scores" / "datarater.npy")
  run = plan.Run("nano", "datarater", 0.5, 1)
  recipe = plan.costs(config).recipes["nano"]
  kept = next(selected_batches(run, recipe, workdir, corpus, 1))  # the second call
  split = corpus.splits["train"]
  trained = rating.open_rater(small_rater)
  for i in range(recipe.steps_per_call):
    step = recipe.steps_per_call + i
    pool = drawn_rows(len(split.tokens), 1, step * 4, 4)
    batch = Batch(*(x[pool].astype(np.int32) for x in (split.tokens, split.segments)))
    online = np.asarray(trained.score(batch))  # scored when drawn, as in the paper
    np.testing.assert_allclose(scores[pool], online, rtol=1e-4, atol=1e-6)
    best = sorted(pool[np.argsort(-online, kind="stable")[:2]].tolist())
    rows = [r.tolist() for r in kept.tokens[i]]
    assert sorted(rows) == sorted(split.tokens[r].tolist() for r in best)


def test_what_is_reported_is_disjoint_from_what_anything_learned_from_or_was_chosen_by(
  finished, cache
):
  config = config_of(finished[0])
  settings = plan.rater_settings(config)
  texts = {"train": "", "outer": "", "selection": "", "validation": ""}
  for document in read_documents(settings):
    split, bits = split_of(document.text, settings)
    half = "selection" if split == "validation" and not bits & 1 else split
    texts[half] += document.text + "\n"
  tokenizer = load_tokenizer("bytes")
  for name in ("selection", "validation"):
    tokens, segments = open_inputs(config, cache).eval_sets[name]
    pieces = [tokenizer.decode(t[s > 0]) for t, s in zip(tokens, segments, strict=True)]
    long = [piece for piece in pieces if len(piece) > 28]
    assert len(long) > 10
    assert all(piece in texts[name] for piece in long)
    others = "".join(text for other, text in texts.items() if other != name)
    assert not any(piece in others for piece in long)


def config_of(workdir):
  saved = json.loads((workdir / "config.json").read_text())["config"]
  return cli.from_values(plan.Config, saved)


def test_killed_twice_it_resumes_to_the_same_curves(finished, flags, cache, tmp_path):
  workdir = tmp_path / "killed"
  for done in (2, 9):
    process = jobs.start("evaluate.py", cache, *flags(workdir, "--jobs=2"))
    jobs.wait_until(lambda n=done: len(list(workdir.glob("runs/*/done"))) >= n, process)
    assert process.poll() is None, process.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
  time.sleep(1)  # its workers end with it
  before = {p: p.stat().st_mtime_ns for p in workdir.glob("runs/*/done")}
  jobs.succeed("evaluate.py", cache, *flags(workdir))
  assert before.items() <= {p: p.stat().st_mtime_ns for p in workdir.glob("runs/*/done")}.items()
  a, b = (json.loads((w / "results.json").read_text()) for w in (finished[0], workdir))
  assert a["models"].keys() == b["models"].keys()
  for name, curve in a["curves"].items():  # one core or two: the same up to rounding
    nll = [[row["nll"]["validation"] for row in c] for c in (curve, b["curves"][name])]
    np.testing.assert_allclose(*nll, rtol=1e-4)


def test_dry_run_prints_the_plan_with_its_flops(flags, cache, small_rater):
  output = jobs.succeed("evaluate.py", cache, *flags("unused", "--dry_run"))
  config = plan.Config(rater=str(small_rater), models=("nano",), steps=12, batch=2, evaluations=3)
  parameters = plan.costs(config).parameters["nano"]
  assert f"rater: {parameters + 32:,} parameters" in output  # 32: its head
  flops = 6 * parameters * 12 * 2 * 32
  assert f"{flops / 1e12:.4g}" in output  # none and random
  rating = 2 * (parameters + 32) / 0.5 / (6 * parameters)
  assert f"{flops * (1 + rating) / 1e12:.4g}" in output  # datarater at 0.5
  assert "nano 768 " in output


@pytest.mark.parametrize(
  "wrong, message",
  [
    (["--rater=absent"], "absent holds no run"),
    (["--policies=none,best"], "choose one of none, random"),
    (["--policies=random"], "lacks none"),
    (["--models=huge"], "choose one of nano"),
    (["--discard=1"], "--discard=1.0 must be below 1"),
    (["--sweep_discard=0.5,x"], "is not a list of numbers"),
    (["--eval_data=absent.jsonl"], "absent.jsonl does not exist"),
    (["--eval_data=c4/validation"], "two sets have one name, or that of a validation set"),
    (["--seeds=-1"], "--seeds=-1 must be at least 0"),
    (["--benchmarks=piqa=absent.jsonl"], "absent.jsonl"),
    (["--benchmarks=chess=absent.jsonl"], "unknown task 'chess'"),
    (["--learning_rate=1e30", "--policies=none", "--sweep_discard="], "diverged before step"),
    (["--jobs=0"], "--jobs=0"),
  ],
)
def test_bad_flags_end_in_one_line(wrong, message, flags, cache, tmp_path):
  result = jobs.run("evaluate.py", cache, *flags(tmp_path / "w"), *wrong)
  jobs.assert_one_line_error(result, message)


def test_the_comparison_of_hand_made_curves(tmp_path):
  recipe = pretrain.Recipe(1e-3, batch=2, steps=40, evaluations=4)
  costs = plan.Costs({"tiny": 600}, 60, "tiny", {"tiny": recipe}, 16)
  curves = {
    ("none", 0.0, 0): [5, 4, 3, 2],
    ("none", 0.0, 1): [5, 4, 3, 2.2],
    ("datarater", 0.5, 0): [4, 2, 1.5, 1],
    ("datarater", 0.5, 1): [4, 2.2, 1.5, 1.2],
    ("random", 0.5, 0): [5, 4, 3, 2.1],
    ("random", 0.5, 1): [5, 4, 3, 2.3],
  }
  runs = []
  for (policy, rho, seed), values in curves.items():
    run = plan.Run("tiny", policy, rho, seed)
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    rows = [
      {"step": 10 * (i + 1), "nll": {"validation": v, "selection": v + 0.5}, "accuracy": {"x": -v}}
      for i, v in enumerate(values)
    ]
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.append(run)
  sweep = [run for run in runs if run.policy != "random"]
  table = compare.write(tmp_path, runs, sweep, costs, {"x": {"questions": 1500, "chance": 0.25}})
  assert "Accuracy on x: 1,500 questions, chance 0.250." in table and "nats per token" in table
  results = json.loads((tmp_path / "results.json").read_text())["models"]["tiny"]
  metric = results["datarater"]["metrics"]["nll/validation"]
  assert metric["mean"] == pytest.approx(1.1) and metric["sd"] == pytest.approx(0.2 / np.sqrt(2))
  overhead = 2 * 60 / 0.5 / (6 * 600)
  assert metric["compute_fraction_by_seed"] == pytest.approx([0.5 * (1 + overhead)] * 2)
  accuracy = results["datarater"]["metrics"]["accuracy/x"]["compute_fraction_by_seed"]
  assert accuracy == pytest.approx([0.5 * (1 + overhead)] * 2)  # higher is better there
  assert results["random"]["metrics"]["nll/validation"]["compute_fraction"] is None
  assert "| random | 0.5 |" in table and "never (by seed never, never)" in table
  assert compare.best_discard(tmp_path, sweep) == 0.5
  tokens = 40 * 2 * 16
  assert costs.flops("tiny", "none", 0) == 6 * 600 * tokens
  assert costs.flops("tiny", "pplx_top", 0.75) == 6 * 600 * tokens * (1 + 2 / 0.25 / 6)


@pytest.fixture
def draw(monkeypatch):
  """(folder, models, policies, evaluation sets, tasks) -> figures of compare.write, by name.

  Each policy ends lower than the one before, but `random` never reaches `none`.
  """
  yield functools.partial(_draw, monkeypatch)
  compare.plt.close("all")


def _draw(monkeypatch, folder, models, policies, sets=(), tasks=()):
  runs, figures = [], {}
  order = [p for p in policies if p != "random"]
  for model, policy, seed in itertools.product(models, policies, (0, 1)):
    run = plan.Run(model, policy, 0.0 if policy == "none" else 0.5, seed)
    (folder / "runs" / run.name).mkdir(parents=True)
    end = 2.5 if policy == "random" else 2 - 0.1 * order.index(policy)
    rows = [
      {
        "step": 10 * k,
        "nll": dict.fromkeys(("validation", "selection", *sets), end + 1 / k + seed / 100),
        "accuracy": dict.fromkeys(tasks, 0.4 + 0.01 * k),
      }
      for k in range(1, 11)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "runs" / run.name / "curve.jsonl").write_text(text)
    runs.append(run)
  recipe = pretrain.Recipe(1e-3, batch=2, steps=100, evaluations=10)
  costs = plan.Costs(dict.fromkeys(models, 600), 60, models[0], dict.fromkeys(models, recipe), 16)
  benchmarks = {task: {"questions": 1500, "chance": 0.25} for task in tasks}

  def keep(path, figure):
    figure.draw_without_rendering()
    figures[path.stem] = figure

  monkeypatch.setattr(compare, "save_figure", keep)
  sweep = [run for run in runs if run.policy in ("none", "datarater")]
  compare.write(folder, runs, sweep, costs, benchmarks)
  return figures


def test_policies_differ_by_dash_and_marker_and_by_color_blind_safe_colors():
  okabe_ito = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
  assert list(compare.STYLES) == list(selection.POLICIES)
  for key in ("color", "linestyle", "marker"):
    assert len({str(style[key]) for style in compare.STYLES.values()}) == len(selection.POLICIES)
  assert all(style["color"] in okabe_ito for style in compare.STYLES.values())


@pytest.mark.parametrize("policies", [("none",), ("none", "datarater"), selection.POLICIES])
def test_figures_show_each_policy_and_legends_cover_no_data(policies, draw, tmp_path):
  name = "a $very$ long_name of an evaluation set.jsonl"
  figures = draw(tmp_path, ["tiny"], policies, [name], ["piqa"])
  assert set(figures) == ({"learning_curves", "compute", "discard"})
  for figure in figures.values():
    (legend,) = figure.legends
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
    assert not any(axis.get_legend() for axis in figure.axes)
    assert not any(text.get_parse_math() for text in figure.findobj(matplotlib.text.Text))
  for axis in figures["learning_curves"].axes:
    lines = {line.get_label(): line for line in axis.get_lines()}
    for policy in policies:
      assert lines[policy].get_marker() == compare.STYLES[policy]["marker"]
      assert lines[policy].get_color() == compare.STYLES[policy]["color"]
    assert lines["none, at the end"].get_ydata()[0] == lines["none"].get_ydata()[-1]
  titles = [axis.get_title() for axis in figures["learning_curves"].axes]
  assert titles == [
    "tiny: validation",
    "tiny: a $very$ long_n\u2026et.jsonl",
    "tiny: piqa, 1,500 questions",
  ]
  labels = [axis.get_ylabel() for axis in figures["learning_curves"].axes]
  assert labels == ["nats per token", "nats per token", "accuracy"]


def test_accuracy_panels_show_the_level_of_chance(draw, tmp_path):
  figures = draw(tmp_path, ["tiny"], ["none", "random"], tasks=["piqa"])
  nll, accuracy = figures["learning_curves"].axes
  dotted = [line for line in accuracy.get_lines() if line.get_linestyle() == ":"]
  assert [line.get_ydata()[0] for line in dotted] == [0.25]
  assert accuracy.get_ylim()[0] < 0.25 < accuracy.get_ylim()[1]
  assert [text.get_text() for text in accuracy.texts] == ["chance"] and not nll.texts
  extent = accuracy.texts[0].get_window_extent()
  assert extent.x0 >= accuracy.get_window_extent().x1  # covers no data


def test_many_panels_fold_and_the_figure_says_how_many_are_missing(draw, tmp_path):
  models, tasks = ["nano", "tiny", "mini"], [f"task{i}" for i in range(8)]
  figures = draw(tmp_path, models, ["none", "random"], ["a", "b", "c"], tasks)
  figure = figures["learning_curves"]  # 3 models x 12 metrics, of which 8 fit
  titles = [axis.get_title().partition(",")[0] for axis in figure.axes]
  sets = ["validation", "a", "b", "c", "task0", "task1", "task2", "task3"]
  assert titles == [f"{model}: {name}" for model in models for name in sets]
  assert len(titles) == compare.MAX_PANELS
  assert "12 more panels not shown" in figure.legends[0].get_title().get_text()
  columns = {round(axis.get_position().x0, 3) for axis in figure.axes}
  assert len(columns) == compare.COLUMNS
  few = draw(tmp_path / "few", models, ["none"])["learning_curves"]
  assert not few.legends[0].get_title().get_text()
  many = compare.panels([f"model{i}" for i in range(30)], [("nll", "validation")])
  assert len(many) == compare.MAX_PANELS


def test_the_compute_figure_has_no_height_for_a_policy_that_never_arrives(draw, tmp_path):
  models = [f"model{i}" for i in range(10)]
  axis = draw(tmp_path, models, ["none", "random", "datarater"])["compute"].axes[0]
  assert len(axis.get_xticks()) == compare.MAX_MODELS
  title = axis.figure.legends[0].get_title().get_text()
  assert "2 more models not shown" in title
  texts = [text.get_text() for text in axis.texts]
  assert texts.count("never") == 8 and all(text == "never" or text[-1] == "%" for text in texts)
  markers = {marker: [] for marker in "sD"}
  for line in axis.get_lines():
    if line.get_marker() in markers:
      markers[line.get_marker()].append(line.get_ydata()[1])
  assert np.isnan(markers["s"]).all() and 0 < min(markers["D"]) <= max(markers["D"]) < 1.5
