"""The planner: its counts against counts by hand and XLA's own, and what it prints.

Axes: T inner steps, B sequences, S tokens, D width.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import jobs
import pytest
from jax.experimental import pallas as pl

import datarater
import inner_loop
import meta_step
import transformer
from config import PRESETS, Config
from planner import flops, hlo, plan, targets
from runtime.cli import UserError

D = 8
X = jax.ShapeDtypeStruct((D, D), jnp.float32)
UNIT = 2 * D**3  # FLOPs of a matmul of two [D, D]


def _matmuls(function, *args):
  return flops.count(function, *args).matmuls / UNIT


def test_matmuls_of_loops_branches_and_calls():
  w3 = jax.ShapeDtypeStruct((3, D, D), jnp.float32)
  chain = lambda x, w3: jax.lax.scan(lambda c, w: (c @ w, None), x, w3)[0]
  assert _matmuls(chain, X, w3) == 3
  five_chains = lambda x, w3: jax.lax.fori_loop(0, 5, lambda i, c: chain(c, w3), x)
  assert _matmuls(five_chains, X, w3) == 15
  assert _matmuls(lambda x: jax.lax.fori_loop(2, 7, lambda i, c: c @ c, x), X) == 5
  branches = (lambda x: x @ x @ x, lambda x: x @ x, lambda x: x)
  assert _matmuls(lambda i, x: jax.lax.switch(i, branches, x), 0, X) == 2
  assert _matmuls(jax.jit(lambda x: jax.vmap(jnp.matmul, (0, None))(x, x[0])), w3) == 3
  wide = jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
  einsum = flops.count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), wide, wide)
  assert einsum.matmuls == 2 * 2 * 5 * 5 * 7
  image, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 3, 9, 9), (4, 3, 2, 2)))
  convolution = flops.count(lambda a, b: jax.lax.conv(a, b, (1, 1), "VALID"), image, kernel)
  assert convolution.matmuls == 2 * (4 * 8 * 8) * (3 * 2 * 2)


def test_dead_code_is_not_counted():
  def function(x):
    carry = jax.lax.scan(lambda c, _: ((c[0] @ c[0], c[1] @ c[1]), None), (x, x), None, 3)[0]
    return carry[0]

  assert _matmuls(function, X) == 3


def test_a_loop_of_unknown_length_is_reported():
  counted = flops.count(lambda n, x: jax.lax.fori_loop(0, n, lambda i, c: c @ c, x), 3, X)
  assert counted.matmuls == UNIT and counted.unknown_loops == 1


def test_custom_derivatives_are_followed():
  @jax.custom_vjp
  def f(x):
    return x @ x

  f.defvjp(lambda x: (f(x), x), lambda x, g: (g @ x @ x @ x,))
  assert _matmuls(f, X) == 1
  # The value itself is dead code.
  assert _matmuls(jax.grad(lambda x: f(x).sum()), X) == 3


def test_recomputation_is_counted_apart():
  def layers(wrap, x, w2):
    return jnp.sum(jax.lax.scan(lambda c, w: (wrap(c, w), None), x, w2)[0])

  w2 = jax.ShapeDtypeStruct((2, D, D), jnp.float32)
  block = lambda c, w: jnp.tanh(jnp.tanh(c @ w) @ w)  # two matmuls per layer
  plain, again = (
    flops.count(jax.grad(functools.partial(layers, wrap), 1), X, w2)
    for wrap in (block, jax.checkpoint(block))
  )
  assert (plain.matmuls, plain.recomputed) == (12 * UNIT, 0)
  assert again.matmuls - again.recomputed == plain.matmuls
  assert 2 * UNIT <= again.recomputed <= 4 * UNIT  # a block's last matmul is not needed


@pytest.mark.parametrize("estimated", [False, True])
def test_kernels_count_their_estimate_or_their_grid(estimated):
  def kernel(x, y):
    y[...] = x[...] @ x[...]

  estimate = pl.CostEstimate(flops=123, bytes_accessed=1, transcendentals=0) if estimated else None
  call = pl.pallas_call(
    kernel,
    grid=(4,),
    in_specs=[pl.BlockSpec((D, D), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((D, D), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((4 * D, D), jnp.float32),
    cost_estimate=estimate,
  )
  counted = flops.count(call, jax.ShapeDtypeStruct((4 * D, D), jnp.float32))
  assert counted.matmuls == (123 if estimated else 4 * UNIT)


def test_shards_add_up():
  mesh = jax.sharding.AbstractMesh((4,), ("data",))
  rows = jax.sharding.PartitionSpec("data")
  spread = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, None), out_specs=rows)
  assert _matmuls(spread, jax.ShapeDtypeStruct((4 * D, D), jnp.float32), X) == 4


def _small(**overrides):
  shape = dict(vocab_size=64, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=128)
  return transformer.TransformerConfig(**shape | overrides)


def _batch(*shape):
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  return transformer.Batch(tokens, tokens)


def test_agrees_with_xla_on_a_program_without_loops():
  model = transformer.language_model(_small())
  params = jax.eval_shape(model.init, jax.random.key(0))
  gradient = jax.jit(jax.grad(model.loss, has_aux=True))
  args = (params, jax.ShapeDtypeStruct((4,), jnp.float32), _batch(4, 16))
  counted = flops.count(gradient, *args)
  costs = gradient.lower(*args).compile().cost_analysis()
  assert counted.matmuls + counted.elementwise == pytest.approx(costs["flops"], rel=0.05)


@pytest.mark.parametrize("T", [1, 3])
def test_a_meta_step_computes_the_minimum(T):
  """Attention in blocks of one query computes only the visible pairs, as the minimum assumes."""
  S, B, B_outer = 6, 4, 2
  config = _small(query_block=1)
  rater = datarater.rater(dataclasses.replace(config, query_block=S))
  problem = meta_step.datarater_problem(transformer.language_model(config), rater)
  optimizer, H = meta_step.inner_adamw(), meta_step.paper_meta_optimizer()
  algorithm = meta_step.Algorithm(problem, optimizer, H, n_models=1, lifetime=T, mode="mixed")
  counted = flops.count(
    lambda eta, params, inner, outer: meta_step.meta_gradient(
      algorithm, eta, inner_loop.init(optimizer, params), inner, outer
    ),
    jax.eval_shape(rater.init, jax.random.key(0)),
    jax.eval_shape(problem.init_inner, jax.random.key(0)),
    _batch(T, B, S),
    _batch(B_outer, S),
  )
  least = flops.minimum(config, config, T, B, B_outer, S).total
  head = T * 3 * 2 * B * config.d_model  # the rater's
  assert counted.matmuls - counted.recomputed == pytest.approx(least + head, rel=1e-6)


def test_traffic_agrees_with_xla_and_multiplies_loops():
  def chain(unroll, x, ws):
    return jnp.mean(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws, unroll=unroll)[0])

  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32), (6, 32, 32))]
  compiled = [jax.jit(functools.partial(chain, n)).lower(*args).compile() for n in (6, 1)]
  unrolled, rolled = (hlo.traffic(c.as_text()) for c in compiled)
  assert unrolled.bytes == pytest.approx(compiled[0].cost_analysis()["bytes accessed"], rel=0.02)
  assert rolled.bytes > 3 * compiled[1].cost_analysis()["bytes accessed"]
  assert unrolled.unknown_loops == rolled.unknown_loops == 0


MODULE = """HloModule example

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %all-reduce.5 = f32[8,4]{1,0} all-reduce(%p), channel_id=3, to_apply=%sum
  ROOT %slice = f32[2,4]{1,0} slice(%all-reduce.5), slice={[0:2], [0:4]}
}

