"""The report of a training run: rankings, fits and what its figures show, on hand-made runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tqdm
from matplotlib.text import Text

import train
from analysis import training_report
from runtime.workdir import Metrics

OKABE_ITO = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()


@pytest.fixture
def write(tmp_path, monkeypatch):
  """(scores by meta-step, noise, source, rows of metrics.jsonl) -> summary, results, figures."""

  def run(scores, noise, source, metrics=()):
    (tmp_path / "scores").mkdir(exist_ok=True)
    for step, values in scores.items():
      np.save(tmp_path / "scores" / f"{step}.npy", np.asarray(values, np.float32))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    documents = [
      SimpleNamespace(id=f"d{i}", noise=float(n), source=s)
      for i, (n, s) in enumerate(zip(noise, source, strict=True))
    ]
    figures = {}

    def keep(path, figure):
      figure.draw_without_rendering()
      figures[path.name] = figure

    monkeypatch.setattr(training_report, "save_figure", keep)
    summary = training_report.write(tmp_path, documents, {"steps_per_call": 2})
    assert (tmp_path / "summary.txt").read_text() == summary + "\n"
    return summary, json.loads((tmp_path / "results.json").read_text()), figures

  yield run
  training_report.plt.close("all")


def metrics(ages, correlations=None):
  """Rows of two inner models, whose losses are known functions of step and member."""
  rows = []
  for step, age in enumerate(ages, 1):
    rows.append({"step": step, "member": [0, 1], "age": age, "skipped": [False, step == 1]})
    rows[-1] |= {"outer_loss": [step, step + 0.5], "inner_loss": [[4, 5], [6, 7]]}
    rows[-1] |= {"meta_gradient_norm": [0.1, 0.2], "meta_update_norm": [0.01, 0.02]}
    if step in (correlations or {}):
      rows[-1]["score_autocorrelation"] = correlations[step]
  return rows


# "often" scores highest where it is clean, and is corrupted most of the time; "never" is middling
# and clean; "always" has no clean document.
SOURCE = np.repeat(["often", "never", "always"], [20, 10, 10])
NOISE = np.array([0.0] * 4 + [0.5, 0.8] * 8 + [0.0] * 10 + [0.2, 0.4] * 5)
SCORE = np.array([2.0, 4, 3, 3] + [-5.0, -7] * 8 + [1.0] * 10 + [4.0, 6] * 5)


def test_sources_are_ranked_by_their_clean_documents(write):
  pooled = {name: SCORE[SOURCE == name].mean() for name in set(SOURCE)}
  assert pooled["always"] > pooled["never"] > pooled["often"]  # the opposite order
  ranked = training_report.rank_sources(SCORE, NOISE, SOURCE)
  assert [s.name for s in ranked] == ["often", "never", "always"]
  summary, results, figures = write({0: SCORE}, NOISE, SOURCE)
  assert results["score_by_source"] == {"often": 3, "never": 1, "always": 5}
  assert list(results["score_by_source"]) == ["often", "never", "always"]
  lines = summary.split("best first by the mean score of their clean documents:\n")[1].splitlines()
  assert [line.split()[:2] for line in lines[:3]] == [
    ["often", "+3.000"],
    ["never", "+1.000"],
    ["always", "+5.000"],
  ]
  assert "4; 16 corrupted: -6.000)" in lines[0] and "10)" in lines[1]
  assert "10, all corrupted)" in lines[2]
  (axis,) = figures["scores_by_source.png"].axes
  assert [t.get_text() for t in axis.get_yticklabels()] == ["always", "never", "often"]  # upwards
  assert "mean score of their clean documents" in axis.get_title(loc="left")


@pytest.mark.parametrize(
  "noise, words",
  [
    ([np.nan] * 3, "their documents:"),
    ([0, 0, 0], "their documents:"),
    ([0, np.nan, 0.5], "their documents not known to be corrupted:"),
  ],
)
def test_the_summary_names_the_documents_of_the_ranking(noise, words, write):
  summary, results, _ = write({0: [1.0, 2, 9]}, noise, ["a", "a", "b"])
  assert f"best first by the mean score of {words}" in summary
  assert list(results["score_by_source"]) == (["a", "b"] if 0.5 in noise else ["b", "a"])


def test_boxes_stand_on_their_labels(write):
  axis = write({0: SCORE}, NOISE, SOURCE)[2]["scores_by_source.png"].axes[0]
  centers = sorted(np.mean(patch.get_path().get_extents().intervaly) for patch in axis.patches)
  labels = dict(zip((t.get_text() for t in axis.get_yticklabels()), axis.get_yticks(), strict=True))
  assert labels == {"always": 0, "never": 1, "often": 2}
  assert centers[:2] == pytest.approx([0, 1])  # one kind of documents
  assert np.mean(centers[2:]) == pytest.approx(2) and centers[3] - centers[2] > 0.25
  low, high = axis.get_ylim()
  assert -1 < low < -0.2 and 2.4 < high < 3


def test_many_sources_fold_and_the_figure_says_how_many_are_missing(write):
  source = np.array([f"source {i:02d} with a long name" for i in range(60)])
  summary, _, figures = write({0: np.arange(60.0)}, np.full(60, np.nan), source)
  (axis,) = figures["scores_by_source.png"].axes
  shown = [t.get_text() for t in axis.get_yticklabels()]
  assert shown == [*source[:20], *source[40:]]
  assert len(axis.patches) == 40
  assert "20 of 60 sources" in axis.get_title(loc="left")
  assert all(name in summary for name in source)
  (gap,) = [x for x in axis.get_lines() if x.get_linestyle() == ":"]
  assert gap.get_ydata()[0] == 19.5


def test_noise_table_on_scores_with_known_answer():
  noise = np.tile([0.0, 0.0, 0.2, 0.4, 0.6, 0.8], 10)
  source = np.repeat(["a", "b"], 30)
  table = training_report.noise_table(-noise, noise, source)
  assert table["spearman"] == pytest.approx({"a": -1, "b": -1})
  assert table["auroc"] == pytest.approx({"a": 1, "b": 1})
  upside_down = training_report.noise_table(noise, noise, source)
  assert upside_down["spearman_mean"] == pytest.approx(1) and upside_down["auroc_mean"] == 0
  assert training_report.noise_table(-noise[:6], noise[:6], source[:6])["too_few_documents"] == [
    "a"
  ]


def test_weight_fit_finds_the_r2_of_an_exact_and_of_an_independent_relation():
  rng = np.random.default_rng(0)
  noise = rng.uniform(0.1, 0.8, 128)
  assert training_report.weight_fit(np.log(1 - noise), noise)["r2"] == pytest.approx(1)
  assert training_report.weight_fit(rng.normal(size=128), noise)["r2"] < 0.1


def test_panels_state_both_correlations_and_no_line_runs_below_zero(write):
  rng = np.random.default_rng(0)
  noise = np.tile([0, 0.1, 0.3, 0.6, 0.9], 40)
  steep = -12 * noise + rng.normal(0, 0.1, 200)
  figure = write({0: np.zeros(200), 30: steep}, noise, ["a"] * 200)[2]["noise_vs_weight.png"]
  fit = training_report.weight_fit(steep, noise)
  assert fit["intercept"] + fit["slope"] * 0.9 < 0  # it would, without the cut
  titles = [axis.get_title() for axis in figure.axes]
  assert titles[0].endswith("R² 0.000, Spearman undefined")
  assert titles[1].endswith(f"R² {fit['r2']:.3f}, Spearman {fit['spearman']:+.3f}")
  assert fit["spearman"] < -0.9 and fit["r2"] < 0.8  # what R^2 alone would hide
  for axis in figure.axes:
    (line,) = axis.get_lines()
    assert np.min(line.get_ydata()) >= 0
  x, y = training_report.fitted_line(fit)
  assert y[1] == 0 and x[1] == pytest.approx(-fit["intercept"] / fit["slope"]) and x[1] < 0.9
  np.testing.assert_allclose((y[0], x[0]), (fit["intercept"] + fit["slope"] * 0.1, 0.1))


def test_the_report_states_spearman_at_each_snapshot(write):
  noise = np.tile([0.1, 0.3, 0.6, 0.9], 10)
  summary, results, _ = write({0: np.zeros(40), 30: -noise}, noise, ["a"] * 40)
  assert results["weight_fit_spearman"] == {"0": None, "30": pytest.approx(-1)}
  assert "Spearman of weight and noise level at meta-step 0: undefined, 30: -1.000" in summary


# Member 0 is re-initialized after steps 2 and 4, member 1 after steps 1, 3 and 4 (it lasts for one
# step in the end).
AGES = [[2, 2], [4, 2], [2, 4], [4, 2], [2, 2]]


def test_reinitializations_are_found_and_marked_on_each_inner_models_curve(write):
  rows = metrics(AGES)
  marks = {member: new.tolist() for member, new in training_report.restarts(rows).items()}
  assert marks == {0: [False, False, True, False, True], 1: [False, True, False, True, True]}
  figure = write({0: [1.0]}, [np.nan], ["a"], rows)[2]["losses.png"]
  lines = figure.axes[0].get_lines()
  marked = [line.get_xydata().tolist() for line in lines if line.get_marker() == "v"]
  assert marked == [[[3, 3], [5, 5]], [[2, 2.5], [4, 4.5], [5, 5.5]]]
  curves = [line.get_ydata().tolist() for line in lines if line.get_marker() == "None"]
  steps = np.arange(1, 6)
  assert curves == [(steps + x).tolist() for x in (0, 0.5)] + [[5.5] * 5, (steps + 0.25).tolist()]
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert "first loss after re-initialization" in labels
  assert figure.axes[0].get_ylabel() == "nats per token"


def test_members_that_are_drawn_now_and_then_keep_their_own_steps():
  rows = metrics([[2, 2], [4, 4], [2, 2]])
  for name in ("member", "age", "outer_loss"):
    rows[1][name] = rows[1][name][1:]
  steps, losses = training_report.by_member(rows, "outer_loss")[0]
  assert steps.tolist() == [1, 3] and losses.tolist() == [1, 3]
  assert training_report.restarts(rows)[0].tolist() == [False, True]


def test_more_inner_models_than_lines_are_counted_in_the_legends(write):
  rows = metrics([[2, 2], [4, 4]])
  for row in rows:
    row |= {name: values * 6 for name, values in row.items() if name != "step"}
    row["member"] = list(range(12))
  figures = write({0: [1.0]}, [np.nan], ["a"], rows)[2]
  texts = [t.get_text() for t in figures["losses.png"].legends[0].get_texts()]
  assert "outer loss of 10 of 12 inner models" in texts
  assert "the first 10 of 12" in figures["meta_gradients.png"].legends[0].get_title().get_text()


def test_without_earlier_scores_there_is_no_autocorrelation(write):
  summary, results, figures = write({0: [1.0]}, [np.nan], ["a"], metrics(AGES[:2]))
  assert "score_autocorrelation" not in results and "no earlier scores" in summary
  assert len(figures["meta_gradients.png"].axes[2].get_lines()) == 0
  known = metrics(AGES[:4], {4: 0.75})
  summary, results, figures = write({0: [1.0]}, [np.nan], ["a"], known)
  assert results["score_autocorrelation"] == 0.75
  assert "correlate 0.750 with the scores 2 meta-steps earlier" in summary
  (line,) = figures["meta_gradients.png"].axes[2].get_lines()
  assert line.get_xydata().tolist() == [[4, 0.75]]


def test_metrics_leave_out_the_correlation_with_scores_that_were_all_equal(tmp_path):
  file = Metrics(tmp_path / "metrics.jsonl", 0)
  for last_step, std, correlation in ((2, [[0, 0], [0.1, 0.1]], 0.0), (4, [[0, 0.1], [1, 1]], 0.5)):
    call = {"outer_loss": np.ones((2, 2)), "score_std": np.array(std), "skipped": np.zeros((2, 2))}
    call |= {"effective_sample_size": np.ones((2, 2)), "score_autocorrelation": correlation}
    train.write_metrics(file, last_step, call, tqdm.tqdm(disable=True))
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert [row.get("score_autocorrelation") for row in rows] == [None, None, None, 0.5]


def test_names_are_no_math_and_legends_cover_no_data(write):
  source = ["$x^2_$", r"a $\frac$ b", "y" * 300, "two\nlines"] * 30
  noise = np.tile([0, 0.2, 0.4, 0.8, 0.8], 24)
  rng = np.random.default_rng(0)
  scores = {step: rng.normal(size=120) for step in (0, 10)}
  figures = write(scores, noise, source, metrics(AGES, {2: 0.5}))[2]
  assert len(figures) == 4
  for name, figure in figures.items():
    assert not any(text.get_parse_math() for text in figure.findobj(Text)), name
    assert_legends_cover_no_data(figure)
  labels = [t.get_text() for t in figures["scores_by_source.png"].axes[0].get_yticklabels()]
  assert {"$x^2_$", r"a $\frac$ b", "two lines"} < set(labels) and max(map(len, labels)) <= 40
  gradients = figures["meta_gradients.png"].axes[0]
  ticks = [t.get_text() for t in (*gradients.get_yticklabels(), *gradients.get_yticklabels(True))]
  assert "1e\u221201" in ticks and not any("$" in text for text in ticks)


def assert_legends_cover_no_data(figure):
  boxes = [axis.get_window_extent() for axis in figure.axes]
  assert not any(axis.get_legend() for axis in figure.axes)
  for legend in figure.legends:
    extent = legend.get_window_extent()
    assert not any(extent.overlaps(box) for box in boxes)


def test_box_colors_are_told_apart_by_color_blind_readers():
  assert {training_report.BLUE, training_report.RED} < set(OKABE_ITO)
