"""Compiled memory of a one-member meta-step on an NVIDIA H100, from a machine that has none.

  python benchmarks/h100_memory.py --T=2  # 400m preset, B 8, S 2048, vocabulary 32,000
  python benchmarks/h100_memory.py --T=2 --mode=reverse  # the yardstick

Needs jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version and `ptxas` on the PATH, no GPU.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import SingleDeviceSharding

import datarater
import meta_step
import transformer
from benchmarks import targets

FLAGS = flags.FLAGS
flags.DEFINE_integer("T", 2, "inner steps")
flags.DEFINE_string("mode", "mixed", "mode of differentiation")
flags.DEFINE_string("model", "400m", "preset of the inner model")
flags.DEFINE_string("rater", "50m", "preset of the rater; empty: weights are given, no rater")
flags.DEFINE_integer("batch", 8, "sequences of the inner and outer batch")
flags.DEFINE_integer("seq", 2048, "tokens a sequence")
flags.DEFINE_boolean("donate", False, "update in place: outputs wait in temp until inputs are dead")
flags.DEFINE_integer("vocab", 32_000, "vocabulary")


def main(_):
  jax.config.update("jax_platforms", "cpu")
  here = SingleDeviceSharding(targets.device("h100"))
  options = dict(dtype="bfloat16")
  model = transformer.language_model(transformer.preset(FLAGS.model, FLAGS.vocab, **options))
  rater = datarater.rater(transformer.preset(FLAGS.rater, FLAGS.vocab, **options))
  problem = meta_step.datarater_problem(model, rater, remat=True)
  inner, meta = meta_step.inner_adamw(1e-3, 100, 0.1), meta_step.paper_meta_optimizer()
  config = meta_step.MetaConfig(n_models=1, lifetime=1000, mode=FLAGS.mode)

  def batch(*shape):
    tokens = jax.ShapeDtypeStruct((*shape, FLAGS.batch, FLAGS.seq), jnp.int32)
    return transformer.Batch(tokens, tokens)

  probe = batch()
  state = jax.eval_shape(
    lambda key, probe: meta_step.init(key, rater.init(key), problem, inner, meta, config, probe),
    jax.ShapeDtypeStruct((2,), jnp.uint32),
    probe,
  )
  step = jax.jit(
    lambda state, *data: meta_step.meta_step(
      state, *data, problem=problem, inner_optimizer=inner, meta_optimizer=meta, config=config
    ),
    donate_argnums=0 if FLAGS.donate else (),
    in_shardings=here,
    out_shardings=here,
  )
  start = time.time()
  lowered = step.trace(state, batch(1, FLAGS.T), batch(1)).lower(lowering_platforms=("cuda",))
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  print(
    f"{FLAGS.model} B={FLAGS.batch} S={FLAGS.seq} T={FLAGS.T} {FLAGS.mode}: "
    f"temp {memory.temp_size_in_bytes / 1e9:.1f} GB, "
    f"arguments {memory.argument_size_in_bytes / 1e9:.1f} GB, "
    f"outputs {(memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9:.1f} GB more "
    f"(compiled in {time.time() - start:.0f} s)"
  )


if __name__ == "__main__":
  app.run(main)