%body (s: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %s = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[2,4]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start), channel_id=1
  %wide = f32[8,4]{1,0} convert(%done)
  %scattered = f32[2,4]{1,0} fusion(%wide), kind=kCustom, calls=%all-reduce-scatter.1
  %narrow = bf16[2,4]{1,0:T(8,128)S(1)} convert(%scattered)
  ROOT %t = (s32[], bf16[2,4]{1,0}) tuple(%i, %narrow)
}

%condition (s.1: (s32[], bf16[2,4])) -> pred[] {
  %s.1 = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (state: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %state = (s32[], bf16[2,4]{1,0}) parameter(0)
  %loop = (s32[], /*index=1*/bf16[2,4]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %out = (s32[], bf16[2,4]{1,0}) tuple(%loop)
}
"""


def test_collectives_of_a_module_read_by_hand():
  traffic = hlo.traffic(MODULE)
  assert traffic.collectives == {
    "all-gather": (5, 5 * 8 * 4 * 2),
    "reduce-scatter": (5, 5 * 8 * 4 * 4),
  }
  per_iteration = 16 + 16 + 64  # the gather's start: its operand, both parts of its result
  per_iteration += 64 + 128  # to float32
  per_iteration += 128 + 32  # the fusion
  per_iteration += 32  # the last result stays on the chip
  assert traffic.bytes == 5 * per_iteration and traffic.unknown_loops == 0


def test_a_fusion_reads_only_its_slices_even_through_a_transpose():
  text = """HloModule jit_f

%fused (p: f32[8,4]) -> f32[1,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %t = f32[4,8]{1,0} transpose(%p), dimensions={1,0}
  ROOT %s = f32[1,8]{1,0} slice(%t), slice={[1:2], [0:8]}
}

ENTRY %main (a: f32[8,4]) -> f32[1,8] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %f = f32[1,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
}
"""
  assert hlo.traffic(text).bytes == 8 * 4 + 8 * 4


def _compiled(**values):
  fields = dict(
    devices=2,
    fits=True,
    arguments=1e9,
    outputs=2e9,
    temp=3e9,
    peak=6e9,
    work=flops.Flops(5e15, 1e15, 1e13),
    traffic=hlo.Traffic(1.2e12, {"all-gather": (4, 4 * 5e8)}, 0),
    estimate=None,
    seconds=12.0,
    refusal="",
  )
  return plan.Compiled(**fields | values)


PAPER = Config(**PRESETS["paper"])


def test_the_report_has_memory_traffic_flops_and_tokens():
  text = plan.report(PAPER, "v5e:1x2", 32_000, _compiled(), step_time=100.0)
  assert "arguments 1.00 GB + outputs 2.00 GB + temp 3.00 GB; peak 6.00 GB" in text
  assert "\nfits\n" in text and "DOES NOT FIT" not in text
  assert "all-gather             2.00 GB in 4" in text
  least = plan.minimum(PAPER, 32_000)
  needed = 8 * (sum(least) - 2 * least.kept)
  assert f"model FLOPs utilization {needed / (2 * 197e12 * 100):.1%} at 100 s" in text
  assert f"at least {1.2e12 / 819e9:.3g} s" in text
  assert f"{8000 * 8 * 2 * 128 * 2048:.4g} inner" in text


def test_the_minimum_of_the_paper_run_by_hand():
  """400m: 18 layers, 1280 wide, 10 heads of 128; T = 2; B = 128 of 2,048 tokens; V = 32,000."""
  weights = 18 * (4 * 1280 * 1280 + 2 * 1280 * 5120) + 32_000 * 1280
  attention = 4 * 18 * 1280 * (2048 * 2049 / 2) * 128
  F = 2 * 128 * 2048 * weights + attention
  least = plan.minimum(PAPER, 32_000)
  assert least.inner_gradients == pytest.approx(6 * F)
  assert least.hvps == pytest.approx(8 * F + attention)
  assert least.first_step == pytest.approx(3 * F) == least.outer_gradient
  assert least.kept == pytest.approx(3 * F + attention)
  F_rater = 2 * 128 * 2048 * 9 * (4 * 576**2 + 2 * 576 * 2304) + 4 * 9 * 576 * 2048**2 * 128
  assert least.rater == pytest.approx(6 * F_rater)


def test_a_refusal_of_the_compiler_is_reported():
  error = (  # libtpu 0.0.52
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (436.15G) exceeds available HBM (15.75G). HLO module: jit_f."
  )
  compiled = plan._refused(error, 4, flops.Flops(5e15), 1.0)
  assert not compiled.fits and compiled.peak == 436.15 * 2**30
  text = plan.report(PAPER, "v5e:2x2", 32_000, compiled)
  assert "DOES NOT FIT" in text and "(436.15G) exceeds available HBM (15.75G)" in text


def test_alternatives_need_less_memory_and_divide_the_batch():
  tried = list(plan.alternatives(PAPER, "v5e:8x8", None, data_shards=8))
  parts = [({"microbatches": k}, "v5e:8x8", None) for k in (2, 4, 8, 16)]
  assert tried == [*parts, ({}, "v5e:8x16", "population=8,data=16")]
  for changes, _, _ in tried:
    dataclasses.replace(PAPER, **changes)
  faster = dataclasses.replace(PAPER, mode="mixed_save", microbatches=4, inner_batch=96)
  changes = [change for change, _, _ in plan.alternatives(faster, "h100", None, 8)]
  assert changes == [{"mode": "mixed"}]


def test_chips_are_found_by_name():
  assert targets.chip("v5p:4x4x4").memory == 95e9 and targets.chip("h100").platform == "cuda"
  with pytest.raises(UserError, match="--target=v9 is unknown"):
    targets.chip("v9")


def test_a_plan_without_a_target_is_one_line(cache):
  refused = jobs.run("-m", cache, "planner")
  jobs.assert_one_line_error(refused, "name the hardware with --target")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_compilers_one_line_says_how_to_get_them(cache):
  refused = jobs.run("-m", cache, "planner", "--preset=paper", "--target=v5p:4x4x4")
  jobs.assert_one_line_error(refused, "make .venv-compile/ready")
