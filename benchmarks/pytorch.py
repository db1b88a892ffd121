"""Our programs and the same ones in eager PyTorch, in turn, in one process under one allocator.

  pip install torch
  taskset -c 0 python -m benchmarks.pytorch                           # training steps
  taskset -c 0 python -m benchmarks.pytorch --programs=T2,T8        # meta-steps
  taskset -c 0 python -m benchmarks.pytorch --programs=T2 --compile  # and torch.compile

`tiny`, `mini` and `small` are steps of `evaluate.py`'s training: N 16, S 128, V 258. `T2` is the
meta-step of `benchmarks.meta_step`: 4 layers, D 256, N 8, S 128, V 512, one inner model, AdamW,
`mode="mixed_save"` against PyTorch's reverse over reverse (its fastest mode: it has no
forward-over-reverse attention kernel). Prints minimum and median CPU seconds, and the ratios of
both to PyTorch's.

Axes: N sequences, S tokens, D model width, H heads, K head width, V vocabulary.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

import datarater
import meta_step
import transformer
from evaluation import pretrain
from kernels.loss import BACKENDS
from runtime import cli, cpu
from runtime.cli import option

S = 128
PROGRAMS = ("tiny", "mini", "small", "T2", "T8")


@dataclasses.dataclass(frozen=True)
class Settings:
  programs: tuple[str, ...] = option(
    ("tiny", "mini", "small"), "sizes to train, or a meta-step", choices=PROGRAMS, section="In turn"
  )
  rounds: int = option(7, "of all variants of a program", at_least=1)
  seconds: float = option(1.0, "of a measurement, at least", at_least=0)
  loss_backend: tuple[str, ...] = option(
    ("xla", "reference"), "of a training step", choices=BACKENDS
  )
  compile: bool = option(False, "also torch.compile of the traced meta-gradient")


def main() -> None:
  s = cli.read(Settings)
  cpu.keep_freed_memory()
  threads = cpu.cores()
  torch.set_num_threads(threads)
  print(f"jax {jax.__version__}, PyTorch {torch.__version__}, {threads} cores, float32")
  for program in s.programs:
    runs = meta_steps(int(program[1:]), s.compile) if program[0] == "T" else training(program, s)
    compare(program, runs, s)


def compare(program: str, runs: dict[str, Callable], s: Settings) -> None:
  """Times the runs in turn; PyTorch's is the unit."""
  calls = {}
  for name, run in runs.items():
    run()
    start = time.process_time()
    run()
    calls[name] = max(1, math.ceil(s.seconds / (time.process_time() - start)))
  seconds = {name: [] for name in runs}
  for _ in range(s.rounds):
    for name, run in runs.items():
      start = time.process_time()
      for _ in range(calls[name]):
        run()
      seconds[name].append((time.process_time() - start) / calls[name])
  low, middle = ({name: of(x) for name, x in seconds.items()} for of in (min, statistics.median))
  for name in runs:
    print(
      f"{program:6} {name:16} min {low[name] * 1e3:8.1f} ms  median {middle[name] * 1e3:8.1f} ms"
      f"  of PyTorch {low[name] / low['PyTorch']:.2f} {middle[name] / middle['PyTorch']:.2f}",
      flush=True,
    )


def training(size: str, s: Settings) -> dict[str, Callable]:
  """Gradient, clipping and Adam of one batch."""
  config, recipe = transformer.preset(size, 258), pretrain.RECIPES[size]._replace(steps=10_000)
  tokens_NS = jax.random.randint(jax.random.key(0), (recipe.batch, S), 0, config.vocab_size)
  batches = transformer.Batch(tokens_NS[None], jnp.ones_like(tokens_NS)[None])
  runs = {}
  for backend in s.loss_backend:
    model = transformer.language_model(config, backend)
    state = [pretrain.init(model, recipe, seed=0)]

    def run(model=model, state=state):
      state[0], losses = jax.block_until_ready(
        pretrain.train_steps(model, recipe, state[0], batches)
      )

    runs[f"here, {backend}"] = run
  params = [p.requires_grad_() for p in parameters(config)]
  adam = torch.optim.Adam(params, lr=1e-3)
  batch = torch.tensor(jax.device_get(tokens_NS)).long()

  def eager():
    adam.zero_grad()
    language_model_loss(config, params, batch, fused=True).mean().backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    adam.step()

  return runs | {"PyTorch": eager}


