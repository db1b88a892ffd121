"""A learned mixture of sources: the coarse variant of the DataRater that the paper compares with.

eta is one number per source of the demo corpus, not a network. Language models train on all sources
but one, the target, and the outer loss is on the target: what should one read to write like it?

  w_i = softmax over the batch of eta[source of x_i],     mixture = softmax(eta)

Two language models are then trained from scratch on text drawn from the learned mixture and from
all sources alike, and judged on validation documents of the target.

  python -m examples.learned_curriculum     # 2 minutes on 2 cores, and one for the corpus at first

Result, seeds 0 to 2, nats per byte on the encyclopedia: 2.445 ± 0.028 after training on the learned
mixture (speeches 29%, debates_en 28%, debates_multilingual 10%), 2.568 ± 0.025 on all alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import meta_step
from datarater import batch_weights
from examples import common, texts
from runtime.cli import check
from transformer import language_model

N, T, B = 4, 2, 16  # inner models, inner steps, sequences of a batch
CALL = 5  # meta-steps in one compiled call
model = language_model(texts.SHAPE)


@dataclasses.dataclass(frozen=True)
class Config(texts.Config):
  target: str = common.option("encyclopedia", "the source to do well on, not trained on")
  meta_steps: int = common.option(60, f"updates of the mixture, a multiple of {CALL}")
  updates: int = common.option(400, "of the two language models that are compared")


def mean_loss(theta, text):
  return model.loss(theta, jnp.full(B, 1 / B), text)[0]


ALGORITHM = meta_step.Algorithm(
  problem=meta_step.Problem(  # inner batches are (text, source), outer ones text
    init_inner=model.init,
    metas=lambda eta, drawn: (batch_weights(eta[drawn[1]]), {}),
    inner_loss=lambda theta, weights_B, drawn: model.loss(theta, weights_B, drawn[0]),
    outer_loss=mean_loss,
    probe=lambda eta, _: eta,
  ),
  inner_optimizer=meta_step.inner_adamw(3e-3),
  meta_optimizer=meta_step.paper_meta_optimizer(0.1, warmup=5, weight_decay=0.0),
  n_models=N,
  lifetime=100,
  mode="mixed_save",
)
meta_steps = jax.jit(meta_step.meta_steps, static_argnums=0)


@jax.jit
def train_and_judge(key, batches, test):
  """Losses on the test batches after an update on each of the others, without weights."""
  weights = jnp.full(batches.tokens.shape[:2], 1 / B)
  theta = common.train(model.loss, ALGORITHM.inner_optimizer, model.init(key), weights, batches)
  return jax.lax.map(lambda text: mean_loss(theta, text), test)


def run(seed, config, corpus):
  """(the mixture over the meta-steps [.., sources], {mixture: loss on the target})."""
  rng, key = np.random.default_rng(seed), jax.random.key(seed)
  draw = lambda split, *shape: texts.draw(rng, corpus.splits[split], *shape)
  target = corpus.sources.index(config.target)
  others = [i for i in range(len(corpus.sources)) if i != target]
  alike = dict.fromkeys(others, 1 / len(others))
  state = meta_step.init(ALGORITHM, key, jnp.zeros(len(corpus.sources)), None)
  history = [state.eta]
  for _ in common.calls(config.meta_steps, CALL):
    inner, (outer, _) = draw("train", alike, CALL, N, T, B), draw("outer", {target: 1}, CALL, N, B)
    state, _ = meta_steps(ALGORITHM, state, inner, outer, None)
    history.append(state.eta)
  history = [np.asarray(jax.nn.softmax(eta[np.array(others)]), float) for eta in history]
  learned = dict(zip(others, history[-1] / history[-1].sum(), strict=True))

  test, _ = draw("validation", {target: 1}, 40, B)
  losses = {}
  for name, mixture in {"learned": learned, "alike": alike}.items():
    batches, _ = draw("train", mixture, config.updates, B)
    losses[name] = np.mean(train_and_judge(key, batches, test))
  return np.array(history), losses


def main(config: Config) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
  """The learned mixture of each seed; losses {mixture: [seeds]} on the target, nats per token."""
  corpus = texts.load(config)
  known = ", ".join(corpus.sources)
  check(config.target in corpus.sources, f"--target={config.target}: choose one of {known}")
  runs = [run(seed, config, corpus) for seed in common.seeds(config)]
  others = [name for name in corpus.sources if name != config.target]
  mixtures = [dict(zip(others, history[-1], strict=True)) for history, _ in runs]
  losses = {name: np.array([x[name] for _, x in runs]) for name in ("learned", "alike")}

  figure, axis = plt.subplots(figsize=(7, 4))
  history, colors = runs[0][0], plt.get_cmap("tab20").colors
  axis.stackplot(np.arange(len(history)) * CALL, history.T, labels=others, colors=colors)
  axis.set(xlabel="meta-step", ylabel="share of the mixture", title=f"target: {config.target}")
  axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  share = {name: np.mean([mixture[name] for mixture in mixtures]) for name in others}
  most = ", ".join(f"{x} {share[x]:.0%}" for x in sorted(others, key=lambda x: -share[x])[:3])
  learned, alike = (common.spread(x) for x in losses.values())
  common.show(
    config,
    figure,
    f"loss on {config.target} after training on the learned mixture {learned}, on all sources "
    f"alike {alike}; most of it: {most}",
  )
  return mixtures, losses


if __name__ == "__main__":
  common.start(main, Config)
