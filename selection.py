"""Selection by score: the paper's two forms of filtering, and the policies that it compares.

  keep the best of a batch   `top_k_mask`, `top_k`                   batch level (section 1.6)
  P_accept(x)                `acceptance_probability`, `pointwise`   its point-wise equivalent
  a pool of N / (1 - rho)    `pool_size`, `select`                   the batch a policy trains on

Axes: n documents, B sequences of an oversampled batch, M sequences of a pool, of which N are kept;
rho is the discarded fraction.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

PERPLEXITY = ("pplx_bottom", "pplx_middle", "pplx_top")
POLICIES = ("none", "random", "datarater", *PERPLEXITY)


def top_k_mask(scores: jax.typing.ArrayLike, discard: float) -> jax.Array:
  """True for the best K = round((1 - discard) B) of scores [..., B]; ties go to the earlier.

  Raises:
    ValueError: unless 0 <= discard < 1 and K >= 1.
  """
  scores = jnp.asarray(scores)
  batch = scores.shape[-1]
  keep = round((1 - discard) * batch)
  if not 0 <= discard < 1 or keep < 1:
    raise ValueError(
      f"discard={discard} of a batch of {batch} keeps {keep} sequences; "
      "it must be in [0, 1) and keep at least one"
    )
  rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
  return rank < keep


def acceptance_probability(
  p: np.typing.ArrayLike, batch_size: np.typing.ArrayLike, keep: np.typing.ArrayLike
) -> np.ndarray:
  """Probability that batch-level top-K keeps a sequence whose score has the quantile p = F(phi(x)):

    P_accept = sum_{s=0}^{K-1} C(B-1, s) (1-p)^s p^(B-1-s) = I_p(B - K, K),

  since at most K - 1 of the other B - 1 may beat it. I is the regularized incomplete beta function.

  Args (broadcast against each other):
    p: quantiles in [0, 1].
    batch_size: B, the oversampled batch.
    keep: K, 1 <= K <= B.

  Returns: float64.
  """
  import scipy.special

  p, B, K = np.broadcast_arrays(np.asarray(p, np.float64), batch_size, keep)
  return np.where(K >= B, 1.0, scipy.special.betainc(np.maximum(B - K, 1), K, p))


def coin(seed: int, text: str) -> float:
  """Uniform in [0, 1): a hash of (seed, text), the same on every machine."""
  key = seed.to_bytes(8, "little", signed=True)
  digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
  return (int.from_bytes(digest, "little") >> 11) / 2**53


def quantiles(scores: np.ndarray, ordered: np.ndarray) -> np.ndarray:
  """F(score) [n] float32: the share of the `ordered` scores that are <= each score."""
  return (np.searchsorted(ordered, scores, side="right") / len(ordered)).astype(np.float32)


def pointwise(
  quantiles: np.ndarray, coins: np.ndarray, batch_size: int, discard: float
) -> np.ndarray:
  """Point-wise selection [n] bool: keeps a document if its coin is below P_accept(quantile)."""
  return coins < acceptance_probability(quantiles, batch_size, round((1 - discard) * batch_size))


def top_k(scores: np.ndarray, batch_size: int, discard: float, seed: int) -> np.ndarray:
  """Batch-level selection [n] bool.

  Permutes the documents (by seed and n alone), cuts them into batches of B and keeps the best
  round((1 - discard) B) of each; ties go to the earlier in that order. The last batch may be
  smaller; it keeps the same share, rounded.
  """
  order = np.random.default_rng(seed).permutation(len(scores))
  full = len(scores) // batch_size * batch_size
  keep = np.zeros(len(scores), bool)
  for batches in (order[:full].reshape(-1, batch_size), order[full:]):
    if batches.size and round((1 - discard) * batches.shape[-1]) > 0:
      keep[batches] = top_k_mask(scores[batches], discard)
  return keep


def pool_size(policy: str, batch: int, discard: float) -> int:
  """M = N / (1 - rho), rounded; N for `none`."""
  return batch if policy == "none" else max(batch, round(batch / (1 - discard)))


def select(policy: str, values_M: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
  """Indices [keep] of the kept sequences of a pool, in the pool's order; ties go to the earlier.

  `none` keeps all, `random` any, `datarater` those with the highest scores phi_eta, pplx_bottom,
  pplx_middle and pplx_top those with the lowest, middle and highest perplexity under a scorer LM.

  Args:
    values_M: scores for `datarater`, mean NLL for the perplexity policies; the others use only its
      length.
  """
  M = len(values_M)
  if policy == "none":
    order = np.arange(M)
  elif policy == "random":
    order = rng.permutation(M)
  else:
    descending = policy in ("datarater", "pplx_top")
    order = np.argsort(-values_M if descending else values_M, kind="stable")
  first = (M - keep) // 2 if policy == "pplx_middle" else 0
  return np.sort(order[first : first + keep])
