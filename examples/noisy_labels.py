"""Flipped labels get no weight: a rater of (image, label) pairs, on scikit-learn's digits.

A share of the training labels is replaced by another class. The rater reads the image and the label
it came with; the outer loss is on a few images whose labels are trusted:

  w_i = softmax over the batch of phi_eta(x_i, y_i),   phi_eta(x, y) = MLP_eta(x)[y]

Then a classifier is trained anew on what a batch-level top-K of the scores keeps, and judged on
test images beside three others: trained on everything, on the true labels (the best there is), and
on the trusted images alone (what the rater had to learn from).

  python examples/noisy_labels.py     # 40 s on 2 cores

Result, seeds 0 to 4: AUROC of true against flipped labels 0.959 ± 0.009; accuracy when trained on
all labels 91.3 ± 2.0%, the rater's choice 95.0 ± 2.2%, the true labels 96.7 ± 0.7%, the 300 trusted
images alone 94.7 ± 2.1%: the rater's choice is no better than those within the spread of seeds.
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
import sklearn.metrics
from digits import (
  classifier,
  draw,
  flip,
  init_classifier,
  mlp,
  split,
  weighted_images,
  weighted_loss,
)

import cli
import inner_loop
import meta_step
import report
from cli import option
from datarater import top_k_mask

N, T, B = 4, 2, 64  # inner models, inner steps, examples of an inner batch
TRUSTED = 300  # images with trusted labels; an outer batch draws as many of them
CALL = 50  # meta-steps in one compiled call
UPDATES = 400  # of the classifiers that are compared


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = option(0, "the first of the seeds")
  seeds: int = option(5, "runs, for the spread")
  flipped: float = option(0.2, "share of the training labels that are wrong")
  meta_steps: int = option(2000, f"updates of the rater, a multiple of {CALL}")
  figure: str = option("runs/noisy_labels.png", "file of the figure")


rater = mlp(64, 10)


def score(eta, images):
  scores = rater.apply(eta, images.pixels)  # a score for each label that the image may have
  return jnp.take_along_axis(scores, images.label[..., None], -1)[..., 0]


HOW = dict(
  problem=weighted_images(score),
  inner_optimizer=meta_step.inner_adamw(3e-3),
  meta_optimizer=meta_step.paper_meta_optimizer(1e-3, warmup=20),
  config=meta_step.MetaConfig(n_models=N, lifetime=200, mode="mixed_save"),
)
meta_steps = jax.jit(functools.partial(meta_step.meta_steps, **HOW))


@jax.jit
def train_classifier(key, weights, batches):
  """theta after UPDATES updates under the given weights [UPDATES, B]."""
  state = inner_loop.init(HOW["inner_optimizer"], init_classifier(key))
  return inner_loop.unroll(weighted_loss, HOW["inner_optimizer"], state, weights, batches)[0].params


def run(seed, config):
  """(scores of held-out examples, which labels are flipped, {training data: test accuracy})."""
  rng, (eta_key, key) = np.random.default_rng(seed), jax.random.split(jax.random.key(seed))
  train, trusted, test = split(rng, 1000, TRUSTED)

  (given, _), (held_out, flipped) = (flip(rng, x, config.flipped) for x in (train, test))
  state = meta_step.init(key, rater.init(eta_key, jnp.zeros(64)), probe=held_out, **HOW)
  for _ in range(config.meta_steps // CALL):
    batches = draw(rng, given, CALL, N, T, B), draw(rng, trusted, CALL, N, TRUSTED)
    state, _ = meta_steps(state, *batches, held_out)

  accuracy = {}
  for name, images in {
    "all labels": given,
    "rater's choice": given,
    "true labels": train,
    "trusted images": trusted,
  }.items():
    batches, keep = draw(rng, images, UPDATES, B), np.ones((UPDATES, B), bool)
    if name == "rater's choice":
      keep = top_k_mask(score(state.eta, batches), config.flipped)
    theta = train_classifier(key, keep / keep.sum(-1, keepdims=True), batches)
    answers = classifier.apply(theta, test.pixels).argmax(-1)
    accuracy[name] = np.mean(answers == test.label)
  return state.probe_scores, flipped, accuracy


def main(config: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """AUROC [seeds] of true against flipped labels; test accuracies {training data: [seeds]}."""
  runs = [run(seed, config) for seed in range(config.seed, config.seed + config.seeds)]
  auroc = np.array([sklearn.metrics.roc_auc_score(~flipped, scores) for scores, flipped, _ in runs])
  accuracies = {name: np.array([a[name] for *_, a in runs]) for name in runs[0][2]}
  scores, flipped, _ = runs[0]
  figure, axis = plt.subplots(figsize=(5, 3))
  groups = [scores[~flipped], scores[flipped]]
  axis.hist(groups, bins=40, stacked=True, label=["true label", "flipped label"])
  axis.set(xlabel="score of a held-out example", ylabel="examples")
  axis.legend()
  report.save_figure(config.figure, figure)
  shown = ", ".join(
    f"{k} {100 * a.mean():.1f} ± {100 * a.std():.1f}%" for k, a in accuracies.items()
  )
  print(
    f"AUROC of true against flipped labels {auroc.mean():.3f} ± {auroc.std():.3f}; accuracy of a "
    f"classifier trained on {shown} ({config.seeds} seeds)"
  )
  return auroc, accuracies


if __name__ == "__main__":
  cli.define_flags(Config)
  cli.run(lambda: main(cli.config_from_flags(Config)))
