"""The plan of evaluate.py: settings, the list of runs, their FLOPs."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax

import transformer
from config import DTYPES, make_rater
from config import Config as RaterConfig
from corpus.tokenizer import load_tokenizer
from evaluation import pretrain
from evaluation.multiple_choice import TASKS
from kernels.loss import BACKENDS
from rating import rater_config
from runtime.cli import check, check_fields, option
from selection import PERPLEXITY, POLICIES
from transformer import ATTENTION

SIZES = tuple(transformer.PRESETS)
VALIDATION = ("selection", "validation", "validation_noisy")  # sets of the validation split
_AS_RATER = "as in train.py; default the rater's"


@dataclasses.dataclass(frozen=True)
class Config:
  """All that determines the results. Every field is a flag."""

  rater: str = option("", "workdir of the trained rater (required)", section="Corpus")
  data: tuple[str, ...] = option((), _AS_RATER)
  outer_data: tuple[str, ...] = option((), _AS_RATER)
  text_field: str | None = option(None, _AS_RATER)
  source_field: str | None = option(None, _AS_RATER)
  noise_field: str | None = option(None, _AS_RATER)
  max_documents: int | None = option(None, _AS_RATER, at_least=1)

  models: tuple[str, ...] = option(("tiny",), "model sizes", choices=SIZES, section="Comparison")
  policies: tuple[str, ...] = option(POLICIES, "how sequences are selected", choices=POLICIES)
  discard: float = option(0.5, "rho, share of each pool that is discarded", at_least=0, below=1)
  sweep_discard: tuple[float, ...] = option(
    (), "rhos to try with the smallest model; the best replaces --discard", at_least=0, below=1
  )
  seeds: tuple[int, ...] = option(
    (0, 1, 2), "seeds of parameters and order, for every policy", at_least=0
  )
  scorer: str | None = option(
    None, "size of the perplexity scorer; default the smallest of --models", choices=SIZES
  )

  batch: int | None = option(None, "N sequences; default by size", at_least=1, section="Training")
  steps: int | None = option(
    None, "updates, rounded up to a multiple of --evaluations; default by size", at_least=1
  )
  learning_rate: float | None = option(None, "peak of the schedule; default by size", at_least=0)
  dtype: str = option("float32", "activations and matmul inputs", choices=DTYPES)
  loss_backend: str | None = option(
    None, "kernels of the fused loss; default: the fastest for device and shape", choices=BACKENDS
  )
  attention_backend: str | None = option(
    None, "kernels of attention; default: the fastest for the device", choices=ATTENTION
  )

  evaluations: int = option(20, "points of a learning curve", at_least=1, section="Measurement")
  eval_sequences: int = option(256, "sequences of a set at most, evenly spaced", at_least=1)
  eval_data: tuple[str, ...] = option((), "more texts for NLL, as in --data; each is a set")
  benchmarks: tuple[str, ...] = option(
    (), f"folder of multiple-choice tasks, TASK=FILE or TASK=hf:NAME ({', '.join(TASKS)})"
  )
  benchmark_questions: int = option(500, "questions of a task at most, evenly spaced", at_least=1)

  def __post_init__(self):
    check(bool(self.rater), "name the folder of a trained rater with --rater")
    check_fields(self)
    names = [*VALIDATION, *(Path(name).name for name in self.eval_data)]
    check(
      len(set(names)) == len(names),
      f"--eval_data: two sets have one name, or that of a validation set: {', '.join(names)}",
    )
    for name in ("models", "policies", "seeds"):
      check(len(getattr(self, name)) > 0, f"--{name} is empty")
    check("none" in self.policies, "--policies lacks none, the baseline of every comparison")
    for name, rhos in (("discard", [self.discard]), ("sweep_discard", self.sweep_discard)):
      for rho in rhos:
        check(rho > 0, f"--{name}={rho:g} must be above 0")


class Run(NamedTuple):
  """One language model to train."""

  model: str
  policy: str  # or "scorer": the perplexity scorer, trained on the outer split without selection
  discard: float
  seed: int

  @property
  def name(self) -> str:
    return f"{self.model}-{self.policy}-{self.discard:g}-seed{self.seed}"


class Costs(NamedTuple):
  """Sizes of models and runs, from which FLOPs are counted."""

  parameters: dict[str, int]  # by size
  rater: int  # parameters
  scorer: str  # size of the perplexity scorer
  recipes: dict[str, NamedTuple]  # by size: learning_rate, batch, steps
  sequence_length: int

  def overhead(self, model: str, policy: str, discard: float) -> float:
    """FLOPs of rating / FLOPs of training."""
    scorers = {"datarater": self.rater}
    scorers |= dict.fromkeys(PERPLEXITY, self.parameters[self.scorer])
    if policy not in scorers:
      return 0.0
    return rating_overhead(scorers[policy], self.parameters[model], discard)

  def tokens(self, model: str) -> int:
    """D, the tokens of one run."""
    recipe = self.recipes[model]
    return recipe.steps * recipe.batch * self.sequence_length

  def flops(self, model: str, policy: str, discard: float) -> float:
    """FLOPs of one run with its rating: 6 N D (1 + overhead)."""
    rated = 1 + self.overhead(model, policy, discard)
    return 6 * self.parameters[model] * self.tokens(model) * rated


def sweep_runs(config: Config) -> list[Run]:
  """The smallest model without and with each discard fraction, with the first seed."""
  smallest = min(config.models, key=lambda name: costs(config).parameters[name])
  rhos = [("none", 0.0), *(("datarater", rho) for rho in config.sweep_discard)]
  return [Run(smallest, *rho, config.seeds[0]) for rho in rhos if config.sweep_discard]


def main_runs(config: Config, discard: float) -> list[Run]:
  runs = itertools.product(config.models, config.policies, config.seeds)
  return [Run(m, policy, 0.0 if policy == "none" else discard, seed) for m, policy, seed in runs]


def scorer_run(config: Config) -> Run:
  return Run(costs(config).scorer, "scorer", 0.0, config.seeds[0])


@functools.cache
def costs(config: Config) -> Costs:
  """Parameters, updates and batch of each size."""
  settings = rater_settings(config)
  S, vocab_size = settings.sequence_length, load_tokenizer(settings.tokenizer).vocab_size

  def count(init):
    return transformer.parameter_count(jax.eval_shape(init, jax.random.PRNGKey(0)))

  sizes = {*config.models, config.scorer} - {None}
  parameters = {size: count(language_model(config, size, vocab_size).init) for size in sizes}
  given = {name: getattr(config, name) for name in pretrain.Recipe._fields}
  recipes = {size: pretrain.RECIPES[size].scaled(n, S, **given) for size, n in parameters.items()}
  rater = count(make_rater(settings, vocab_size).init)
  scorer = config.scorer or min(config.models, key=parameters.get)
  return Costs(parameters, rater, scorer, recipes, S)


def rating_overhead(scorer_parameters: int, lm_parameters: int, discard: float) -> float:
  """FLOPs of rating the oversampled batch / FLOPs of a training step on the kept batch: per kept
  token 2 N_rater / (1 - rho) over 6 N_lm."""
  return 2 * scorer_parameters / (1 - discard) / (6 * lm_parameters)


def rater_settings(config: Config) -> RaterConfig:
  """The rater's own configuration, with the corpus of --data if one is named."""
  names = ("data", "outer_data", "text_field", "source_field", "noise_field", "max_documents")
  changes = {name: getattr(config, name) for name in names if getattr(config, name)}
  if "data" in changes:
    changes = {"outer_data": (), "max_documents": None} | changes
  return dataclasses.replace(rater_config(config.rater), **changes)


