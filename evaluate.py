"""Trains language models on the text that each selection policy keeps, and compares them.

  python evaluate.py --workdir=runs/eval --rater=runs/demo --discard=0.5
  python evaluate.py --workdir=runs/eval --rater=runs/demo --sweep_discard=0.1,0.25,0.5,0.75,0.9
  python evaluate.py --workdir=runs/paper --rater=runs/paper-rater --models=50m,150m,400m --dry_run

Data, tokenizer and splits are the rater's, so neither the rater nor its inner models have seen the
documents of the results. All policies start from the same parameters, see the same number of
tokens and follow the same schedule. A run that is started again resumes; with the same --jobs and
--mesh the result is bit-identical (with others, rounding differs). The workdir holds runs/ (a
folder per model: curve.jsonl, checkpoints/), scores/, and at the end table.md, results.json and
figures.

A hash of the texts halves the validation split: `selection` chooses rho, `validation` is reported.
Where noise levels are known (the demo), both hold only clean documents, and `validation_noisy` has
the noisy documents of the second half.
"""

import dataclasses
from pathlib import Path

import jax

import selection
from evaluation import multiple_choice
from evaluation.plan import Config, costs, main_runs, plan_text, scorer_run, sweep_runs
from evaluation.runs import open_inputs, rate, train_run
from runtime import cli, cpu, devices, hosts, programs, sharding
from runtime.cli import check, option
from runtime.workdir import open_workdir
from runtime.workers import Workers


@dataclasses.dataclass(frozen=True)
class Place:
  """Flags that do not change the results."""

  workdir: str | None = option(None, "new folder (required), or one to resume", section="Where")
  cache_dir: str = option(".cache", "folder of tokenized corpora and compiled programs")
  jobs: int = option(1, "models trained at once, each on its own core (CPUs only)", at_least=1)
  mesh: str | None = option(None, "data=N, the devices that share each batch; default all")
  dry_run: bool = option(False, "print the runs and their FLOPs, and stop")


def main() -> None:
  place, config = cli.read(Place), cli.read(Config)
  check(place.workdir is not None or place.dry_run, "name a folder for the run with --workdir")
  cpu.keep_freed_memory()
  if place.dry_run:
    print(plan_text(config))
    return
  programs.keep(place.cache_dir)
  hosts.start(cli.read(hosts.Hosts))
  mesh = make_mesh(config, place.mesh, place.jobs)
  with hosts.stop_together(), sharding.use_mesh(mesh):
    evaluate(config, Path(place.workdir), Path(place.cache_dir), place.jobs)


def make_mesh(config: Config, spec: str | None, jobs: int) -> jax.sharding.Mesh:
  """All devices share each batch; with several jobs, each has its own device."""
  if jobs > 1:
    check(spec is None, f"--mesh={spec} shares a model among devices, --jobs={jobs} does not")
    return devices.make_data_mesh(None, jax.devices()[:1])
  mesh = devices.make_data_mesh(spec)
  n = mesh.shape["data"]
  for size, recipe in costs(config).recipes.items():
    problem = f"a batch of {recipe.batch} sequences ({size}) is not a multiple of the {n} devices"
    check(recipe.batch % n == 0, f"{problem}: give another --batch or --mesh=data=...")
  return mesh


def evaluate(config: Config, workdir: Path, cache_dir: Path, jobs: int = 1) -> None:
  """Trains the models of the plan that are not trained yet, and writes the comparison."""
  from evaluation import compare  # with Matplotlib

  inputs = open_inputs(config, cache_dir)
  fingerprint = f"{inputs.corpus.fingerprint} {inputs.rater.fingerprint}"
  hosts.leader_first(lambda: open_workdir(workdir, config, fingerprint))
  hosts.say(inputs.corpus.summary())
  hosts.say(plan_text(config))
  arguments = config, workdir, cache_dir
  workers = Workers(arguments, jobs)
  if "datarater" in config.policies or config.sweep_discard:
    rate("datarater", *arguments)  # with all cores
  sweep, discard = sweep_runs(config), config.discard
  perplexity = set(config.policies) & set(selection.PERPLEXITY)
  first = ([scorer_run(config)] if perplexity else []) + sweep
  if first:
    workers.do("training the sweep and the perplexity scorer", train_run, first)
  if sweep:
    discard = compare.best_discard(workdir, sweep)
    hosts.say(f"discard fraction with the lowest NLL on `selection`: {discard:g}")
  if perplexity:
    rate("perplexity", *arguments)
  workers.do("training", train_run, main_runs(config, discard))
  workers.close()
  if hosts.is_leader():
    tasks = {
      task: {"questions": len(questions), "chance": multiple_choice.chance(questions)}
      for task, questions in inputs.questions.items()
    }
    runs = main_runs(config, discard)
    print(compare.write(workdir, runs, sweep_runs(config), costs(config), tasks))


if __name__ == "__main__":
  cli.run(main, Place, Config, hosts.Hosts)
