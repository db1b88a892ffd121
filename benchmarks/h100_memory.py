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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import datarater
import meta_step
import transformer

FLAGS = flags.FLAGS
flags.DEFINE_integer("T", 2, "inner steps")
flags.DEFINE_string("mode", "mixed", "mode of differentiation")
flags.DEFINE_string("model", "400m", "preset of the inner model")
flags.DEFINE_string("rater", "50m", "preset of the rater; empty: weights are given, no rater")
flags.DEFINE_integer("batch", 8, "sequences of the inner and outer batch")
flags.DEFINE_integer("seq", 2048, "tokens a sequence")
flags.DEFINE_boolean("donate", False, "update in place: outputs wait in temp until inputs are dead")
flags.DEFINE_integer("vocab", 32_000, "vocabulary")

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # an H100 SXM, from its datasheet


def main(_):
  jax.config.update("jax_platforms", "cpu")
  target = topologies.get_topology_desc(
    platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
  )
  here = SingleDeviceSharding(target.devices[0])
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
