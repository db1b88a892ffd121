"""A language model trained from scratch: what is measured, the schedule, resume."""

import dataclasses
import json
import os
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

import transformer
from evaluation import pretrain
from runtime import cli
from transformer import Batch

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = transformer.TransformerConfig(17, d_model=8, n_layers=1, n_heads=2, head_dim=4, d_ff=16)
RECIPE = pretrain.Recipe(1e-2, batch=4, steps=40, evaluations=4)


MODEL = transformer.language_model(CONFIG)


def batches_from(start):
  """Sequences that count upwards: easily learned."""
  call = start
  while True:
    rng = np.random.default_rng(call)
    first = rng.integers(0, 17, (RECIPE.steps_per_call, 4, 1))
    tokens = ((first + np.arange(12)) % 17).astype(np.int32)
    yield Batch(tokens, np.ones_like(tokens))
    call += 1


def test_mean_nll_weighs_every_token_the_same(x64):
  params, loss = jax.jit(MODEL.init)(jax.random.PRNGKey(0)), jax.jit(MODEL.loss)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 17, (6, 7)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[1, 4:] = 0  # a short document
  segments[5] = 0  # a row that only fills up
  segments[4] = [1, 1, 1, 2, 2, 2, 2]  # two documents
  total, count = 0.0, 0
  for t, s in zip(tokens, segments, strict=True):
    for start, stop in [(i, j) for i in range(7) for j in range(i + 2, 8)]:
      whole = (s[start:stop] == s[start]).all() and s[start] > 0
      if whole and (start == 0 or s[start - 1] != s[start]) and (stop == 7 or s[stop] != s[start]):
        document = Batch(t[None, start:stop], np.ones((1, stop - start), np.int32))
        _, mean = loss(params, jnp.ones(1), document)  # of one document alone
        total += float(mean[0]) * (stop - start - 1)
        count += stop - start - 1
  assert count == 6 + 3 + 6 + 6 + (2 + 3)
  actual = pretrain.mean_nll(MODEL, params, Batch(tokens, segments))
  np.testing.assert_allclose(actual, total / count, rtol=1e-6)


def test_microbatches_change_nothing(x64, monkeypatch):
  model = transformer.language_model(dataclasses.replace(CONFIG, dtype="float64"))
  batches = next(batches_from(0))
  parts = Batch(batches.tokens[:3], batches.segments[:3])
  init, states = fresh(model), []
  for rows in (4, 1):
    monkeypatch.setattr(pretrain, "batch_rows", lambda S, rows=rows: rows)
    steps = partial(pretrain.train_steps.__wrapped__, model, RECIPE)
    assert ("length=4" in str(jax.make_jaxpr(steps)(init, parts))) == (rows == 1)
    states.append(jax.jit(steps)(init, parts))
  assert_trees_all_close(*states, rtol=1e-9)


def fresh(model):
  wide = lambda x: x.astype("float64") if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.tree.map(wide, pretrain.init(model, RECIPE, seed=0))


def test_it_learns_and_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
  probe = next(batches_from(99))
  rows = Batch(probe.tokens[0], probe.segments[0])
  interrupt = []

  def measure(params):
    if interrupt and interrupt.pop():
      os.kill(os.getpid(), signal.SIGTERM)
    return {"nll": {"probe": pretrain.mean_nll(MODEL, params, rows)}}

  def run(folder):
    pretrain.pretrain(folder, MODEL, RECIPE, 3, batches_from, measure, progress=False)

  run(tmp_path / "whole")
  before = signal.getsignal(signal.SIGTERM)
  interrupt[:] = [True, False]  # at the second evaluation
  with pytest.raises(SystemExit):
    run(tmp_path / "cut")
  signal.signal(signal.SIGTERM, before)
  assert not (tmp_path / "cut" / "done").exists()
  assert len((tmp_path / "cut" / "curve.jsonl").read_text().splitlines()) == 2
  with open(tmp_path / "cut" / "curve.jsonl", "a") as file:
    file.write('{"step": 30, "tr')  # what a kill leaves of a line
  run(tmp_path / "cut")

  curves = [(tmp_path / name / "curve.jsonl").read_bytes() for name in ("whole", "cut")]
  assert curves[0] == curves[1]
  assert_trees_all_equal(
    *[pretrain.trained(tmp_path / name, MODEL, RECIPE) for name in ("whole", "cut")]
  )
  nll = [json.loads(line)["nll"]["probe"] for line in curves[0].splitlines()]
  for path in (tmp_path / "cut" / "checkpoints").iterdir():
    shutil.rmtree(path)
  with pytest.raises(cli.UserError, match="no finished model any more: delete it"):
    pretrain.trained(tmp_path / "cut", MODEL, RECIPE)
  assert len(nll) == 4 and nll[-1] < 0.6 * np.log(17) and nll[-1] < nll[0]


def test_recipes_fill_in_chinchilla_s_budget_and_round_up_to_the_evaluations():
  recipe = pretrain.RECIPES["tiny"].scaled(115_136, 128, evaluations=20)
  assert recipe.steps * recipe.batch * 128 == pytest.approx(20 * 115_136, rel=0.02)
  assert recipe.steps % 20 == 0
  scaled = pretrain.RECIPES["1b"].scaled(10**9, 2048, batch=None, steps=None)
  assert scaled == pretrain.RECIPES["1b"]  # the paper's
  assert pretrain.Recipe(1e-3, 1, 101, 1).steps_per_call == 1  # a prime
  assert pretrain.Recipe(1e-3, 1, 2000, 20).steps_per_call == 50


def test_the_schedule_warms_up_and_decays_to_a_tenth():
  optimizer = pretrain.adam(pretrain.Recipe(1e-2, 4, 100))
  params, rates = {"w": jnp.zeros(1)}, []
  state = optimizer.init(params)
  for _ in range(100):
    updates, state = optimizer.update({"w": jnp.ones(1) * 1e-3}, state)
    rates.append(-float(updates["w"][0]))  # Adam's update of a constant gradient is the rate
  np.testing.assert_allclose([rates[2], rates[-1]], [1e-2, 1e-3], rtol=0.02)
  assert rates[0] == 0 and np.all(np.diff(rates[2:]) <= 1e-6)
