"""One mesh of devices for a run, and where each array lies on it.

  population   inner models: N / population of them on each shard, trained one after the other
  data         the sequences of a batch; parameters and optimiser states that are large (FSDP)

`--mesh=population=2,data=4` is eight devices. On one device nothing here does anything. On several
the run is traced under `jax.set_mesh(mesh)`; `data` is partitioned by XLA from the shardings of the
inputs, `population` by hand (`over_population`), as members in turn would be a loop over a sharded
axis. Gradients, weights and losses are those of whole batches, wherever their shards are.

Axes: N inner models, B sequences, V vocabulary, D model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cli import check

AXES = ("population", "data")
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
  check(
    population * data == count,
    f"--mesh=population={population},data={data} takes {population * data} devices, {count} are "
    "visible: let the product be their number",
  )
  check(
    n_models % population == 0,
    f"--mesh=population={population} does not divide --n_models={n_models}",
  )
  return jax.make_mesh((population, data), AXES, (AxisType.Auto,) * 2, devices=devices)


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
      in_specs=(PartitionSpec(), *[members] * len(of_members)),
      out_specs=(members, PartitionSpec()),
      axis_names={"population"},
      check_vma=False,  # Pallas outputs do not say over which axes they vary
    )(shared, *of_members)

  return spread


def over_data(x_B: jax.Array) -> jax.Array:
  """x, its first axis over `data`: keeps activations with their sequences, so that XLA gathers the
  parameters of a layer and not the activations."""
  if shards("data") == 1:
    return x_B
  return jax.lax.with_sharding_constraint(x_B, PartitionSpec("data"))


def whole(x: jax.Array) -> jax.Array:
  """x, gathered from the shards of `data`: a table that is looked up in, which XLA would rather
  leave sharded and gather all that was looked up."""
  if shards("data") == 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def loss_over_data(loss: Callable) -> Callable:
  """`loss(hidden [n, D], unembedding [V, D], targets [n], weights [n]) -> (sum, nll [n])`, run by
  each data shard on its own tokens with the whole unembedding: no array of all tokens' logits, no
  loop over a sharded axis, and kernels that XLA cannot partition."""

  def shard(*arguments):
    total, nll = loss(*arguments)
    return jax.lax.psum(total, "data"), nll

  def spread(*arguments):
    if shards("data") == 1:
      return loss(*arguments)
    data, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
      shard,
      in_specs=(data, whole, data, data),
      out_specs=(whole, data),
      axis_names={"data"},
      check_vma=False,
    )(*arguments)

  return spread


def state_shardings(mesh: Mesh, state: Any, large: int = LARGE) -> Any:
  """Shardings of a meta_step.MetaState of arrays or ShapeDtypeStructs.

  Members over `population`; the largest axis of a large array over `data`, where it divides.
  """

  def shared(x, lead=()):
    shape = x.shape[len(lead) :]
    axes = [None] * len(shape)
    fitting = [i for i, size in enumerate(shape) if size % mesh.shape["data"] == 0]
    if math.prod(shape) >= large and fitting:
      axes[max(fitting, key=lambda i: shape[i])] = "data"
    return NamedSharding(mesh, PartitionSpec(*lead, *axes))

  of_member = lambda x: shared(x, ("population",))
  how = {"eta": shared, "meta_opt": of_member, "inner": of_member}
  how |= {name: of_member for name in ("age", "until_reset", "skipped")}
  replicated = lambda _: NamedSharding(mesh, PartitionSpec())
  return type(state)(
    **{k: jax.tree.map(how.get(k, replicated), v) for k, v in state._asdict().items()}
  )
