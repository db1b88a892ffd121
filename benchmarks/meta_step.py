"""Time, compiled size and FLOPs of one DataRater meta-step on whatever device runs it.

  python benchmarks/meta_step.py                       # T 2 and 8, every mode, a small model
  python benchmarks/meta_step.py --T=2 --mode=mixed --repeats=9
  python benchmarks/meta_step.py --model=150m --rater=50m --dtype=bfloat16 --vocab=32000 \\
    --seq=2048 --T=2 --mode=mixed,mixed_offload --remat=block,products \\
    --attention_backend=pallas_gpu                                      # one accelerator

Prints a line per configuration: minimum and median seconds, compiled temporary memory, and the rate
of the necessary FLOPs (`flops.minimum` less what memory would save), as a share of the chip's peak
where it is known. Only quote ratios measured side by side: these figures move with whatever else
the machine does.
"""

import itertools
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cpu

cpu.keep_freed_memory()

import jax
from absl import app, flags

import datarater
import flops
import inner_loop
import kernels
import meta_step
import targets
import transformer

FLAGS = flags.FLAGS
flags.DEFINE_list("T", ["2", "8"], "inner steps of the window")
flags.DEFINE_list("mode", ["mixed", "mixed_save", "reverse"], "names in inner_loop.MODES")
flags.DEFINE_list("remat", ["none"], "names in transformer.REMAT")
flags.DEFINE_list("members", ["1"], "inner models")
flags.DEFINE_string("model", None, "size in transformer.PRESETS; default that of --layers, --d")
flags.DEFINE_string("rater", None, "the same of the rater; default the model's")
flags.DEFINE_integer("layers", 4, "layers of the inner model and of the rater")
flags.DEFINE_integer("d", 256, "model width; heads are 64 wide")
flags.DEFINE_integer("vocab", 512, "vocabulary")
flags.DEFINE_integer("seq", 128, "tokens a sequence")
flags.DEFINE_integer("batch", 8, "sequences of an inner and of an outer batch")
flags.DEFINE_integer("microbatches", 1, "parts that a batch is formed in")
flags.DEFINE_integer("repeats", 7, "timed meta-steps")
flags.DEFINE_string("dtype", "float32", "of activations and matmul inputs")
flags.DEFINE_enum("loss_backend", "xla", list(kernels.loss.BACKENDS), "of the fused loss")
flags.DEFINE_list("attention_backend", ["xla"], "names in transformer.ATTENTION")

# Of jax.Device.device_kind, a part -> the name in targets.CHIPS.
KINDS = {"v5 lite": "v5e", "v5p": "v5p", "v6 lite": "v6e", "H100": "h100", "H200": "h100"}


def main(_):
  device = jax.devices()[0]
  chip = next(
    (targets.CHIPS[name] for kind, name in KINDS.items() if kind in device.device_kind), None
  )
  print(
    f"{device.device_kind}, jax {jax.__version__}; vocabulary {FLAGS.vocab}, S {FLAGS.seq}, "
    f"B {FLAGS.batch}, {FLAGS.dtype}"
  )
  unknown = set(FLAGS.mode) - set(inner_loop.MODES) | set(FLAGS.remat) - set(transformer.REMAT)
  unknown |= set(FLAGS.attention_backend) - set(transformer.ATTENTION)
  if unknown:
    raise app.UsageError(f"unknown mode, remat or attention: {', '.join(sorted(unknown))}")
  for T, members, remat, attention, mode in itertools.product(
    map(int, FLAGS.T), map(int, FLAGS.members), FLAGS.remat, FLAGS.attention_backend, FLAGS.mode
  ):
    how = dict(remat=remat, attention_backend=attention)
    model, rater = shape(FLAGS.model, **how), shape(FLAGS.rater, **how)
    seconds, temp, loss = measure(T, members, model, rater, mode)
    least = flops.minimum(model, rater, T, FLAGS.batch, FLAGS.batch, FLAGS.seq)
    rate = members * (least.total - least.kept) / min(seconds)
    print(
      f"T={T} N={members} {remat:8s} {attention:10s} {mode:13s} min {min(seconds):.3f} s"
      f"  median {statistics.median(seconds):.3f} s  temp {temp / 2**20:,.0f} MiB"
      f"  {rate / 1e12:.3g} TFLOP/s"
      + (f" ({rate / chip.flops:.1%} of bfloat16 peak)" if chip else "")
      + f"  outer loss {loss:.4f}",
      flush=True,
    )


def shape(size: str | None, **how) -> transformer.TransformerConfig:
  how |= dict(dtype=FLAGS.dtype)
  size = size or FLAGS.model
  if size is not None:
    return transformer.preset(size, FLAGS.vocab, **how)
  wide = dict(d_model=FLAGS.d, n_heads=FLAGS.d // 64, head_dim=64, d_ff=4 * FLAGS.d)
  return transformer.TransformerConfig(FLAGS.vocab, n_layers=FLAGS.layers, **wide, **how)


def measure(
  T: int,
  members: int,
  model: transformer.TransformerConfig,
  rater: transformer.TransformerConfig,
  mode: str,
) -> tuple[list[float], int, float]:
  """(seconds of each repeat, bytes of temporary memory, the last outer loss)."""
  remat, rater = model.remat != "none", datarater.rater(rater)
  model = transformer.language_model(model, FLAGS.loss_backend, FLAGS.microbatches)
  how = dict(
    problem=meta_step.datarater_problem(model, rater, remat, FLAGS.microbatches),
    inner_optimizer=meta_step.inner_adamw(),
    meta_optimizer=meta_step.paper_meta_optimizer(),
    config=meta_step.MetaConfig(n_models=members, lifetime=10**6, mode=mode),
  )
  key = jax.random.key(0)
  tokens = jax.random.randint(key, (members, T + 1, FLAGS.batch, FLAGS.seq), 0, FLAGS.vocab)
  batches = transformer.Batch(tokens, tokens * 0 + 1)
  of_window = jax.tree.map(lambda x: x[:, :T], batches), jax.tree.map(lambda x: x[:, T], batches)
  probe = jax.tree.map(lambda x: x[0, 0], batches)
  init = jax.jit(lambda key, probe: meta_step.init(key, rater.init(key), probe=probe, **how))
  state = init(key, probe)
  step = jax.jit(lambda state, *x: meta_step.meta_step(state, *x, **how), donate_argnums=0)
  step = step.lower(state, *of_window).compile()
  seconds = []
  for _ in range(FLAGS.repeats + 1):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, *of_window))
    seconds.append(time.perf_counter() - start)
  temp = step.memory_analysis().temp_size_in_bytes
  return seconds[1:], temp, float(metrics["outer_loss"].ravel()[-1])


if __name__ == "__main__":
  app.run(main)
