"""The loss beside other libraries: gradient by hidden and unembedding, on equal data.

  python -m benchmarks.device.peers --group=jax --size=16384x1280x32000
  python -m benchmarks.device.peers --group=torch --size=16384x1280x32000

Hidden and W have variance 1 / D: the logits of a fresh model, not peaked ones. Time is the minimum
of 5 calls; the rate counts the 3 necessary matmuls. `error` compares d hidden with float32 matmuls
on 256 tokens. W is bfloat16; for our backends a float32 parameter, with the cast in their time.

Axes: N tokens, D model width, V vocabulary.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

# The riskiest last: a fault ends the process's context.
JAX = ("pallas_gpu", "xla", "tokamax_chunked", "jax_dense_bf16", "tokamax_dense")
TORCH = ("torch_dense", "liger", "cce_exact", "cce", "torch_compiled")
CHECKED = 256  # tokens whose error is computed


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", required=True, help="NxDxV")
  parser.add_argument("--group", required=True, choices=["jax", "torch"])
  args = parser.parse_args()
  N, D, V = map(int, args.size.split("x"))
  names, measure = (TORCH, with_torch) if args.group == "torch" else (JAX, with_jax)
  for name in names:
    row = f"PEER {args.size} {name:16}"
    try:
      seconds, error, memory = measure(name, N, D, V)
      rate = 3 * 2 * N * D * V / seconds
      print(
        f"{row} {seconds * 1e3:9.2f} ms  {rate / 1e12:6.0f} TFLOP/s  error {error:.1e}  "
        f"temporary {memory / 1e9:.2f} GB",
        flush=True,
      )
    except Exception as error:  # a failure is a result
      print(f"{row} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)


def with_jax(name: str, N: int, D: int, V: int) -> tuple[float, float, int]:
  """(seconds, relative error, bytes of temporary memory)."""
  import jax
  import jax.numpy as jnp

  from kernels import score_weighted_loss

  key = jax.random.key(0)
  h_ND = (jax.random.normal(key, (N, D)) / D**0.5).astype(jnp.bfloat16)
  w_VD = jax.random.normal(jax.random.fold_in(key, 1), (V, D)) / D**0.5
  y_N = jax.random.randint(key, (N,), 0, V)
  if name in ("pallas_gpu", "xla"):
    weights_N = jnp.full(N, 1 / N)
    loss = lambda h, w: score_weighted_loss(h, w, y_N, weights_N, backend=name)[0]
  else:
    w_VD = w_VD.astype(jnp.bfloat16)
    if name == "jax_dense_bf16":

      def loss(h, w):
        z_NV = jnp.matmul(h, w.T, preferred_element_type=jnp.float32)
        target_N = jnp.take_along_axis(z_NV, y_N[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(z_NV, -1) - target_N)

    else:
      import tokamax

      # Without an implementation, Tokamax runs dense.
      which = "chunked_xla" if name == "tokamax_chunked" else "xla"
      fused = partial(tokamax.linear_softmax_cross_entropy_loss, implementation=which)
      loss = lambda h, w: fused(h, y_N, w, reduction="mean")
      w_VD = w_VD.T  # its layout is [D, V]
  run = jax.jit(jax.grad(loss, (0, 1))).lower(h_ND, w_VD).compile()
  seconds, (d_h, _) = fastest(lambda: run(h_ND, w_VD), jax.block_until_ready)
  k = min(N, CHECKED)
  table = (w_VD.T if name.startswith("tokamax") else w_VD).astype(jnp.float32)
  with jax.default_matmul_precision("float32"):
    q = jax.nn.softmax(h_ND[:k].astype(jnp.float32) @ table.T)
    expected = (q.at[jnp.arange(k), y_N[:k]].add(-1) @ table) / N
  error = jnp.linalg.norm(d_h[:k] - expected) / jnp.linalg.norm(expected)
  return seconds, float(error), run.memory_analysis().temp_size_in_bytes


def with_torch(name: str, N: int, D: int, V: int) -> tuple[float, float, int]:
  """(seconds, relative error, bytes of temporary memory)."""
  import torch

  cuda = torch.cuda.is_available()
  device = "cuda" if cuda else "cpu"
  torch.manual_seed(0)
  draw = lambda *shape: (torch.randn(*shape, device=device) / D**0.5).to(torch.bfloat16)
  h_ND, w_VD = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
  y_N = torch.randint(V, (N,), device=device)
  if name == "liger":
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss
  elif name.startswith("cce"):
    from cut_cross_entropy import linear_cross_entropy

    # By default it skips blocks of small gradients.
    exact = dict(filter_eps=None) if name == "cce_exact" else {}
    loss = partial(linear_cross_entropy, **exact)
  else:
    loss = lambda h, w, y: torch.nn.functional.cross_entropy((h @ w.T).float(), y)
    loss = torch.compile(loss) if name == "torch_compiled" else loss
  if cuda:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
  seconds, (d_h, _) = fastest(
    lambda: torch.autograd.grad(loss(h_ND, w_VD, y_N), (h_ND, w_VD)),
    lambda _: torch.cuda.synchronize() if cuda else None,
  )
  memory = torch.cuda.max_memory_allocated() - before if cuda else 0
  k = min(N, CHECKED)
  h, w = h_ND[:k].detach().float(), w_VD.detach().float()
  q = torch.softmax(h @ w.T, -1)
  q[torch.arange(k), y_N[:k]] -= 1
  expected = (q @ w) / N
  return seconds, float((d_h[:k].float() - expected).norm() / expected.norm()), memory


def fastest(run: Callable, wait: Callable, repeats: int = 5) -> tuple[float, tuple]:
  """(seconds of the fastest call, the gradients)."""
  gradients = run()
  wait(gradients)
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    wait(run())
    seconds.append(time.perf_counter() - start)
  return min(seconds), gradients


if __name__ == "__main__":
  main()
