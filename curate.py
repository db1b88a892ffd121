"""Scores a corpus with a trained rater and marks what to keep: the paper's filtering.

  python curate.py --rater=runs/mine --data='texts/*.jsonl.gz' --output=curated --discard=0.5
  python curate.py --rater=runs/mine --data=crawl.parquet --output=curated --discard=0.5 \\
    --selection=top_k --batch_size=256
  python curate.py --rater=runs/mine --data=crawl.parquet --output=scored --score_only

The output has the records of the input, in order, in files part-00000.jsonl (or .parquet), ...:
every field as it was, then datarater_score phi_eta(x), datarater_quantile F(phi(x)), the share of
documents with a score <= this one, and datarater_keep. manifest.json says what was done,
rejects.jsonl which records are missing and why (numbers from 1; in JSONL, the line).

Selection, with B = --batch_size, the oversampled batch, and K = round((1 - discard) B):
  pointwise  keeps a document if a coin, a hash of (--seed, its text), falls below P_accept of its
             quantile. The outcome does not depend on how the work is split; duplicates are kept or
             dropped together.
  top_k      permutes all documents, cuts them into batches of B, and keeps the best K of each.

Started again with the same command, it resumes; the output is the same bytes. --data=demo is the
demo corpus as it is, without the corruption that train.py adds.

All devices of a host share each batch; with another number of devices, scores may round
differently. Several hosts run the same command with --coordinator (runtime/hosts.py) and share the
output folder (curation/local.py). With --runner it is an Apache Beam pipeline (curation/beam.py).
"""

import dataclasses
from pathlib import Path

from curation import local
from curation.job import Config
from runtime import cli, cpu, devices, hosts, sharding
from runtime.cli import UserError, check, option


@dataclasses.dataclass(frozen=True)
class Place:
  """Flags that say where a curation takes place."""

  output: str | None = option(
    None, "folder of the result; one that was interrupted is resumed", section="Where"
  )
  mesh: str | None = option(None, "data=N: devices that share each batch; default all")


def main() -> None:
  place, config, several = cli.read(Place), cli.read(Config), cli.read(hosts.Hosts)
  check(place.output is not None, "name a folder for the result with --output")
  output = Path(place.output)
  check(
    config.runner is None or several.coordinator is None,
    f"--runner={config.runner} and --coordinator are two ways to many machines: leave one out",
  )
  if config.runner is not None:
    try:
      from curation import beam
    except ImportError as error:
      raise UserError(f"--runner needs Apache Beam ({error}): pip install -e '.[beam]'") from None
    return beam.curate(config, output)
  cpu.keep_freed_memory()
  hosts.start(several)
  mesh = devices.local_mesh(devices.make_data_mesh(place.mesh))
  check(
    config.score_batch % mesh.shape["data"] == 0,
    f"--score_batch={config.score_batch} is not a multiple of the {mesh.shape['data']} devices of "
    "a host: change it, or give another --mesh=data=...",
  )
  with hosts.stop_together(), sharding.use_mesh(mesh):
    local.curate(config, output)


if __name__ == "__main__":
  cli.run(main, Place, Config, hosts.Hosts)
