"""Scores a corpus with a trained rater and marks the documents to keep: the paper's filtering.

  python curate.py --rater=runs/demo --data='texts/*.jsonl.gz' --output=curated --discard=0.5
  python curate.py --rater=runs/demo --data=crawl.parquet --output=curated --discard=0.5 \\
    --selection=top_k --batch_size=256
  python curate.py --rater=runs/demo --data=crawl.parquet --output=scored --score_only

Writes the input's records in order to part-00000.jsonl (or .parquet), ..., each with its own fields
and three more:
  datarater_score     phi_eta(x)
  datarater_quantile  F(phi_eta(x)), the share of documents with a score <= this one
  datarater_keep      true or false
manifest.json describes the run; rejects.jsonl lists the unusable records with their number (from 1;
in JSONL, the line) and the reason.

Selection, with B = --batch_size, the oversampled batch, and K = round((1 - discard) B):
  pointwise  keeps a document if a coin, a hash of (--seed, its text), falls below P_accept of its
             quantile. The outcome does not depend on how the work is split; duplicates are kept or
             dropped together.
  top_k      permutes all documents, cuts them into batches of B, and keeps the best K of each.

The same command resumes an interrupted run; the output is byte-identical. --data=demo is the clean
demo corpus, without the corruption that train.py adds.

All devices of a host share each batch; with a different number of devices, scores may round
differently. Several hosts run the same command with --coordinator and a shared --output folder.
--runner runs the same selection as an Apache Beam pipeline (curation/beam.py).
"""

import dataclasses
from pathlib import Path

from curation import local
from curation.job import Config
from runtime import cli, cpu, devices, hosts, programs, sharding
from runtime.cli import check, option, user_error


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a curation runs and writes."""

  output: str | None = option(
    None, "folder for the result; resumes an interrupted run", section="Output"
  )
  cache_dir: str = option(".cache", "folder of compiled programs")
  mesh: str | None = option(None, "data=N: devices that share each batch; default: all")


def main() -> None:
  place, config, many = cli.read(Place), cli.read(Config), cli.read(hosts.Hosts)
  check(place.output is not None, "name a folder for the result with --output")
  output = Path(place.output)
  check(
    config.runner is None or many.coordinator is None,
    f"--runner={config.runner} and --coordinator exclude each other: leave one out",
  )
  programs.keep(place.cache_dir)
  if config.runner is not None:
    with user_error(ImportError, "--runner needs Apache Beam", "pip install -e '.[beam]'"):
      from curation import beam
    return beam.curate(config, output)
  cpu.keep_freed_memory()
  hosts.start(many)
  mesh = devices.local_mesh(devices.make_data_mesh(place.mesh))
  with hosts.stop_together(), sharding.use_mesh(mesh):
    local.curate(config, output)


if __name__ == "__main__":
  cli.run(main, Place, Config, hosts.Hosts)
