"""What the examples on scikit-learn's 8 x 8 digits share: images, draws, small networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets
import sklearn.metrics

import meta_step
from datarater import batch_weights


class Images(NamedTuple):
  pixels: Any  # [..., 64] in [0, 1]
  label: Any  # int32 [...]


def split(rng: np.random.Generator, *sizes: int) -> list[Images]:
  """Random disjoint parts of the 1,797 images, of these sizes; the last has the rest."""
  digits = sklearn.datasets.load_digits()
  pixels, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
  parts = np.split(rng.permutation(len(label)), np.cumsum(sizes))
  return [Images(pixels[rows], label[rows]) for rows in parts]


def flip(rng: np.random.Generator, images: Images, share: float) -> tuple[Images, np.ndarray]:
  """The images, a share of their labels replaced by another class; and which are [...] bool."""
  flipped = rng.random(len(images.label)) < share
  other = (images.label + rng.integers(1, 10, len(flipped))) % 10
  return images._replace(label=np.where(flipped, other, images.label).astype(np.int32)), flipped


def draw(rng: np.random.Generator, images: Images, *shape: int) -> Images:
  rows = rng.integers(len(images.label), size=shape)
  return jax.tree.map(lambda x: x[rows], images)


def mlp(*sizes: int) -> hk.Transformed:
  return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(sizes, activation=jnp.tanh)(x)))


classifier = mlp(64, 10)


def init_classifier(key: jax.Array) -> Any:
  return classifier.init(key, jnp.zeros(64))


def losses(theta: Any, images: Images) -> jax.Array:
  """Cross-entropy of the classifier on each image [...]."""
  logits = classifier.apply(theta, images.pixels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, images.label)


def mean_loss(theta: Any, images: Images) -> jax.Array:
  return losses(theta, images).mean()


def weighted_loss(theta: Any, weights_B: jax.Array, images: Images) -> tuple[jax.Array, jax.Array]:
  losses_B = losses(theta, images)
  return weights_B @ losses_B, losses_B.mean()


def weighted_images(score: Callable[[Any, Images], jax.Array]) -> meta_step.Problem:
  """The DataRater's problem for the classifier: w = softmax of a batch of score(eta, images)."""
  return meta_step.Problem(
    init_inner=init_classifier,
    metas=lambda eta, images: (batch_weights(score(eta, images)), {}),
    inner_loss=weighted_loss,
    outer_loss=mean_loss,
    probe=score,
  )


def auroc(scores: jax.Array, flipped: np.ndarray) -> float:
  """Of true against flipped labels."""
  return sklearn.metrics.roc_auc_score(~flipped, scores)


def histogram(axis: plt.Axes, scores: jax.Array, flipped: np.ndarray) -> None:
  scores, labels = np.asarray(scores), ["true label", "flipped label"]
  axis.hist([scores[~flipped], scores[flipped]], bins=40, stacked=True, label=labels)
  axis.set(xlabel="score of a held-out example", ylabel="examples")
