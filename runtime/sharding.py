"""How arrays are sharded over a mesh of devices: pure functions, most for use in traced code.

On one device they do nothing. On several, a run is traced under `jax.set_mesh(mesh)`. XLA
partitions the axis `data` from the shardings of the inputs. `population` is partitioned by hand
(`over_population`): members run in turn, and a loop over a sharded axis would gather them.
Gradients, weights and losses refer to the global batch.

Axes: N inner models, B sequences, V vocabulary, D model width.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("population", "data")
REPLICATED, DATA = PartitionSpec(), PartitionSpec("data")
LARGE = 2**16  # elements; arrays of one model from this size on are sharded over `data`


def axis_size(axis: str) -> int:
  """Size of an axis of the mesh in use; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def over_population(function: Callable) -> Callable:
  """Runs `function(shared, *members) -> (members, sums)` on each population shard.

  Arrays of members have the axis N first. `sums` over a shard's members are added up over all
  shards; until then, shards do not wait for each other.
  """

  def on_shard(shared, *members):
    members, sums = function(shared, *members)
    return members, jax.lax.psum(sums, "population")

  def spread(shared, *members):
    if axis_size("population") == 1:
      return function(shared, *members)
    by_member = PartitionSpec("population")
    in_specs, out_specs = (REPLICATED, *[by_member] * len(members)), (by_member, REPLICATED)
    return _shard_map(on_shard, in_specs, out_specs, {"population"})(shared, *members)

  return spread


