"""The settings of a run, the paper's presets, and the program that they build."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

import datarater
import inner_loop
import meta_step
import transformer
from corpus.documents import DataConfig
from kernels import attention, loss
from kernels.loss import BACKENDS
from runtime import devices
from runtime.cli import check, option

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config(DataConfig):
  """All that determines what a run writes. Every field is a flag; presets change some defaults."""

  model: str = option(
    "tiny", "size of the inner models theta", choices=transformer.PRESETS, section="Models"
  )
  rater: str = option("tiny", "size of the rater eta", choices=transformer.PRESETS)
  dtype: str = option("float32", "of activations and matmul inputs", choices=DTYPES)
  loss_backend: str | None = option(
    None, "kernels of the fused loss; default: the fastest for device and shape", choices=BACKENDS
  )
  attention_backend: str | None = option(
    None, "kernels of attention; default: the fastest for the device", choices=transformer.ATTENTION
  )

  meta_steps: int = option(80, "K, updates of the rater", at_least=1, section="Algorithm 1")
  n_models: int = option(4, "N_models, inner models", at_least=1)
  inner_steps: int = option(2, "T, inner updates differentiated per meta-step", at_least=1)
  inner_batch: int = option(16, "N_inner, sequences of an inner batch", at_least=1)
  outer_batch: int = option(32, "N_outer, sequences of an outer batch", at_least=1)
  lifetime: int = option(200, "inner updates between re-initializations of a member", at_least=1)
  members_per_step: int | None = option(
    None, "members drawn per meta-step; default all", at_least=1
  )
  mode: str = option(
    "mixed_save",
    "how the meta-gradient is computed: mixed saves memory, mixed_save is fast on CPUs, reverse is "
    "plain autodiff, first_order drops the Hessian",
    choices=inner_loop.MODES,
  )
  remat: str | None = option(
    None,
    "what the backward pass recomputes: nothing (none), all of a block (block), all of it but the "
    "matmuls (products); default: block from 50m on, none below",
    choices=transformer.REMAT,
  )
  microbatches: int = option(1, "parts a batch is computed in; saves memory", at_least=1)
  inner_learning_rate: float = option(3e-3, "of Theta, AdamW", at_least=0)
  inner_warmup: int = option(
    0, "of Theta: updates of warm-up after each re-initialization", at_least=0
  )
  inner_weight_decay: float = option(0.0, "of Theta, decoupled", at_least=0)
  meta_learning_rate: float = option(2e-3, "of H, AdamW", at_least=0)
  meta_warmup: int = option(10, "of H: meta-steps of linear warm-up", at_least=0)
  meta_weight_decay: float = option(0.1, "of H, decoupled", at_least=0)
  meta_clip: float = option(0.01, "global norm that a meta-gradient is clipped to", at_least=0)

  steps_per_call: int = option(10, "meta-steps in one compiled call", at_least=1, section="The run")
  checkpoint_every: int = option(20, "meta-steps between checkpoints", at_least=1)
  report_documents: int = option(1000, "validation documents scored, at most", at_least=1)

  def __post_init__(self):
    super().__post_init__()
    for name, of in (
      ("inner_batch", "microbatches"),
      ("outer_batch", "microbatches"),
      ("meta_steps", "steps_per_call"),
      ("checkpoint_every", "steps_per_call"),
    ):
      value, unit = getattr(self, name), getattr(self, of)
      check(value % unit == 0, f"--{name}={value} must be a multiple of --{of}={unit}")
    m, n = self.members_per_step, self.n_models
    check(m is None or m <= n, f"--members_per_step={m} must be at most --n_models={n}")
    check(
      self.lifetime >= self.inner_steps,
      f"--lifetime={self.lifetime} is shorter than one window of --inner_steps={self.inner_steps}",
    )
    for name in ("loss_backend", "attention_backend"):
      value = getattr(self, name)
      check(
        self.mode != "reverse" or not (value or "").startswith("pallas"),
        f"--{name}={value} cannot be differentiated twice in reverse, as --mode=reverse asks: "
        f"use --{name}=xla",
      )

  @property
  def backends(self) -> tuple[str | None, str | None]:
    """Of (loss, attention); None: the fastest. Pallas has no reverse mode over reverse mode."""
    default = "xla" if self.mode == "reverse" else None
    return self.loss_backend or default, self.attention_backend or default

  def backends_here(self, vocab_size: int) -> tuple[str, str]:
    """The same, where None is what this device takes."""
    of_loss, of_attention = self.backends
    return (
      of_loss or loss.fastest(vocab_size, self.dtype),
      of_attention or attention.fastest(self.dtype),
    )

  @property
  def drawn_members(self) -> int:
    """m, the inner models of a meta-step."""
    return self.members_per_step or self.n_models


PAPER = dict(
  data=("hf:allenai/c4:en",),
  tokenizer="google-t5/t5-base",
  sequence_length=2048,
  packing="pack",
  outer_fraction=0.1,
  validation_fraction=0.0005,
  rater="50m",
  dtype="bfloat16",
  mode="mixed",
  meta_steps=8000,
  n_models=8,
  inner_batch=128,
  outer_batch=128,
  lifetime=2000,
  inner_learning_rate=1e-3,
  inner_warmup=100,
  inner_weight_decay=0.1,
  meta_learning_rate=1e-4,
  meta_warmup=100,
  meta_weight_decay=0.1,
  meta_clip=0.01,
  checkpoint_every=100,
)
PRESETS = {
  "demo": {},
  "50m": PAPER | dict(model="50m"),
  "150m": PAPER | dict(model="150m"),
  "paper": PAPER | dict(model="400m"),
}


class Program(NamedTuple):
  """A configuration as functions."""

  rater: datarater.Rater
  algorithm: meta_step.Algorithm

  def init(self, key: jax.Array, probe: transformer.Batch) -> meta_step.MetaState:
    eta_key, key = jax.random.split(key)
    return meta_step.init(self.algorithm, key, self.rater.init(eta_key), probe)

  def jit_meta_steps(self, out_shardings: Any = None):
    """steps_per_call meta-steps, (state, inner, outer, probe) -> (state, metrics), jitted: the one
    program of a run. It reuses the memory of the input state."""

    def meta_steps(*arguments):
      return meta_step.meta_steps(self.algorithm, *arguments)

    return jax.jit(meta_steps, donate_argnums=0, out_shardings=out_shardings)


def build(config: Config, vocab_size: int) -> Program:
  rater = make_rater(config, vocab_size)
  shape = transformer_config(config, config.model, vocab_size)
  model = transformer.language_model(shape, config.backends[0], config.microbatches)
  algorithm = meta_step.Algorithm(
    problem=meta_step.datarater_problem(
      model,
      rater,
      config.microbatches,
      save_activations=config.mode == "mixed_save" and shape.remat == "none",
    ),
    inner_optimizer=meta_step.inner_adamw(
      config.inner_learning_rate, config.inner_warmup, config.inner_weight_decay
    ),
    meta_optimizer=meta_step.paper_meta_optimizer(
      config.meta_learning_rate, config.meta_warmup, config.meta_weight_decay, config.meta_clip
    ),
    n_models=config.n_models,
    lifetime=config.lifetime,
    mode=config.mode,
    members_per_step=config.members_per_step,
  )
  return Program(rater, algorithm)


def make_rater(config: Config, vocab_size: int) -> datarater.Rater:
  return datarater.rater(transformer_config(config, config.rater, vocab_size))


def transformer_config(config: Config, size: str, vocab_size: int) -> transformer.TransformerConfig:
  options = {"dtype": config.dtype, "attention_backend": config.backends[1]}
  options |= {"remat": config.remat} if config.remat else {}
  return transformer.preset(size, vocab_size, **options)


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
  """The batches of one compiled call: shape, and for each axis the mesh axis it is sharded over."""
  C, T, S = config.steps_per_call, config.inner_steps, config.sequence_length
  m = config.drawn_members
  return {
    "inner": ((C, m, T, config.inner_batch, S), (None, "population", None, "data")),
    "outer": ((C, m, config.outer_batch, S), (None, "population", "data")),
    "probe": ((config.outer_batch, S), ("data",)),
  }


def make_mesh(
  config: Config, spec: str | None, available: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """The mesh that --mesh describes, or the default.

  Raises:
    UserError: the configuration cannot be spread over it.
  """
  m = config.drawn_members
  if m < config.n_models:  # any member may be drawn, so every shard must hold all
    spec = spec or "population=1"
  mesh = devices.make_mesh(spec, config.n_models, available)
  check(
    m == config.n_models or mesh.shape["population"] == 1,
    f"--members_per_step={m} draws from all inner models: use --mesh=population=1",
  )
  for name in ("inner_batch", "outer_batch"):
    value, size, parts = getattr(config, name), mesh.shape["data"], config.microbatches
    check(
      value % (size * parts) == 0,
      f"--{name}={value} is not a multiple of the {size} devices of the mesh's data axis, times "
      f"--microbatches={parts}: change it, or give another --mesh=population=...,data=...",
    )
  return mesh
