"""Meta-steps on 8 devices against one: test_sharding.py runs `python sharded_meta_step.py PART`.

Prints a line for each property that holds.

Axes: N inner models, T inner steps, B sequences, S tokens, C meta-steps of a call.
"""

import functools
import math
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import assert_close

import datarater
import meta_step
import transformer
from evaluation import pretrain
from runtime import cli, devices, sharding, workdir

N, T, B, S, C, V, D = 8, 2, 8, 12, 3, 40, 16
LARGE = 128  # all but norms and the head
LIFETIME = 8  # two of the eight are re-initialized in every meta-step


def setting(dtype, backend):
  """(init, algorithm, batches).

  Adam divides by the size of the gradient, however small: with the usual epsilons it amplifies a
  rounding error in float32 from the 7th digit to the 3rd. Larger ones avoid that.
  """
  attention = dict(attention_backend=backend) if backend.startswith("pallas") else {}
  config = transformer.TransformerConfig(V, D, 1, 2, 8, 24, dtype=dtype, **attention)
  rater, model = datarater.rater(config), transformer.language_model(config, backend)
  if dtype == "float64":  # Haiku draws in float32, and shards may round differently
    rater, model = (x._replace(init=functools.partial(uniform, x.init)) for x in (rater, model))
  algorithm = meta_step.Algorithm(
    problem=meta_step.datarater_problem(model, rater),
    inner_optimizer=meta_step.inner_adamw(
      0.01, **dict(eps_root=1e-4) if dtype == "float32" else {}
    ),
    meta_optimizer=meta_step.paper_meta_optimizer(
      0.01, 1, **dict(eps=1e-2) if dtype == "float32" else {}
    ),
    n_models=N,
    lifetime=LIFETIME,
  )

  def init(key, probe):
    move = lambda x: x + 0.1 * jax.random.uniform(key, x.shape, x.dtype)  # the head starts at 0
    return meta_step.init(algorithm, key, jax.tree.map(move, rater.init(key)), probe)

  rng = np.random.default_rng(0)

  def batch(*axes):
    tokens = rng.integers(V, size=(*axes, S), dtype=np.int32)
    segments = np.sort(rng.integers(1, 3, size=(*axes, S), dtype=np.int32))
    return transformer.Batch(tokens, segments)

  return init, algorithm, (batch(C, N, T, B), batch(C, N, B), batch(B))


def uniform(init, key):
  draw = lambda x: jax.random.uniform(key, x.shape, jnp.float64, -0.3, 0.3)
  return jax.tree.map(draw, jax.eval_shape(init, key))


@functools.cache
def initial(shape, dtype, backend):
  """(state, its shardings, batches, algorithm) on a mesh of `shape`."""
  mesh = over(*shape)
  init, algorithm, batches = setting(dtype, backend)
  axes = (None, "population", None, "data"), (None, "population", "data"), ("data",)
  key = jax.random.PRNGKey(0)
  placed = [
    sharding.from_host_slices(x, sharding.named(mesh, *a), x.tokens.shape)
    for x, a in zip(batches, axes, strict=True)
  ]
  with sharding.use_mesh(mesh):
    shapes = jax.eval_shape(init, key, batches[2])
    shardings = sharding.state_shardings(mesh, shapes, LARGE)
    state = jax.jit(init, out_shardings=shardings)(key, placed[2])
  return state, shardings, placed, algorithm


@functools.cache
def compiled(shape, dtype, backend):
  """(initial state, compiled program, its batches)."""
  mesh, (state, shardings, placed, algorithm) = over(*shape), initial(shape, dtype, backend)
  with sharding.use_mesh(mesh):
    step = functools.partial(meta_step.meta_steps, algorithm)
    out = shardings and (shardings, sharding.named(mesh))
    return state, jax.jit(step, out_shardings=out).lower(state, *placed).compile(), placed


def two_calls(shape, dtype="float64", backend="xla"):
  """Results of two calls of C meta-steps, and their program."""
  state, step, batches = compiled(shape, dtype, backend)
  first, metrics = step(state, *batches)
  second, _ = step(first, *batches)
  assert second.members.age.min() < T * C  # some were re-initialized
  return (state, first, second, metrics), step


def over(population, data):
  return devices.make_mesh(
    f"population={population},data={data}", N, jax.devices()[: population * data]
  )


