"""What the examples on text share: a corpus in short sequences, draws, networks of nano size."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from corpus import demo
from corpus.batches import Corpus, Split, load_corpus
from corpus.documents import DataConfig
from examples import common
from transformer import Batch, preset

S = 64  # tokens of a sequence
SHAPE = preset("nano", vocab_size=258)


@dataclasses.dataclass(frozen=True)
class Config(common.Config):
  seeds: int = common.option(3, "runs, for the spread")
  data: tuple[str, ...] = common.option((), "as of train.py; default the demo's, without its noise")
  cache_dir: str = common.option(".cache", "folder of the tokenized corpus")


def load(config: Config) -> Corpus:
  names = config.data or (str(demo.build()),)
  options = DataConfig(names, sequence_length=S, validation_fraction=0.05)
  return load_corpus(options, config.cache_dir)


def draw(
  rng: np.random.Generator, split: Split, mixture: dict[int, float], *shape: int
) -> tuple[Batch, np.ndarray]:
  """Sequences whose source is drawn from the mixture {source: share}, then one of its rows; and
  their sources, int32 of this shape."""
  source = rng.choice(list(mixture), shape, p=list(mixture.values()))
  by_source = np.argsort(split.source, kind="stable")
  first, last = (
    np.searchsorted(split.source[by_source], source, side) for side in ("left", "right")
  )
  rows = by_source[rng.integers(first, last)]
  text = Batch(split.tokens[rows].astype(np.int32), split.segments[rows].astype(np.int32))
  return text, source.astype(np.int32)


class Network(NamedTuple):
  init: Callable[[jax.Array], Any]  # key -> parameters
  apply: Callable[[Any, Batch], Any]  # (parameters, text) -> what `forward` returns


def network(forward: Callable[[jax.Array, jax.Array], Any]) -> Network:
  """A Haiku function of (tokens, segments) as pure functions."""
  pure = hk.without_apply_rng(hk.transform(forward))
  return Network(
    init=lambda key: pure.init(key, *[jnp.ones((1, 2), jnp.int32)] * 2),
    apply=lambda parameters, text: pure.apply(parameters, *text),
  )