def plan_text(config: Config) -> str:
  """Describes the runs and their FLOPs: 6 N D for training, 2 N per token rated."""
  c, total, kinds = costs(config), 0, {}
  lines = [f"rater: {c.rater:,} parameters; perplexity scorer {c.scorer}"]
  lines.append(f"{'model':6} {'policy':12} {'rho':>5} {'runs':>4} {'steps':>7} {'TFLOP each':>11}")
  runs = [*sweep_runs(config), *main_runs(config, config.discard)]
  if set(config.policies) & set(PERPLEXITY):
    runs.append(scorer_run(config))
  for run in dict.fromkeys(runs):
    kinds.setdefault(run[:3], []).append(run)
  for (model, policy, rho), members in kinds.items():
    flops, n, steps = c.flops(model, policy, rho), len(members), c.recipes[model].steps
    total += flops * n
    lines.append(f"{model:6} {policy:12} {rho:5.2f} {n:4} {steps:7,} {flops / 1e12:11.4g}")
  tokens = {model: c.tokens(model) for model in c.recipes}
  seen = (f"{m} {t:,} ({t / c.parameters[m]:.1f} per parameter)" for m, t in tokens.items())
  lines.append(f"tokens seen by each model: {', '.join(seen)}")
  note = " with --discard; the sweep may choose another rho" if config.sweep_discard else ""
  return "\n".join([*lines, f"in all {total / 1e12:.4g} TFLOP{note}"])


@functools.cache  # equal models share their compiled programs
def language_model(config: Config, size: str, vocab_size: int) -> transformer.LanguageModel:
  how = dict(dtype=config.dtype, attention_backend=config.attention_backend)
  shape = transformer.preset(size, vocab_size, **how)
  return transformer.language_model(shape, config.loss_backend)