def local_index(i: jax.Array, n: int) -> jax.Array:
  """Index of inner model i of n within its population shard."""
  size = axis_size("population")
  return i if size == 1 else i % (n // size)


def constrain_batch(x_B: jax.Array) -> jax.Array:
  """Shards the first axis of x over `data`, so that XLA gathers a layer's parameters rather than
  its activations."""
  if axis_size("data") == 1 or len(x_B) % axis_size("data"):
    return x_B
  return jax.lax.with_sharding_constraint(x_B, DATA)


def lookup(table_VD: jax.Array, index_B: jax.Array) -> jax.Array:
  """table[index] on each data shard for its sequences; XLA alone would gather all gradients."""
  if len(index_B) % axis_size("data"):  # a model is initialized on a batch of one
    return table_VD[index_B]
  gather = _by_data_shard(lambda table, index: table[index], (REPLICATED, DATA), DATA)
  return gather(table_VD, index_B)


def shard_loss(loss: Callable) -> Callable:
  """Runs `loss(hidden [n, D], unembedding [V, D], targets [n], weights [n]) -> (sum, nll [n])` on
  each data shard for its tokens, with the whole unembedding. XLA cannot partition the kernels, and
  would loop over a sharded axis."""

  def on_shard(*arguments):
    total, nll = loss(*arguments)
    return (jax.lax.psum(total, "data") if axis_size("data") > 1 else total), nll

  return _by_data_shard(on_shard, (DATA, REPLICATED, DATA, DATA), (REPLICATED, DATA))


def by_sequence(function: Callable) -> Callable:
  """Runs `function` of arrays [B, ...] on each data shard for its sequences: XLA cannot partition
  kernels."""

  def spread(*arrays):
    where = REPLICATED if len(arrays[0]) % axis_size("data") else DATA
    return _by_data_shard(function, (where,) * len(arrays), where)(*arrays)

  return spread


def _by_data_shard(function, in_specs, out_specs):
  """Outside `over_population`, every population shard repeats the computation."""

  def spread(*arguments):
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    return (_shard_map(function, in_specs, out_specs, axes) if axes else function)(*arguments)

  return spread


def _shard_map(function, in_specs, out_specs, axes):
  # check_vma is off: Pallas does not declare which axes its outputs vary over.
  options = dict(in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
  return jax.shard_map(function, **options)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
  """Context in which a run's programs are traced; does nothing on one device."""
  return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def constrain_state(state: Any) -> Any:
  """Shards a state by `state_shardings`, inside a traced function."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:  # 0 outside `use_mesh`
    return state
  return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def replicate(x: Any) -> Any:
  """Gives every device the whole arrays, inside a traced function."""
  alone = jax.sharding.get_abstract_mesh().size <= 1
  return x if alone else jax.lax.with_sharding_constraint(x, REPLICATED)


def state_shardings(mesh: Mesh, state: Any, large: int = LARGE) -> Any:
  """Shardings of a NamedTuple of arrays or ShapeDtypeStructs; None on one device.

  The field `members` (axis N first) is sharded over `population`. Arrays of at least `large`
  elements in `members`, `eta`, `params` or `opt_state` are sharded over `data` along their largest
  axis that it divides. All else is replicated.
  """
  if mesh.size == 1:
    return None

  def shard(x, lead=()):
    shape = x.shape[len(lead) :]
    axes = [None] * len(shape)
    fitting = [i for i, size in enumerate(shape) if size % mesh.shape["data"] == 0]
    if math.prod(shape) >= large and fitting:
      axes[max(fitting, key=lambda i: shape[i])] = "data"
    return named(mesh, *lead, *axes)

  rules = dict.fromkeys(("eta", "params", "opt_state"), shard)
  rules["members"] = lambda x: shard(x, ("population",))
  replicated = lambda _: named(mesh)
  fields = {k: jax.tree.map(rules.get(k, replicated), v) for k, v in state._asdict().items()}
  return type(state)(**fields)


def named(mesh: Mesh, *axes: str | None) -> NamedSharding | None:
  """Shards the leading axes of an array over these axes of the mesh; None on one device."""
  return NamedSharding(mesh, PartitionSpec(*axes)) if mesh.size > 1 else None


def shapes(x: Any) -> Any:
  """Shapes and dtypes to compile a program for, with the arrays' shardings on several devices. On
  one device, a restored array has a sharding and a fresh one has none; the program must not differ.
  """
  several = jax.sharding.get_mesh().size > 1
  of = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if several else None)
  return jax.tree.map(of, x)


def shard(x: Any, *axes: str | None) -> Any:
  """Shards arrays that every host holds in full: their leading axes over the named axes of the mesh
  in use, where these divide them. On one device, returns them unchanged."""
  mesh = jax.sharding.get_mesh()
  if mesh.size <= 1:
    return x

  def spread(x):
    divides = lambda axis, size: axis and size % mesh.shape[axis] == 0
    fits = [axis if divides(axis, x.shape[i]) else None for i, axis in enumerate(axes)]
    return jax.make_array_from_callback(x.shape, named(mesh, *fits), lambda index: x[index])

  return jax.tree.map(spread, x)


def host_slice(sharding: NamedSharding | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The slice of an array [*shape] that covers the shards of this host's devices."""
  if sharding is None:
    return tuple(slice(0, size) for size in shape)
  shards = sharding.addressable_devices_indices_map(shape).values()
  starts, stops = zip(*(_bounds(index, shape) for index in shards), strict=True)
  return tuple(map(slice, np.min(starts, 0).tolist(), np.max(stops, 0).tolist()))


def from_host_slices(part: Any, sharding: NamedSharding | None, shape: tuple[int, ...]) -> Any:
  """Global arrays [*shape], of which each host passes its `host_slice`."""
  if sharding is None:
    return part
  first = np.array([s.start for s in host_slice(sharding, shape)])
  local = lambda index: tuple(map(slice, *(_bounds(index, shape) - first).tolist()))
  make = lambda x: jax.make_array_from_callback(shape, sharding, lambda index: x[local(index)])
  return jax.tree.map(make, part)


def _bounds(index, shape):
  """[starts, stops] of a shard's slices, one per axis."""
  return np.transpose([s.indices(size)[:2] for s, size in zip(index, shape, strict=True)])
