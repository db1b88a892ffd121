"""A learned mixture of sources: the coarse variant of the DataRater that the paper compares with.

eta is one number per source of the demo corpus, not a network. Language models train on all sources
but one, the target, and the outer loss is on the target: what should one read to write like it?

  w_i = softmax over the batch of eta[source of x_i],     mixture = softmax(eta)

Two language models are then trained from scratch on text drawn from the learned mixture and from
all sources alike, and judged on validation documents of the target.

  python examples/learned_curriculum.py     # 2 minutes on 2 cores, and one for the corpus at first

Result, seeds 0 to 2, nats a byte on the encyclopedia: 2.445 ± 0.028 after training on the learned
mixture (speeches 29%, debates_en 28%, debates_multilingual 10%), 2.568 ± 0.025 on all alike.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import cli
import data
import demo_corpus
import inner_loop
import meta_step
import report
from cli import check, option
from datarater import batch_weights
from transformer import Batch, language_model, preset

N, T, B = 4, 2, 16  # inner models, inner steps, sequences of a batch
CALL = 5  # meta-steps in one compiled call
model = language_model(preset("nano", vocab_size=258))


@dataclasses.dataclass(frozen=True)
class Config:
  data: tuple[str, ...] = option((), "as of train.py; default the demo corpus, without its noise")
  target: str = option("encyclopedia", "the source to do well on, which is not trained on")
  seed: int = option(0, "the first of the seeds")
  seeds: int = option(3, "runs, for the spread")
  meta_steps: int = option(60, f"updates of the mixture, a multiple of {CALL}")
  updates: int = option(400, "of the two language models that are compared")
  cache_dir: str = option(".cache", "folder of the tokenised corpus")
  figure: str = option("runs/learned_curriculum.png", "file of the figure")


class Sequences(NamedTuple):
  text: Batch
  source: Any  # int32 [..., B]


def loss(theta, weights_B, sequences):
  return model.loss(theta, weights_B, sequences.text)


def mean_loss(theta, sequences):
  return loss(theta, jnp.full(B, 1 / B), sequences)[0]


HOW = dict(
  problem=meta_step.Problem(
    init_inner=model.init,
    metas=lambda eta, sequences: (batch_weights(eta[sequences.source]), {}),
    inner_loss=loss,
    outer_loss=mean_loss,
    probe=lambda eta, _: eta,
  ),
  inner_optimizer=meta_step.inner_adamw(3e-3),
  meta_optimizer=meta_step.paper_meta_optimizer(0.1, warmup=5, weight_decay=0.0),
  config=meta_step.MetaConfig(n_models=N, lifetime=100, mode="mixed_save"),
)
meta_steps = jax.jit(functools.partial(meta_step.meta_steps, **HOW))


@jax.jit
def train(key, batches):
  """theta after an update on each of the batches, all sequences weighing the same."""
  state = inner_loop.init(HOW["inner_optimizer"], model.init(key))
  weights = jnp.full(batches.source.shape, 1 / B)
  return inner_loop.unroll(loss, HOW["inner_optimizer"], state, weights, batches)[0].params


def draw(rng, split, mixture, *shape):
  """Sequences whose source is drawn from the mixture {source: share}, then one of its rows."""
  source = rng.choice(list(mixture), shape, p=list(mixture.values()))
  by_source = np.argsort(split.source, kind="stable")
  first, last = (
    np.searchsorted(split.source[by_source], source, side) for side in ("left", "right")
  )
  rows = by_source[rng.integers(first, last)]
  text = Batch(split.tokens[rows].astype(np.int32), split.segments[rows].astype(np.int32))
  return Sequences(text, source.astype(np.int32))


def run(seed, config, corpus):
  """(the mixture over the meta-steps [.., sources], {mixture: loss on the target})."""
  rng, key = np.random.default_rng(seed), jax.random.key(seed)
  splits, target = corpus.splits, corpus.sources.index(config.target)
  others = [i for i in range(len(corpus.sources)) if i != target]
  alike = dict.fromkeys(others, 1 / len(others))
  state = meta_step.init(key, jnp.zeros(len(corpus.sources)), probe=None, **HOW)
  history = [state.eta]
  for _ in range(config.meta_steps // CALL):
    inner = draw(rng, splits["train"], alike, CALL, N, T, B)
    state, _ = meta_steps(state, inner, draw(rng, splits["outer"], {target: 1}, CALL, N, B), None)
    history.append(state.eta)
  history = [np.asarray(jax.nn.softmax(eta[np.array(others)]), float) for eta in history]
  learned = dict(zip(others, history[-1] / history[-1].sum(), strict=True))

  test = draw(rng, splits["validation"], {target: 1}, 40, B)
  losses = {}
  for name, mixture in {"learned": learned, "alike": alike}.items():
    theta = train(key, draw(rng, splits["train"], mixture, config.updates, B))
    losses[name] = np.mean(jax.lax.map(lambda batch, theta=theta: mean_loss(theta, batch), test))
  return np.array(history), losses


def main(config: Config) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
  """The learned mixture of each seed, and losses {mixture: [seeds]} on the target, nats a token."""
  names = config.data or (str(demo_corpus.build()),)
  options = data.DataConfig(names, sequence_length=64, packing="document", outer_fraction=0.2)
  corpus = data.load_corpus(options, config.cache_dir)
  known = ", ".join(corpus.sources)
  check(config.target in corpus.sources, f"--target={config.target}: choose one of {known}")
  runs = [run(s, config, corpus) for s in range(config.seed, config.seed + config.seeds)]
  others = [name for name in corpus.sources if name != config.target]
  mixtures = [dict(zip(others, history[-1], strict=True)) for history, _ in runs]
  losses = {name: np.array([x[name] for _, x in runs]) for name in ("learned", "alike")}

  figure, axis = plt.subplots(figsize=(7, 4))
  history, colors = runs[0][0], plt.get_cmap("tab20").colors
  axis.stackplot(np.arange(len(history)) * CALL, history.T, labels=others, colors=colors)
  axis.set(xlabel="meta-step", ylabel="share of the mixture", title=f"target: {config.target}")
  axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  report.save_figure(config.figure, figure)
  first = sorted(others, key=lambda name: -np.mean([m[name] for m in mixtures]))[:3]
  shown = ", ".join(f"{name} {np.mean([m[name] for m in mixtures]):.0%}" for name in first)
  print(
    f"loss on {config.target} after training on the learned mixture {losses['learned'].mean():.3f} "
    f"± {losses['learned'].std():.3f}, on all sources alike {losses['alike'].mean():.3f} "
    f"± {losses['alike'].std():.3f} ({config.seeds} seeds); most of it: {shown}"
  )
  return mixtures, losses


if __name__ == "__main__":
  cli.define_flags(Config)
  cli.run(lambda: main(cli.config_from_flags(Config)))
