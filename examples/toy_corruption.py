"""Weights fall with corruption: the DataRater paper's Fig. 3, on scikit-learn's 8 x 8 digits.

The inner models, small classifiers, train on images that are blended with noise of one of three
kinds, its share uniform on [0, 1] (the paper's figure spans about 0.15 to 0.8; a wider span alone
raises R^2); the outer loss is on clean images. The rater is never told what is noise.

  theta' = Theta(theta, sum_i w_i grad l(x_i; theta)),   w = softmax over the batch of phi_eta(x)
  eta    = argmin of the clean loss of theta after T = 4 such updates

  python -m examples.toy_corruption     # half a minute on 2 cores

Result, seeds 0 to 4, held-out images, R^2 of the fit of weight on noise at meta-step 0, 10, 30, 70:
0.173 ± 0.121, 0.838 ± 0.018, 0.846 ± 0.019, 0.853 ± 0.022 (the paper's figure, on its own data:
0.163, 0.561, 0.693, 0.813). Weights are the exponential of scores: the weight decay of 40 keeps the
scores' spread small, and so the weights near linear in them.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

import meta_step
from datarater import batch_weights
from examples import common, digits
from examples.common import Config

N, T, B, OUTER = 4, 4, 128, 512  # inner models, inner steps, images of an inner, an outer batch
SNAPSHOTS = (0, 10, 30, 70)  # meta-steps, as in the paper's figure
CALL = 10  # meta-steps in one compiled call


def mlp_of_steps(pixels):
  """phi_eta: an MLP that reads the pixels and the steps between neighbors; [..., 64] -> [...]."""
  square = pixels.reshape(*pixels.shape[:-1], 8, 8)
  steps = [
    jnp.abs(jnp.diff(square, axis=axis)).reshape(*pixels.shape[:-1], -1) for axis in (-1, -2)
  ]
  features = jnp.concatenate([pixels, *steps], -1)
  return hk.nets.MLP([64, 1], activation=jnp.tanh)(features)[..., 0]


rater = hk.without_apply_rng(hk.transform(mlp_of_steps))


def score(eta, images):
  return rater.apply(eta, images.pixels)


ALGORITHM = meta_step.Algorithm(
  problem=digits.weighted_images(score),
  inner_optimizer=meta_step.inner_adamw(1e-2),
  meta_optimizer=meta_step.paper_meta_optimizer(3e-3, warmup=5, weight_decay=40.0),
  n_models=N,
  lifetime=100,
  mode="mixed_save",
)
meta_steps = jax.jit(meta_step.meta_steps, static_argnums=0)


def corrupt(pixels, rng):
  """(images, their noise in [0, 1]): so much of each image is gray noise, black and white noise, or
  its own pixels in another order."""
  noise = rng.uniform(size=(*pixels.shape[:-1], 1))
  kind = rng.integers(3, size=noise.shape)
  black_white = rng.integers(2, size=pixels.shape)
  kinds = [rng.random(pixels.shape), black_white, rng.permuted(pixels, axis=-1)]
  corrupted = (1 - noise) * pixels + noise * np.choose(kind, kinds)
  return corrupted.astype(np.float32), noise[..., 0]


def run(seed):
  """Noise of held-out images [P], and their weights in a batch of B at each snapshot [.., P]."""
  rng = np.random.default_rng(seed)
  noisy, clean, held_out = digits.split(rng, 900, 400)
  pixels, noise = corrupt(held_out.pixels, rng)
  held_out = held_out._replace(pixels=pixels)
  eta_key, key = jax.random.split(jax.random.key(seed))
  state = meta_step.init(ALGORITHM, key, rater.init(eta_key, jnp.zeros(64)), held_out)
  weights = {0: batch_weights(state.probe_scores)}
  for k in range(CALL, SNAPSHOTS[-1] + 1, CALL):
    inner = digits.draw(rng, noisy, CALL, N, T, B)
    inner = inner._replace(pixels=corrupt(inner.pixels, rng)[0])
    outer = digits.draw(rng, clean, CALL, N, OUTER)
    state, _ = meta_steps(ALGORITHM, state, inner, outer, held_out)
    weights[k] = batch_weights(state.probe_scores)
  return noise, np.array([weights[k] for k in SNAPSHOTS]) * len(noise) / B


def main(config: Config) -> np.ndarray:
  """Pearson's r of weight and noise [seeds, snapshots]: negative where weights fall."""
  runs = [run(seed) for seed in common.seeds(config)]
  fits = [[scipy.stats.linregress(noise, w) for w in weights] for noise, weights in runs]
  r = np.array([[fit.rvalue for fit in row] for row in fits])
  figure, axes = plt.subplots(1, len(SNAPSHOTS), figsize=(13, 3), sharey=True)
  noise, weights = runs[0]
  for axis, k, w, fit in zip(axes, SNAPSHOTS, weights, fits[0], strict=True):
    axis.scatter(noise, w, s=6, alpha=0.5)
    axis.plot(noise, fit.intercept + fit.slope * noise, color="black", lw=1)
    axis.set(title=f"meta-step {k}, $R^2$ = {fit.rvalue**2:.3f}", xlabel="noise fraction")
  axes[0].set_ylabel(f"weight in a batch of {B}")
  shown = ", ".join(f"{k}: {common.spread(r2)}" for k, r2 in zip(SNAPSHOTS, r.T**2, strict=True))
  common.show(config, figure, f"R^2 of weight on noise at meta-step {shown}")
  return r


if __name__ == "__main__":
  common.start(main, Config)
