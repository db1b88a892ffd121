"""The loss sharded over tokens and over the vocabulary, against the whole: test_loss runs this.

Prints the backends that agree. The kernels run in Pallas's plain interpreter: the one that watches
for races starts threads that deadlock across devices.

Axes: N tokens, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import assert_close
from jax.sharding import Mesh, PartitionSpec

from kernels import score_weighted_loss
from kernels.loss import BACKENDS

N, D, V = 36, 8, 40


def main():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "vocab"))
  rng = np.random.default_rng(0)
  point, along = (
    [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (V, D), (N,))] for _ in range(2)
  )
  targets = jnp.asarray(rng.integers(V, size=N), jnp.int32)
  cotangent = jnp.asarray(rng.normal(size=N), jnp.float32)

  def sharded(backend):
    def local(hidden, unembedding, weights, targets):
      loss, nll = score_weighted_loss(
        hidden, unembedding, targets, weights, backend=backend, vocab_axis="vocab"
      )
      return jax.lax.psum(loss, "data"), nll

    data, vocab = PartitionSpec("data"), PartitionSpec("vocab")
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(data, vocab, data, data),
      out_specs=(PartitionSpec(), data),
      check_vma=False,
    )

  def whole(hidden, unembedding, weights, targets):
    return score_weighted_loss(hidden, unembedding, targets, weights, backend="reference")

  def orders(function):
    def objective(*point):
      loss, nll = function(*point, targets)
      return loss + nll @ cotangent

    grad = jax.grad(objective, (0, 1, 2))
    return jax.jit(lambda *x: (objective(*x), grad(*x), jax.jvp(grad, x, tuple(along))[1]))(*point)

  expected = orders(whole)
  for backend in sorted(BACKENDS):
    assert_close(orders(sharded(backend)), expected, 1e-5)
    print(backend)


if __name__ == "__main__":
  main()
