"""The examples show what they say, at a size of seconds; FORKING.md's code runs."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import inner_loop
import meta_step

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"common", "digits", "texts"}
NAMES = sorted({p.stem for p in (ROOT / "examples").glob("*.py")} - SHARED)


def _run(name, tmp_path, capsys, **settings):
  """What the example's main returns; it printed one line and drew one figure."""
  example = importlib.import_module(f"examples.{name}")
  figure = tmp_path / "made" / f"{name}.png"
  result = example.main(example.Config(figure=str(figure), **settings))
  assert figure.read_bytes().startswith(b"\x89PNG")
  assert len(capsys.readouterr().out.splitlines()) == 1
  return result


def test_weights_fall_with_corruption(tmp_path, capsys, quick_compile):
  r = _run("toy_corruption", tmp_path, capsys, seed=100, seeds=1)
  assert r.shape == (1, 4)
  assert r[0, 0] ** 2 < 0.6 < 0.8 < r[0, 3] ** 2
  assert r[0, 3] < -0.8  # R^2 has no sign


def test_flipped_labels_are_found(tmp_path, capsys, quick_compile):
  settings = dict(seed=100, seeds=1, meta_steps=300)
  auroc, accuracies = _run("noisy_labels", tmp_path, capsys, **settings)
  assert auroc[0] > 0.88
  assert accuracies["rater's choice"] > accuracies["all labels"]


def test_a_rater_that_sees_the_loss_finds_flipped_labels_sooner(tmp_path, capsys, quick_compile):
  auroc = _run("online_rater", tmp_path, capsys, seed=100, seeds=1, meta_steps=100)
  assert auroc["sees the loss"][0] > 0.9 > auroc["does not"][0] + 0.2


def test_learned_rates_are_as_good_as_the_best_of_a_sweep(
  tmp_path, capsys, quick_compile, monkeypatch
):
  monkeypatch.setattr("examples.learned_optimizer_hypers.JUDGED", 6)
  settings = dict(seed=100, seeds=1, meta_steps=40)
  learned, best = _run("learned_optimizer_hypers", tmp_path, capsys, **settings)
  assert learned[0] < best[0]


def test_a_schedule_learned_over_the_whole_run_beats_one_of_short_windows(
  tmp_path, capsys, quick_compile, monkeypatch
):
  for name, value in dict(T=80, N=2, JUDGED=4, SWEEP=(0.03, 0.1)).items():
    monkeypatch.setattr(f"examples.learned_schedule.{name}", value)
  losses = _run("learned_schedule", tmp_path, capsys, seed=100, seeds=1, meta_steps=40)
  assert losses["whole run"][0] < losses["windows"][0]
  assert losses["whole run"][0] < 1.3 * losses["cosine"][0]


def test_learned_initialization_adapts_where_one_of_the_mixture_does_not(
  tmp_path, capsys, quick_compile
):
  ours, rival = _run("maml", tmp_path, capsys, seed=100, seeds=1, updates=300)
  assert ours[0] < rival[0] / 2


def test_mixture_finds_the_source_that_is_like_the_target(tmp_path, capsys, quick_compile, cache):
  rng = np.random.default_rng(0)
  alphabets = {"target": "abcd", "like": "abcd", "other": "0123456789", "far": "UVWXYZ"}
  path = tmp_path / "mine.jsonl"
  with open(path, "w") as file:
    for i in range(600):
      source, letters = list(alphabets.items())[i % 4]
      text = "".join(letters[(i + j) % len(letters)] for j in rng.integers(2, size=200).cumsum())
      print(json.dumps({"text": text, "source": source}), file=file)
  settings = dict(data=(str(path),), target="target", cache_dir=str(cache))
  settings |= dict(seeds=1, meta_steps=20, updates=60)
  (mixture,), losses = _run("learned_curriculum", tmp_path, capsys, **settings)
  assert mixture["like"] > 0.5 and set(mixture) == {"like", "other", "far"}
  assert losses["learned"][0] < losses["alike"][0]


def test_random_tokens_get_less_weight_than_true_ones_beside_them(
  tmp_path, capsys, quick_compile, cache
):
  words = "the rater scores each token of a text and the inner models learn from the rest".split()
  rng = np.random.default_rng(0)
  path = tmp_path / "clean.jsonl"
  path.write_text(
    "".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) + "\n" for _ in range(1200))
  )
  settings = dict(data=(str(path),), cache_dir=str(cache), seed=100, seeds=1, meta_steps=20)
  (auroc,) = _run("token_weights", tmp_path, capsys, **settings)
  assert auroc > 0.7


def test_examples_name_their_command_and_result():
  assert len(NAMES) > 5
  for name in NAMES:
    docstring = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m examples.{name}" in docstring
    assert re.search(r"Result, seeds? .*\d", docstring, re.S), name


def test_forking_is_code_that_runs(capsys, quick_compile):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "FORKING.md").read_text(), re.S)
  fork = {}
  for block in blocks:
    exec(compile(block, "FORKING.md", "exec"), fork)
  assert all(row.verdict == "exact" for row in fork["rows"])
  assert np.isfinite(fork["metrics"]["outer_loss"]).all()

  draw, key, algorithm, batches = (fork[x] for x in ("draw", "key", "algorithm", "batches"))
  plain = fork["state"].eta
  for name, eta in {
    "other_loss": jnp.zeros(3),
    "other_model": jnp.zeros(3),
    "other_metas": fork["other_eta"],
  }.items():
    changed = dataclasses.replace(algorithm, problem=fork[name])
    state = meta_step.init(changed, key, eta, batches[2])
    state, metrics = fork["step"](changed, state, *batches)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), state.eta, eta))
    assert np.isfinite(metrics["outer_loss"]).all() and min(moved) > 1e-3, name
    assert name == "other_metas" or np.abs(state.eta - plain).max() > 1e-6, name

  def end(log_rate):
    state = inner_loop.init(fork["learned_sgd"], {"w": jnp.ones(3)})
    loss = lambda theta, meta, batch: (fork["errors"](theta, batch).mean(), ())
    metas = {"log_rate": jnp.full(2, log_rate)}
    state, _ = inner_loop.unroll(loss, fork["learned_sgd"], state, metas, draw(key, 2, 8))
    return fork["errors"](state.params, draw(key, 8)).mean()

  assert jax.grad(end)(-1.0) < 0  # a larger rate would have been better
