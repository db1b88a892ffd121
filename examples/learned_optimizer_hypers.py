"""Learned hyper-parameters: a learning rate and a weight decay for each layer, by meta-gradient.

eta holds, for each layer l of a classifier of digits, the logarithms of AdamW's rate a_l and decay
d_l. All T = 100 inner updates are differentiated through; the outer loss is on held-out images:

  theta_l <- theta_l - a_l (adam(g)_l + d_l theta_l),     min over a, d of L_held_out(theta_T(a, d))

The hyper-parameters are the `meta` of `inner_loop.unroll`: an optax optimiser that takes extra
arguments is handed each step's. The rival is the best constant rate of a sweep, chosen on the same
held-out images; both then train on the training images anew and are judged on test images.

  python examples/learned_optimizer_hypers.py     # 80 s on 2 cores

Result, seeds 0 to 4: test loss 0.185 ± 0.025 with the learned rates, 0.195 ± 0.026 with the best of
seven constant ones (0.01 four times, 0.03 once): 4.8% lower; by seed 9.8% lower to 1.5% higher.
"""

import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from digits import draw, init_classifier, losses, split

import cli
import inner_loop
import meta_step
import report
from cli import option

N, T, B = 2, 100, 32  # inner models, inner updates, images of a batch
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 1e-3  # of the learned rates
DECAY = 1e-4  # of the sweep (optax's default), and where the learned one starts
JUDGED = 20  # trainings from new initialisations and batches, for each choice
CALL = 10  # meta-steps in one compiled call


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = option(0, "the first of the seeds")
  seeds: int = option(5, "runs, for the spread")
  meta_steps: int = option(100, f"updates of the hyper-parameters, a multiple of {CALL}")
  figure: str = option("runs/learned_optimizer_hypers.png", "file of the figure")


LAYERS = sorted(jax.eval_shape(init_classifier, jax.random.key(0)))


def loss(theta, meta, images):
  return losses(theta, images).mean(), None


def hypers(rate, decay=DECAY):
  return {layer: {"rate": jnp.log(rate), "decay": jnp.log(decay)} for layer in LAYERS}


def adamw_of_meta():
  """AdamW whose rate and decay are the step's `meta`."""
  adam = optax.scale_by_adam(b2=0.99, eps=0.0, eps_root=1e-12)

  def update(grads, state, theta, *, meta):
    directions, state = adam.update(grads, state)

    def of_layer(layer):
      rate, decay = jnp.exp(meta[layer]["rate"]), jnp.exp(meta[layer]["decay"])
      step = lambda direction, theta: -rate * (direction + decay * theta)
      return jax.tree.map(step, directions[layer], theta[layer])

    return {layer: of_layer(layer) for layer in LAYERS}, state

  return optax.GradientTransformationExtraArgs(adam.init, update)


def every_step(eta, batches=None):
  return jax.tree.map(lambda x: jnp.broadcast_to(x, T), eta), {}


HOW = dict(
  problem=meta_step.Problem(
    init_inner=init_classifier,
    metas=every_step,
    inner_loss=loss,
    outer_loss=lambda theta, images: loss(theta, None, images)[0],
    probe=lambda eta, _: jnp.stack(jax.tree.leaves(eta)),
  ),
  inner_optimizer=adamw_of_meta(),
  meta_optimizer=optax.adam(0.1),
  config=meta_step.MetaConfig(n_models=N, lifetime=T),  # each window is a whole training
)
meta_steps = jax.jit(functools.partial(meta_step.meta_steps, **HOW))


@jax.jit
def train_and_judge(key, eta, batches, judge):
  state = inner_loop.init(HOW["inner_optimizer"], init_classifier(key))
  state, _ = inner_loop.unroll(loss, HOW["inner_optimizer"], state, every_step(eta)[0], batches)
  return loss(state.params, None, judge)[0]


def run(seed, config):
  """(learned hypers by meta-step, test loss with them, [7] test losses, the best one's index)."""
  rng, key = np.random.default_rng(seed), jax.random.key(seed)
  train, held_out, test = split(rng, 800, 500)
  state = meta_step.init(key, hypers(START), probe=None, **HOW)
  history = [state.eta]
  for _ in range(config.meta_steps // CALL):
    state, _ = meta_steps(
      state, draw(rng, train, CALL, N, T, B), draw(rng, held_out, CALL, N, 256), None
    )
    history.append(state.eta)

  batches = [draw(rng, train, T, B) for _ in range(JUDGED)]
  keys = jax.random.split(jax.random.fold_in(key, 1), JUDGED)

  def mean_loss(eta, judge):
    runs = (train_and_judge(k, eta, b, judge) for k, b in zip(keys, batches, strict=True))
    return np.mean([float(x) for x in runs])

  best = np.argmin([mean_loss(hypers(rate), held_out) for rate in SWEEP])
  return history, mean_loss(state.eta, test), [mean_loss(hypers(r), test) for r in SWEEP], best


def main(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Test losses [seeds]: with the learned hyper-parameters, with the best rate of the sweep."""
  runs = [run(seed, config) for seed in range(config.seed, config.seed + config.seeds)]
  learned = np.array([test for _, test, _, _ in runs])
  best = np.array([sweep[i] for _, _, sweep, i in runs])
  plot(config.figure, *runs[0])
  gap = learned / best - 1
  rates = ", ".join(f"{SWEEP[i]:g}" for *_, i in runs)
  print(
    f"test loss after {T} updates with learned rates {learned.mean():.3f} ± {learned.std():.3f}, "
    f"with the best of {len(SWEEP)} constant rates ({rates}) {best.mean():.3f} ± {best.std():.3f}: "
    f"{gap.mean():+.1%}, from {gap.min():+.1%} to {gap.max():+.1%} ({config.seeds} seeds)"
  )
  return learned, best


def plot(path, history, learned, sweep, best):
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
  for layer in LAYERS:
    rates = [float(jnp.exp(eta[layer]["rate"])) for eta in history]
    left.semilogy(np.arange(len(rates)) * CALL, rates, label=layer)
  left.axhline(SWEEP[best], color="black", lw=0.7, label="best of the sweep")
  left.set(xlabel="meta-step", ylabel="learning rate")
  left.legend(fontsize=8)
  right.loglog(SWEEP, sweep, "ko-", label="constant rate")
  right.axhline(learned, label="learned")
  right.set(xlabel="learning rate", ylabel=f"test loss after {T} updates")
  right.legend()
  report.save_figure(path, figure)


if __name__ == "__main__":
  cli.define_flags(Config)
  cli.run(lambda: main(cli.config_from_flags(Config)))
