"""Is the meta-gradient of your own loss the derivative? A table, for the start of a fork.

  rows = check_meta_gradient(loss_fn, optimizer, params, metas, batches, outer_loss)
  assert all(row.ok for row in rows)

The gradient of outer_loss(theta_T) with respect to theta_0 and metas is compared, for each mode of
`inner_loop.unroll`, with central differences of the outer loss along random directions, one leaf at
a time, and with reverse mode. All in float64, whatever the inputs are: a loss that casts to float32
by itself will not come closer to the differences than that allows. Run it on a small problem: each
leaf costs some evaluations of the whole unroll.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import inner_loop

EXACT_MODES = ("reverse", "mixed", "mixed_save")
TO_REVERSE, TO_DIFFERENCES = 1e-8, 1e-4  # largest relative errors that pass
STEP = 1e-5  # of the differences, in units of a leaf's root mean square
NEGLIGIBLE = 1e-6  # a change of the outer loss, relative, below which differences are rounding


class Row(NamedTuple):
  mode: str
  to_reverse: float  # largest relative error of a leaf; nan: no gradient
  to_differences: float  # the same
  verdict: str  # "exact", or what is wrong and where

  @property
  def ok(self) -> bool:
    return self.verdict == "exact"


def check_meta_gradient(
  loss_fn: inner_loop.LossFn,
  optimizer: optax.GradientTransformation,
  params: Any,
  metas: Any,
  batches: Any,
  outer_loss: Callable[[Any], jax.Array],
  modes: Sequence[str] = EXACT_MODES,
  directions: int = 4,
  seed: int = 0,
) -> list[Row]:
  """Prints a table, a row a mode, and returns it.

  Args:
    loss_fn, optimizer, params, metas, batches: as `inner_loop.unroll` takes them.
    outer_loss: theta_T -> scalar.
    modes: of inner_loop.MODES; "first_order" is an approximation and will be called so.
    directions: random ones for each leaf.
  """
  with jax.enable_x64(True):
    wide = lambda x: jnp.asarray(x, jnp.float64 if _floating(x) else None)
    params, metas, batches = jax.tree.map(wide, (params, metas, batches))
    optimizer_state = optimizer.init(params)
    paths, structure = jax.tree.flatten_with_path({"params": params, "metas": metas})
    leaves = {i: x for i, (_, x) in enumerate(paths) if _floating(x)}
    names = [jax.tree_util.keystr(paths[i][0], simple=True, separator="/") for i in leaves]

    def objective(leaves, mode):
      at = structure.unflatten([leaves.get(i, x) for i, (_, x) in enumerate(paths)])
      state = inner_loop.InnerState(at["params"], optimizer_state)
      end, _ = inner_loop.unroll(loss_fn, optimizer, state, at["metas"], batches, mode)
      return outer_loss(end.params)

    loss = jax.jit(lambda leaves: objective(leaves, "reverse"))
    along, slopes, scale = _differences(loss, leaves, directions, seed)
    reverse, rows = None, []
    for mode in dict.fromkeys(("reverse", *modes)):
      try:
        gradient = jax.jit(jax.grad(lambda leaves, mode=mode: objective(leaves, mode)))(leaves)
      except (TypeError, NotImplementedError) as error:  # a rule that lacks this mode
        rows.append(Row(mode, np.nan, np.nan, str(error).splitlines()[0]))
        continue
      gradient = jax.device_get(list(gradient.values()))
      reverse = reverse or gradient
      mine = [[np.sum(g * d) for d in ds] for g, ds in zip(gradient, along, strict=True)]
      of_reverse = _errors(gradient, reverse, 1e-12 * scale)
      of_slopes = _errors(mine, slopes, NEGLIGIBLE * scale)
      verdict = _verdict(mode, names, gradient, of_reverse, of_slopes)
      rows.append(Row(mode, max(of_reverse), max(of_slopes), verdict))
  rows = [row for row in rows if row.mode in modes]
  print(f"{'mode':14s} {'to reverse':>11s} {'to differences':>15s}  verdict")
  for row in rows:
    print(f"{row.mode:14s} {row.to_reverse:11.1e} {row.to_differences:15.1e}  {row.verdict}")
  return rows


def _differences(objective, leaves, directions, seed):
  """(directions, slopes of the objective along them: [leaf][direction], size of the objective)."""
  rng, along, slopes = np.random.default_rng(seed), [], []
  for i, leaf in leaves.items():
    size = float(jnp.sqrt(jnp.mean(jnp.square(leaf)))) or 1.0  # a head may start at zero
    along.append([size * rng.normal(size=leaf.shape) for _ in range(directions)])
    moved = lambda d, i=i, leaf=leaf: objective(leaves | {i: leaf + d})
    slopes.append([float(moved(STEP * d) - moved(-STEP * d)) / (2 * STEP) for d in along[-1]])
  return along, slopes, abs(float(objective(leaves)))


def _verdict(mode, names, gradient, of_reverse, of_slopes):
  for name, g in zip(names, gradient, strict=True):
    if not np.isfinite(g).all():
      return f"not finite at {name}"
  if mode == "first_order":
    return "an approximation by design"
  if not np.max(of_slopes) <= TO_DIFFERENCES:  # nan is larger
    return f"not the derivative at {names[np.argmax(of_slopes)]}"
  if not np.max(of_reverse) <= TO_REVERSE:
    return f"not what reverse mode gives at {names[np.argmax(of_reverse)]}"
  for name, g in zip(names, gradient, strict=True):
    if name.startswith("metas") and not g.any():
      return f"no gradient reaches {name}"  # and the outer loss doesn't move: an integer path?
  return "exact"


def _errors(actual, expected, negligible):
  """|a - b| / max(|a|, |b|, negligible) of each pair of vectors."""
  norm = lambda *vectors: max(float(np.linalg.norm(np.ravel(v))) for v in vectors)
  pairs = zip(map(np.asarray, actual), map(np.asarray, expected), strict=True)
  return [norm(a - b) / max(norm(a, b), negligible) for a, b in pairs]


def _floating(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