def meta_steps(T: int, compiled: bool) -> dict[str, Callable]:
  """One meta-step of one inner model with T inner updates."""
  config = transformer.TransformerConfig(512, 256, 4, 4, 64, 1024)
  N, V = 8, config.vocab_size
  model, rater = transformer.language_model(config), datarater.rater(config)
  algorithm = meta_step.Algorithm(
    problem=meta_step.datarater_problem(model, rater, save_activations=True),
    inner_optimizer=meta_step.inner_adamw(),
    meta_optimizer=meta_step.paper_meta_optimizer(),
    n_models=1,
    lifetime=10**6,
    mode="mixed_save",
  )
  key = jax.random.key(0)
  tokens = jax.random.randint(key, (1, T + 1, N, S), 0, V)
  batches = transformer.Batch(tokens, jnp.ones_like(tokens))
  inner, outer = (jax.tree.map(lambda x, i=i: x[:, i], batches) for i in (slice(T), T))
  probe = jax.tree.map(lambda x: x[0], outer)
  init = jax.jit(lambda key: meta_step.init(algorithm, key, rater.init(key), probe))
  state = [init(key)]
  step = jax.jit(lambda state, *x: meta_step.meta_step(algorithm, state, *x), donate_argnums=0)

  def here():
    state[0], metrics = jax.block_until_ready(step(state[0], inner, outer))

  data = torch.tensor(jax.device_get(tokens[0])).long()
  eta, theta = parameters(config, head=True), parameters(config)
  zeros = [[torch.zeros_like(p) for p in theta] for _ in range(2)]

  def gradient(data, eta, theta, m, v):
    eta = [x.detach().requires_grad_() for x in eta]
    weights_TN = scores(config, eta, data[:T].flatten(0, 1)).view(T, N).softmax(-1)
    p = [x.detach().requires_grad_() for x in theta]
    for t in range(T):
      loss = (weights_TN[t] * language_model_loss(config, p, data[t])).sum()
      p, m, v = adamw(p, torch.autograd.grad(loss, p, create_graph=True), m, v, t + 1)
    outer_loss = language_model_loss(config, p, data[T]).mean()
    return torch.autograd.grad(outer_loss, eta), p, m, v

  def meta_step_with(gradient):
    rater_state = [torch.optim.AdamW([x.clone().requires_grad_() for x in eta], lr=1e-4)]
    inner_state = [(theta, *zeros)]

    def run():
      (optimizer,) = rater_state
      raters = optimizer.param_groups[0]["params"]
      grads, *inner_state[0] = gradient(data, [x.detach() for x in raters], *inner_state[0])
      inner_state[0] = [[x.detach() for x in xs] for xs in inner_state[0]]
      for x, g in zip(raters, grads, strict=True):
        x.grad = g
      torch.nn.utils.clip_grad_norm_(raters, 0.01)
      optimizer.step()

    return run

  runs = {"here": here, "PyTorch": meta_step_with(gradient)}
  if compiled:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(gradient)(data, eta, theta, *zeros)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    inductor = torch.compile(graph, dynamic=False)
    runs["torch.compile"] = meta_step_with(torch.no_grad()(inductor))
  return runs


def parameters(config: transformer.TransformerConfig, head: bool = False) -> list[torch.Tensor]:
  """Embedding [V, D], final norm [D], [score head [D],] and 6 arrays per layer."""
  D, L, width = config.d_model, config.n_layers, config.n_heads * config.head_dim
  normal = lambda a, b, scale=1.0: torch.randn(a, b) * scale / math.sqrt(a)
  params = [torch.randn(config.vocab_size, D) / math.sqrt(D), torch.ones(D)]
  params += [torch.zeros(D)] if head else []
  for _ in range(L):
    params += [torch.ones(D), normal(D, 3 * width), normal(width, D, (2 * L) ** -0.5)]
    params += [torch.ones(D), normal(D, config.d_ff), normal(config.d_ff, D, (2 * L) ** -0.5)]
  return params


def hidden(config, params, tokens_NS, causal: bool, fused: bool) -> torch.Tensor:
  """Transformer of transformer.py, one document a sequence: [N, S, D]."""
  H, K = config.n_heads, config.head_dim
  angles = torch.arange(S)[:, None] * 10_000.0 ** (-torch.arange(0, K, 2) / K)
  cos, sin = angles.cos(), angles.sin()

  def rms_norm(x, scale):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale

  def rotate(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

  x = F.embedding(tokens_NS, params[0]) * math.sqrt(config.d_model)
  layers = params[-6 * config.n_layers :]
  for i in range(0, len(layers), 6):
    norm_1, qkv, out, norm_2, up, down = layers[i : i + 6]
    q, k, v = (
      y.unflatten(-1, (H, K)).transpose(1, 2) for y in (rms_norm(x, norm_1) @ qkv).chunk(3, -1)
    )
    q, k = rotate(q), rotate(k)
    if fused:
      mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:  # the fused one has no second derivative
      scores = q * K**-0.5 @ k.transpose(-1, -2)
      if causal:
        scores = scores + torch.full((S, S), -torch.inf).triu(1)
      mixed = scores.softmax(-1) @ v
    x = x + mixed.transpose(1, 2).flatten(2) @ out
    x = x + F.gelu(rms_norm(x, norm_2) @ up, approximate="tanh") @ down
  return rms_norm(x, params[1])


def language_model_loss(config, params, tokens_NS, fused: bool = False) -> torch.Tensor:
  """The mean NLL of each sequence [N]."""
  logits_NSV = hidden(config, params, tokens_NS, True, fused)[:, :-1] @ params[0].T
  nll = F.cross_entropy(logits_NSV.flatten(0, 1), tokens_NS[:, 1:].flatten(), reduction="none")
  return nll.view(len(tokens_NS), -1).mean(1)


def scores(config, params, tokens_NS) -> torch.Tensor:
  """The rater's scores [N]."""
  return hidden(config, params, tokens_NS, False, fused=False).mean(1) @ params[2]


def adamw(params, grads, m, v, step: int):
  """`meta_step.inner_adamw`, out of place: (params, m, v)."""
  m = [0.9 * x + 0.1 * g for x, g in zip(m, grads, strict=True)]
  v = [0.99 * x + 0.01 * g * g for x, g in zip(v, grads, strict=True)]
  scale_m, scale_v = 1 / (1 - 0.9**step), 1 / (1 - 0.99**step)
  params = [
    p - 1e-3 * x * scale_m / (y * scale_v + 1e-12).sqrt()
    for p, x, y in zip(params, m, v, strict=True)
  ]
  return params, m, v


if __name__ == "__main__":
  cli.run(main, Settings)
