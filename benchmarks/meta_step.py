"""Time and compiled size of one DataRater meta-step on whatever device runs it.

  python benchmarks/meta_step.py                       # T 2 and 8, every mode
  python benchmarks/meta_step.py --T=2 --mode=mixed --repeats=9

Prints a line per configuration: minimum and median seconds, compiled temporary memory. Only quote
ratios measured side by side: these figures move with whatever else the machine does.
"""

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
import meta_step
import transformer

FLAGS = flags.FLAGS
flags.DEFINE_list("T", ["2", "8"], "inner steps of the window")
flags.DEFINE_list("mode", ["mixed", "mixed_save", "reverse"], "modes of differentiation")
flags.DEFINE_integer("layers", 4, "layers of the inner model and of the rater")
flags.DEFINE_integer("d", 256, "model width; heads are 64 wide")
flags.DEFINE_integer("vocab", 512, "vocabulary")
flags.DEFINE_integer("seq", 128, "tokens a sequence")
flags.DEFINE_integer("batch", 8, "sequences of an inner and of an outer batch")
flags.DEFINE_integer("members", 1, "inner models")
flags.DEFINE_integer("repeats", 7, "timed meta-steps")
flags.DEFINE_string("dtype", "float32", "of activations and matmul inputs")
flags.DEFINE_enum("remat", "none", list(transformer.REMAT), "as in train.py")


def main(_):
  config = transformer.TransformerConfig(
    vocab_size=FLAGS.vocab,
    d_model=FLAGS.d,
    n_layers=FLAGS.layers,
    n_heads=FLAGS.d // 64,
    head_dim=64,
    d_ff=4 * FLAGS.d,
    dtype=FLAGS.dtype,
    remat=FLAGS.remat,
  )
  rater = datarater.rater(config)
  problem = meta_step.datarater_problem(transformer.language_model(config), rater)
  inner, meta = meta_step.inner_adamw(), meta_step.paper_meta_optimizer()
  key = jax.random.key(0)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {config}")
  for T in map(int, FLAGS.T):
    for mode in FLAGS.mode:
      meta_config = meta_step.MetaConfig(n_models=FLAGS.members, lifetime=10**6, mode=mode)
      tokens = jax.random.randint(
        key, (FLAGS.members, T + 1, FLAGS.batch, FLAGS.seq), 0, FLAGS.vocab
      )
      batches = transformer.Batch(tokens, tokens * 0 + 1)
      inner_batches = jax.tree.map(lambda x, T=T: x[:, :T], batches)
      outer_batches = jax.tree.map(lambda x, T=T: x[:, T], batches)
      probe = jax.tree.map(lambda x: x[0, 0], batches)
      state = jax.jit(
        lambda key, eta, c=meta_config, probe=probe: meta_step.init(
          key, eta, problem, inner, meta, c, probe
        )
      )(key, rater.init(key))
      step = jax.jit(
        lambda state, *data, c=meta_config: meta_step.meta_step(
          state, *data, problem=problem, inner_optimizer=inner, meta_optimizer=meta, config=c
        ),
        donate_argnums=0,
      )
      data = (inner_batches, outer_batches)
      step = step.lower(state, *data).compile()
      seconds = []
      for _ in range(FLAGS.repeats + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, *data))
        seconds.append(time.perf_counter() - start)
      memory = step.memory_analysis()
      print(
        f"T={T} {mode:11s} min {min(seconds[1:]):.3f} s"
        f"  median {statistics.median(seconds[1:]):.3f} s"
        f"  temp {memory.temp_size_in_bytes / 2**20:,.0f} MiB"
        f"  outer loss {float(metrics['outer_loss'].ravel()[-1]):.4f}",
        flush=True,
      )


if __name__ == "__main__":
  app.run(main)
