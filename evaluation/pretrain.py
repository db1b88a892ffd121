"""Trains one language model from scratch: Adam with cosine decay, a learning curve, resume.

The paper's evaluation protocol gives the optimizer, the peak learning rates, steps and batches
(RECIPES, from 50m on); warm-up, final rate and clipping are ours (BUILD_NOTES.md).
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import transformer
from rating import Score, batch_rows, score_sequences
from runtime import hosts, sharding
from runtime.cli import check
from runtime.workdir import Checkpoints, Metrics, StopSignal


class Recipe(NamedTuple):
  """The training settings of a model size."""

  learning_rate: float  # peak
  batch: int  # N, sequences
  steps: int | None  # None: Chinchilla's 20 tokens per parameter
  evaluations: int = 20  # points of the curve; they divide the steps

  def scaled(self, parameters: int, sequence_length: int, **overrides) -> "Recipe":
    """With the overrides that are not None, and steps a multiple of the evaluations."""
    recipe = self._replace(**{name: v for name, v in overrides.items() if v is not None})
    steps = recipe.steps or math.ceil(20 * parameters / (recipe.batch * sequence_length))
    return recipe._replace(steps=math.ceil(steps / recipe.evaluations) * recipe.evaluations)

  @property
  def steps_per_call(self) -> int:
    """Steps of one compiled call: at most 50, a divisor of the steps between evaluations."""
    grain = self.steps // self.evaluations
    return max(n for n in range(1, min(grain, 50) + 1) if grain % n == 0)


RECIPES = {  # the paper's from 50m on
  "nano": Recipe(3e-3, 16, None),
  "tiny": Recipe(3e-3, 16, None),
  "mini": Recipe(3e-3, 16, None),
  "small": Recipe(2e-3, 16, None),
  "50m": Recipe(1e-3, 128, 5_000),
  "150m": Recipe(1e-3, 128, 12_000),
  "400m": Recipe(1e-3, 128, 30_000),
  "1b": Recipe(2e-4, 256, 48_000),
}


class LMState(NamedTuple):
  params: Any
  opt_state: Any
  step: jax.Array


def pretrain(
  folder: Path,
  model: transformer.LanguageModel,
  recipe: Recipe,
  seed: int,
  batches_from: Callable[[int], Iterator[transformer.Batch]],
  measure: Callable[[Any], dict],
  progress: bool = True,
) -> None:
  """Trains to recipe.steps, from the folder's last checkpoint if it has one.

  Writes curve.jsonl (a line per evaluation: step, train, and the result of `measure(params)`),
  checkpoints/ and, at the end, `done`; bit-identical to an uninterrupted run.

  Args:
    batches_from: number of a call -> the batches [steps_per_call, N, S] of that call and the next
      ones, a function of the number alone.
  """
  if hosts.as_leader((folder / "done").exists()):
    return
  folder.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(folder)
  state = checkpoints.restore_latest(init(model, recipe, seed))
  start, per_call = int(state.step), recipe.steps_per_call
  curve = Metrics(folder / "curve.jsonl" if hosts.is_leader() else None, start)
  batches = batches_from(start // per_call)
  stop, saved, losses, step = StopSignal(), time.monotonic(), [], start
  shown = dict(total=recipe.steps, unit="step", desc=folder.name, disable=not progress)
  with tqdm.tqdm(initial=start, **shown) as bar:
    for step in range(start + per_call, recipe.steps + 1, per_call):
      batch = sharding.shard(next(batches), None, "data")
      state, losses_C = train_steps(model, recipe, state, batch)
      losses.append(losses_C)
      bar.update(per_call)
      if step % (recipe.steps // recipe.evaluations):
        continue
      loss = float(np.mean(losses))
      check(np.isfinite(loss), f"{folder.name} diverged before step {step}: lower --learning_rate")
      curve.append({"step": step, "train": loss} | measure(state.params))
      losses.clear()
      bar.set_postfix_str(f"train {loss:.3f}")
      stopping = hosts.any_host(stop.requested)
      if step == recipe.steps or stopping or hosts.as_leader(time.monotonic() > saved + 60):
        checkpoints.save(step, state)
        saved = time.monotonic()
      if stopping:
        break
  checkpoints.close()
  if step < recipe.steps:
    hosts.say(f"stopped: checkpoint written after step {step}; start again to resume")
    raise SystemExit(0)
  stop.close()
  if hosts.is_leader():
    (folder / "done").touch()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_steps(model: transformer.LanguageModel, recipe: Recipe, state: LMState, batches):
  """One step per batch of [C, N, S]; (state, losses [C]). Runs of a model share the program."""
  _, N, S = batches.tokens.shape
  # On a CPU the activations of a small microbatch stay in the caches.
  parts = math.gcd(N, N // batch_rows(S) or 1) if jax.default_backend() == "cpu" else 1
  loss = transformer.accumulate(model.loss, parts)

  def step(state, batch):
    weights_B = jnp.full(recipe.batch, 1 / recipe.batch)
    gradient, nll_B = jax.grad(loss, has_aux=True)(state.params, weights_B, batch)
    updates, opt_state = adam(recipe).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return LMState(params, opt_state, state.step + 1), nll_B.mean()

  state, losses_C = jax.lax.scan(step, state, batches)
  return sharding.constrain_state(state), sharding.replicate(losses_C)


def init(model: transformer.LanguageModel, recipe: Recipe, seed: int) -> LMState:
  """Fresh parameters, a function of the seed alone."""

  def fresh(key):
    params = model.init(key)
    return sharding.constrain_state(LMState(params, adam(recipe).init(params), jnp.int32(0)))

  return jax.jit(fresh)(jax.random.PRNGKey(seed))


def trained(folder: Path, model: transformer.LanguageModel, recipe: Recipe) -> Any:
  """The parameters at the end of `pretrain`."""
  state = Checkpoints(folder).restore_latest(init(model, recipe, 0))
  done = int(state.step) == recipe.steps
  check(done, f"{folder} has no finished model any more: delete it, and it is trained again")
  return state.params


def adam(recipe: Recipe) -> optax.GradientTransformation:
  """Linear warm-up over 2% of the steps, cosine decay to a tenth; gradients clipped to norm 1."""
  peak, warmup = recipe.learning_rate, max(1, recipe.steps // 50)
  schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, recipe.steps, peak / 10)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def mean_nll(model: transformer.LanguageModel, params: Any, rows: transformer.Batch) -> float:
  """NLL in nats per token of rows [R, S], the mean over all counted tokens."""
  nll_R = score_sequences(sequence_nll(model, params), rows, np.arange(len(rows.tokens)))
  count_R = np.asarray(transformer.next_token_targets(rows)[1].sum(-1))
  return float((nll_R * count_R).sum() / max(count_R.sum(), 1))


def sequence_nll(model: transformer.LanguageModel, params: Any) -> Score:
  """Batch [B, S] -> the mean NLL of each sequence [B]."""
  return lambda batch: _sequence_nll(model, params, sharding.shard(batch, "data"))


@functools.partial(jax.jit, static_argnums=0)
def _sequence_nll(model: transformer.LanguageModel, params, batch: transformer.Batch) -> jax.Array:
  return sharding.replicate(model.loss(params, jnp.zeros(len(batch.tokens)), batch)[1])