def meshes():
  """With a run's own optimizers: the differences are rounding, or they would be larger."""
  jax.config.update("jax_enable_x64", True)
  expected, _ = two_calls((1, 1))
  for shape in ((1, 8), (8, 1), (2, 4)):
    actual, step = two_calls(shape)
    assert_close(actual, expected, 1e-7)
    print("same numbers on", *shape)
  check_collectives(step.as_text())
  print("gathers at most a parameter of a member")
  state = actual[2]
  theta = state.members.inner.params["transformer"]["embedding"]
  assert theta.addressable_shards[0].data.shape == (N // 2, V // 4, D)
  check_checkpoint(state)
  print("a checkpoint of 2 4 resumes on 8 1 and on one device")


def check_collectives(text):
  """No collective has an array larger than one parameter of one member."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf" = (\S+|\([^)]*\)) ({kinds})(?:-start)?\(", text)
  largest = {}
  for shapes, kind in found:
    for shape in re.findall(r"[a-z]+\d+\[([\d,]*)\]", shapes):
      size = math.prod(int(x) for x in shape.split(",") if x)
      largest[kind] = max(largest.get(kind, 0), size)
  parameter = D * 3 * D  # qkv; the embedding is V * D, smaller
  assert parameter > V * D and B * S * D > parameter and N * D * D > parameter
  assert {"all-gather", "all-reduce"} <= set(largest), largest
  assert max(largest.values()) <= parameter, largest
  assert "all-to-all" not in largest, largest


def check_checkpoint(state):
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = workdir.Checkpoints(Path(folder))
    checkpoints.save(1, state)
    checkpoints.close()
    after = []
    for shape in ((1, 1), (8, 1)):
      other, step, batches = compiled(shape, "float64", "xla")
      checkpoints = workdir.Checkpoints(Path(folder))
      restored = checkpoints.restore_latest(other)
      checkpoints.close()
      where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
      assert where(restored) == where(other)
      assert_close(restored, state, 0.0)
      after.append(step(restored, *batches))
    assert_close(*after, 1e-7)


def kernels():
  expected, _ = two_calls((1, 1), "float32")
  actual, _ = two_calls((2, 4), "float32", backend="pallas_tpu")
  assert_close(actual, expected, 1e-5)
  print("kernels under the mesh")
  for shape in ((1, 8), (8, 1)):  # what Haiku draws; (2, 4) is compared above
    assert_close(initial(shape, "float32", "xla")[0], expected[0], 1e-5)
  print("fresh members are the same on any mesh")


def layout():
  default = lambda n_models: tuple(devices.make_mesh(None, n_models).shape.values())
  assert [default(n) for n in (8, 6, 4, 5, 16)] == [(8, 1), (2, 4), (4, 2), (1, 8), (8, 1)]
  assert tuple(devices.make_mesh("data=4", 4).shape.items()) == (("population", 2), ("data", 4))
  assert tuple(devices.make_mesh("population=2", 4).shape.values()) == (2, 4)
  assert devices.make_mesh("population=1,data=3", 4).size == 3  # of the eight
  for spec, n_models, fix in (
    ("population=4,data=4", 4, "takes 16 devices, 8 are visible"),
    ("data=9", 4, "takes 9 devices"),
    ("population=8", 4, "does not divide --n_models=4"),
    ("rows=8", 4, "write it like population=2,data=4"),
    ("data=", 4, "write it like"),
    ("data=0", 4, "write it like"),
    ("data=4,data=2", 4, "write it like"),
  ):
    try:
      raise AssertionError(f"{spec} gave {devices.make_mesh(spec, n_models)}")
    except cli.UserError as error:
      assert fix in str(error) and "\n" not in str(error), error
  assert tuple(devices.make_data_mesh(None).shape.values()) == (1, 8)
  try:
    raise AssertionError(devices.make_data_mesh("population=2"))
  except cli.UserError as error:
    assert "write it like data=4" in str(error)
  print("meshes")

  two_by_four = over(2, 4)
  x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  both = sharding.named(two_by_four, "population", "data")
  assert sharding.host_slice(both, x.shape) == np.s_[0:2, 0:8, 0:3]
  placed = sharding.from_host_slices(x, both, x.shape)
  assert np.array_equal(placed, x) and placed.addressable_shards[0].data.shape == (1, 2, 3)

  shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)
  theta = dict(
    table=shape(8, 512, 128),  # V is the larger
    layers=shape(8, 18, 128, 512),  # the scanned axis of layers stays whole
    odd=shape(8, 513, 127),
    small=shape(8, 128),
  )
  members = meta_step.Member(theta, *[shape(8)] * 4)
  state = meta_step.MetaState(dict(w=shape(512, 1024)), members, shape(), shape(2), shape(8))
  where = jax.tree.map(lambda s: s.spec, sharding.state_shardings(two_by_four, state))
  spec = jax.sharding.PartitionSpec
  assert where.members.inner == dict(
    table=spec("population", "data", None),
    layers=spec("population", None, None, "data"),
    odd=spec("population", None, None),
    small=spec("population", None),
  )
  assert where.eta == dict(w=spec(None, "data")) and where.members.age == spec("population")
  assert where.key == where.step == where.probe_scores == spec()
  language_model = pretrain.LMState(dict(w=shape(512, 1024)), dict(mu=shape(512, 1024)), shape())
  where = jax.tree.map(lambda s: s.spec, sharding.state_shardings(two_by_four, language_model))
  assert where == pretrain.LMState(dict(w=spec(None, "data")), dict(mu=spec(None, "data")), spec())
  with sharding.use_mesh(two_by_four):
    spread = sharding.shard((x, np.arange(8), np.arange(7)), "data")
    kept = jax.jit(sharding.constrain_state)(
      jax.tree.map(lambda s: np.ones(s.shape, s.dtype), language_model)
    )
    whole = jax.jit(lambda x: sharding.replicate(2 * x))(spread[1])
  assert [a.sharding.spec for a in spread] == [spec(None), spec("data"), spec(None)]
  assert all(
    np.array_equal(a, b) for a, b in zip(spread, (x, np.arange(8), np.arange(7)), strict=True)
  )
  assert jax.tree.map(lambda a: a.sharding.spec, kept) == where
  assert whole.sharding.is_fully_replicated and np.array_equal(whole, 2 * np.arange(8))
  assert sharding.shard(x, "data") is x
  print("shardings")


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  parts = dict(meshes=meshes, kernels=kernels, layout=layout)
  parts[sys.argv[1]]()
