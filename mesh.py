"""One mesh of devices for a run, and where each array lies on it.

  population   inner models: N / population of them on each shard, trained one after the other
  data         the sequences of a batch; parameters and optimiser states that are large (FSDP)

`--mesh=population=2,data=4` is eight devices. On one device nothing here does anything. On several
the run is traced under `jax.set_mesh(mesh)`; `data` is partitioned by XLA from the shardings of the
inputs, `population` by hand (`over_population`), as members in turn would be a loop over a sharded
axis. Gradients, weights and losses are those of whole batches, wherever their shards are.

Axes: N inner models, B sequences, V vocabulary, D model width.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cli import check

AXES = ("population", "data")
WHOLE, DATA = PartitionSpec(), PartitionSpec("data")
LARGE = 2**16  # elements of an array of one model, from which on it is sharded over `data`


def make_mesh(spec: str | None, n_models: int, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh that `spec` describes, "population=2,data=4"; an axis left out has the rest.

  Default: all visible devices; population as large as divides both their number and n_models.

  Raises:
    UserError: the spec cannot be read, or does not fit the devices or the number of inner models.
  """
  devices = list(jax.devices() if devices is None else devices)
  count, sizes = len(devices), {}
  for part in (spec or "").split(",") if spec else ():
    axis, _, size = part.partition("=")
    check(
      axis in AXES and axis not in sizes and size.isdecimal() and int(size) >= 1,
      f"--mesh={spec} cannot be read at {part!r}: write it like population=2,data=4",
    )
    sizes[axis] = int(size)
  if "population" not in sizes:
    rest = count // sizes.get("data", 1)
    sizes["population"] = math.gcd(max(rest, 1), n_models)
  population = sizes["population"]
  data = sizes.setdefault("data", max(count // population, 1))
  size = population * data
  check(
    size == count or size < count and jax.process_count() == 1,
    f"--mesh=population={population},data={data} takes {size} devices, {count} are visible: let "
    "the product be their number, or on one host less",
  )
  check(
    n_models % population == 0,
    f"--mesh=population={population} does not divide --n_models={n_models}",
  )
  # Neighbours on a pod's network, as far as they go: 8 by 8 of 4 x 4 x 4 chips splits an axis.
  grid = mesh_utils.create_device_mesh(
    (population, data), devices[:size], allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def make_data_mesh(spec: str | None, devices: Sequence[Any] | None = None) -> Mesh:
  """The same for a job that trains or runs one model: "data=4"."""
  check(
    "population" not in (spec or ""),
    f"--mesh={spec}: only train.py has a population; write it like data=4",
  )
  return make_mesh(spec, 1, devices)


def of_this_host(mesh: Mesh) -> Mesh:
  """Those of its devices that are this host's, for what each host does by itself. None lacks one:
  of several hosts, make_mesh takes all devices."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  return Mesh(np.array(own).reshape(1, -1), AXES, axis_types=mesh.axis_types)


def shards(axis: str) -> int:
  """Size of an axis of the mesh under which the caller is traced; 1 where there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def over_population(function: Callable) -> Callable:
  """`function(shared, *of_members) -> (of_members, sums)`, run by each population shard on its own.

  The arrays of members have the axis N first; what `function` sums over its members comes back as
  the sum over all. Shards do not wait for each other before that.
  """

  def shard(shared, *of_members):
    of_members, sums = function(shared, *of_members)
    return of_members, jax.lax.psum(sums, "population")

  def spread(shared, *of_members):
    if shards("population") == 1:
      return function(shared, *of_members)
    members = PartitionSpec("population")
    return jax.shard_map(
      shard,
      in_specs=(WHOLE, *[members] * len(of_members)),
      out_specs=(members, WHOLE),
      axis_names={"population"},
      check_vma=False,  # Pallas outputs do not say over which axes they vary
    )(shared, *of_members)

  return spread


def place_of_member(i: jax.Array, n: int) -> jax.Array:
  """Where inner model i of n stands among those of its population shard."""
  size = shards("population")
  return i if size == 1 else i % (n // size)


def over_data(x_B: jax.Array) -> jax.Array:
  """x, its first axis over `data`: keeps activations with their sequences, so that XLA gathers the
  parameters of a layer and not the activations."""
  if shards("data") == 1 or len(x_B) % shards("data"):
    return x_B
  return jax.lax.with_sharding_constraint(x_B, DATA)


def lookup(table_VD: jax.Array, index_B: jax.Array) -> jax.Array:
  """table[index], of each data shard's own sequences; XLA would gather the gradients of all."""
  if len(index_B) % shards("data"):  # a few: a model is initialised on a batch of one
    return table_VD[index_B]
  return _by_data_shard(lambda table, index: table[index], (WHOLE, DATA), DATA)(table_VD, index_B)


def loss_over_data(loss: Callable) -> Callable:
  """`loss(hidden [n, D], unembedding [V, D], targets [n], weights [n]) -> (sum, nll [n])`, run by
  each data shard on its own tokens with the whole unembedding: no array of all tokens' logits, no
  loop over a sharded axis, and kernels that XLA cannot partition."""

  def shard(*arguments):
    total, nll = loss(*arguments)
    return (jax.lax.psum(total, "data") if shards("data") > 1 else total), nll

  return _by_data_shard(shard, (DATA, WHOLE, DATA, DATA), (WHOLE, DATA))


def by_sequence(function: Callable) -> Callable:
  """`function` of arrays [B, ...], run by each data shard on its own sequences: for kernels, which
  XLA cannot partition."""

  def spread(*arrays):
    where = WHOLE if len(arrays[0]) % shards("data") else DATA
    return _by_data_shard(function, (where,) * len(arrays), where)(*arrays)

  return spread


def _by_data_shard(function, in_specs, out_specs):
  """Outside of `over_population` all its shards do the same."""

  def spread(*arguments):
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not axes:
      return function(*arguments)
    how = dict(in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
    return jax.shard_map(function, **how)(*arguments)

  return spread


def use(mesh: Mesh) -> contextlib.AbstractContextManager:
  """The context in which a run's programs are traced; of one device, none."""
  return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def keep(state: Any) -> Any:
  """A state, inside a traced function, laid out as `state_shardings` says."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return state
  return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def whole(x: Any) -> Any:
  """Arrays, inside a traced function, that every device is to have whole."""
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, WHOLE)


def state_shardings(mesh: Mesh, state: Any, large: int = LARGE) -> Any:
  """Shardings of a meta_step.MetaState or pretrain.LMState of arrays or ShapeDtypeStructs; None on
  one device.

  Members over `population`; the largest axis of a large array over `data`, where it divides.
  """
  if mesh.size == 1:
    return None

  def shared(x, lead=()):
    shape = x.shape[len(lead) :]
    axes = [None] * len(shape)
    fitting = [i for i, size in enumerate(shape) if size % mesh.shape["data"] == 0]
    if math.prod(shape) >= large and fitting:
      axes[max(fitting, key=lambda i: shape[i])] = "data"
    return NamedSharding(mesh, PartitionSpec(*lead, *axes))

  of_member = lambda x: shared(x, ("population",))
  how = dict.fromkeys(("eta", "params", "opt_state"), shared)
  how |= dict.fromkeys(("meta_opt", "inner", "age", "until_reset", "skipped"), of_member)
  replicated = lambda _: NamedSharding(mesh, WHOLE)
  return type(state)(
    **{k: jax.tree.map(how.get(k, replicated), v) for k, v in state._asdict().items()}
  )


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding | None:
  """Of arrays whose leading axes lie over the named axes of the mesh; None on one device."""
  return NamedSharding(mesh, PartitionSpec(*axes)) if mesh.size > 1 else None


def put(x: Any, *axes: str | None) -> Any:
  """Arrays that every host has whole, spread over the mesh in use: the leading axes over the named
  ones, where these divide them. As they are on one device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty or mesh.size == 1:
    return x

  def spread(x):
    divides = lambda axis, size: axis and size % mesh.shape[axis] == 0
    fits = [axis if divides(axis, x.shape[i]) else None for i, axis in enumerate(axes)]
    where = NamedSharding(mesh, PartitionSpec(*fits))
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return jax.tree.map(spread, x)


def part_of_host(where: NamedSharding | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The part of an array [*shape] that this host's devices hold (the box around their shards)."""
  if where is None:
    return tuple(slice(0, size) for size in shape)
  shards = where.addressable_devices_indices_map(shape).values()
  ends = [[s.indices(size)[:2] for s, size in zip(index, shape, strict=True)] for index in shards]
  return tuple(
    slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*ends, strict=True)
  )


def place(part: Any, where: NamedSharding | None, shape: tuple[int, ...]) -> Any:
  """Arrays [*shape] on all hosts' devices, of which this host gives its `part_of_host`."""
  if where is None:
    return part
  first = [s.start for s in part_of_host(where, shape)]

  def shard(x, index):
    ends = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    return x[tuple(slice(a - f, b - f) for (a, b), f in zip(ends, first, strict=True))]

  whole = lambda x: jax.make_array_from_callback(shape, where, lambda index: shard(x, index))
  return jax.tree.map(whole, part)
