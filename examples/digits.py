"""What the examples on scikit-learn's 8 x 8 digits share: images, draws, small networks."""

from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets


class Images(NamedTuple):
  pixels: Any  # [..., 64] in [0, 1]
  label: Any  # int32 [...]


def split(rng: np.random.Generator, *sizes: int) -> list[Images]:
  """Random disjoint parts of the 1,797 images, of these sizes; the last has the rest."""
  digits = sklearn.datasets.load_digits()
  pixels, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
  parts = np.split(rng.permutation(len(label)), np.cumsum(sizes))
  return [Images(pixels[rows], label[rows]) for rows in parts]


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
