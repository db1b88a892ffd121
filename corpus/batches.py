"""From documents to packed, shuffled, resumable batches of disjoint splits.

Axes: S sequence length in tokens, R sequences (rows) of a split, B rows of a batch.

  corpus = load_corpus(DataConfig(data=("texts/*.jsonl.gz",)), ".cache")  # the second call: instant
  batches = batch_iterator(corpus.splits["train"], seed=0, shape=(8, 2, 16), start_step=0)
  next(batches)                                                           # Batch of [8, 2, 16, S]

documents.py explains what `DataConfig.data` may name and how files become documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm

from corpus import demo, packing
from corpus.documents import (
  SPLITS,
  DataConfig,
  Document,
  Report,
  find_inputs,
  read_documents,
  split_of,
)
from corpus.tokenizer import Tokenizer, load_tokenizer
from runtime.cli import UserError
from transformer import Batch

DEMO_NOISE_LEVELS = np.arange(1, 9) / 10
CHUNK = 2**19  # characters that are tokenized and packed at once
FORMAT = 1  # of the cache; raise it when a file's content changes


class Split(NamedTuple):
  """Memory-mapped sequences of one split."""

  tokens: np.ndarray  # [R, S] uint16 or int32
  segments: np.ndarray  # [R, S] uint8
  source: np.ndarray  # [R] int32 index into Corpus.sources, of the longest piece in the sequence
  noise: np.ndarray  # [R] float32, of the same piece; nan: unknown


@dataclasses.dataclass(frozen=True)
class Corpus:
  splits: dict[str, Split]
  sources: tuple[str, ...]
  tokenizer: Tokenizer
  report: Report
  fingerprint: str
  folder: Path
  config: DataConfig

  def summary(self) -> str:
    """A few plain lines for the start of a run."""
    config, report = self.config, self.report
    skipped = ", ".join(f"{n} {reason}" for reason, n in report.skipped.items()) or "none"
    lines = [
      f"data {', '.join(config.data)}: {report.records} records, skipped: {skipped}",
      f"tokenizer {config.tokenizer}: {self.tokenizer.vocab_size} entries",
    ]
    if count := report.ignored_noise:
      lines.append(f"{config.noise_field}: no number from 0 to 1 in {count} records, ignored there")
    if names := ", ".join(config.outer_data):
      lines.append(f"outer data {names}: {report.in_outer_data} of its documents left out of data")
    noisy = self.splits["outer"].noise[:10_000] > 0
    if noisy.any():
      lines.append(
        f"note: {noisy.mean():.0%} of the outer sequences have a known noise level too: the rater "
        "learns to help on noisy text. For clean text, pass some as --outer_data"
      )
    for split in SPLITS:
      documents = sum(report.documents[split].values())
      tokens, rows = report.tokens.get(split, 0), report.sequences.get(split, 0)
      filled = tokens / max(rows * config.sequence_length, 1)
      sequences = f"{rows} sequences of {config.sequence_length} ({filled:.0%} filled)"
      lines.append(f"{split}: {documents} documents, {tokens} tokens, {sequences}")
    names = ", ".join(self.sources[:20]) + (", ..." if len(self.sources) > 20 else "")
    return "\n".join([*lines, f"{len(self.sources)} sources: {names}"])

  def validation_documents(self, limit: int | None = None) -> list[Document]:
    """The documents of the validation split as they were packed, at most `limit`, evenly spaced."""
    count = sum(self.report.documents["validation"].values())
    size = count if limit is None else min(limit, count)
    kept = set(np.linspace(0, count - 1, size).astype(int).tolist())
    with open(self.folder / "validation.documents", encoding="utf-8") as file:
      return [Document(**json.loads(line)) for i, line in enumerate(file) if i in kept]


def load_corpus(config: DataConfig, cache_dir: str | os.PathLike, progress: bool = True) -> Corpus:
  """Reads, splits, tokenizes and packs a corpus, or maps the files of an earlier call.

  The cache is a folder under `cache_dir`, named by a hash of DataConfig's fields, the tokenizer and
  the names, sizes and times of the input files (for the hub, the name alone). One rename makes it
  visible, so no later call uses the files of an interrupted one.
  """
  tokenizer = load_tokenizer(config.tokenizer)
  inputs = find_inputs(config.data), find_inputs(config.outer_data)
  own = {f.name: getattr(config, f.name) for f in dataclasses.fields(DataConfig)}
  parts = [FORMAT, own, tokenizer.fingerprint, inputs]
  fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
  folder = Path(cache_dir) / f"corpus-{fingerprint}"
  opened = lambda: _open_corpus(folder, config, tokenizer, fingerprint)
  if corpus := opened():
    return corpus
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temp:
    built = Path(temp) / "corpus"
    built.mkdir()
    _build_corpus(config, tokenizer, built, progress)
    try:
      os.rename(built, folder)
    except OSError:  # another process was first, or the folder there is broken
      if opened() is None:
        shutil.rmtree(folder)
        os.rename(built, folder)
  return opened()


def batch_iterator(
  split: Split, seed: int, shape: tuple[int, ...], start_step: int = 0, part: tuple[slice, ...] = ()
) -> Iterator[Batch]:
  """Endless batches of arrays [*shape, S], int32; batch t is a function of (seed, t) alone.

  Each epoch is a new permutation of the split. A run resumes with `start_step`, the number of
  batches used. With several hosts each reads its part, batch[part] over the axes of `shape`. The
  iterator's `close()` ends its prefetching threads at once.
  """
  rows, size = len(split.tokens), math.prod(shape)
  if rows < size:
    raise UserError(
      f"the split has {rows} sequences, one batch takes {size} {shape}: give more data, a shorter "
      "--sequence_length, a larger fraction for this split, or a smaller batch"
    )
  order = lambda step: drawn_rows(rows, seed, step * size, size).reshape(shape)[part]
  return row_batches(split, order, start_step)


def drawn_rows(rows: int, seed: int, start: int, count: int) -> np.ndarray:
  """Draws start, start + 1, ... [count] from the endless order of `seed` over rows 0 to rows - 1.

  Each epoch is a new permutation, each draw a function of (rows, seed, its number) alone.
  """
  import grain

  mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # seeds 0 and 1 share no epoch
  draws = (divmod(draw, rows) for draw in range(start, start + count))
  # The same order as grain's shuffle, which costs 15 us per sequence.
  shuffle = grain.experimental.index_shuffle
  chosen = [shuffle(i, rows - 1, seed=(mixed + epoch) % 2**32, rounds=4) for epoch, i in draws]
  return np.array(chosen, np.int64)


def row_batches(
  split: Split, rows_of_step: Callable[[int], np.ndarray], start_step: int = 0
) -> Iterator[Batch]:
  """Endless batches of the rows `rows_of_step(t)`, prefetched by threads."""
  import grain

  def batch(step: int) -> Batch:
    rows = rows_of_step(step)
    return Batch(split.tokens[rows].astype(np.int32), split.segments[rows].astype(np.int32))

  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  return iter(grain.MapDataset.range(start_step, 2**62).map(batch).to_iter_dataset(options))


def _row(config: DataConfig, tokenizer: Tokenizer) -> np.dtype:
  length = config.sequence_length
  token = "<u2" if tokenizer.vocab_size <= 2**16 else "<i4"
  fields = [("tokens", token, length), ("segments", "u1", length)]
  return np.dtype([*fields, ("source", "<i4"), ("noise", "<f4")])


def _open_corpus(
  folder: Path, config: DataConfig, tokenizer: Tokenizer, fingerprint: str
) -> Corpus | None:
  """The corpus in `folder`; None if there is none or its files are truncated."""
  try:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report, row, splits = Report(**meta["report"]), _row(config, tokenizer), {}
    for split in SPLITS:
      count, path = report.sequences[split], folder / f"{split}.rows"
      if path.stat().st_size != count * row.itemsize:
        return None
      rows = np.memmap(path, row, mode="r") if count else np.zeros(0, row)
      splits[split] = Split(*(rows[field] for field in Split._fields))
    sources = tuple(meta["sources"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return Corpus(splits, sources, tokenizer, report, fingerprint, folder, config)


def _build_corpus(config: DataConfig, tokenizer: Tokenizer, folder: Path, progress: bool) -> None:
  """Reads, tokenizes, packs and writes in one pass, chunk by chunk.

  A second thread gains nothing with byte tokens, as reading holds the interpreter's lock; BPE uses
  all cores by itself.
  """
  report, sources, S = Report(), {}, config.sequence_length
  report.tokens, report.sequences = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
  row = _row(config, tokenizer)
  waiting = {split: [] for split in SPLITS}  # (tokens_N, pieces_P) that are in no row yet
  first_fit = config.packing == "pack"
  window = packing.WINDOW * S if first_fit else 0  # tokens
  with contextlib.ExitStack() as stack:
    create = lambda name: stack.enter_context(open(folder / name, "wb"))
    files = {split: create(f"{split}.rows") for split in SPLITS}
    validation = create("validation.documents")
    documents = _assigned(config, report)
    documents = tqdm.tqdm(documents, "reading", unit=" documents", disable=not progress)
    for chunk in _chunks(documents):
      for split, document in chunk:
        report.documents[split][document.source] += 1
        sources.setdefault(document.source, len(sources))
        if split == "validation":
          validation.write(json.dumps(vars(document)).encode() + b"\n")
      encoded = tokenizer.encode([document.text for _, document in chunk])
      for split in SPLITS:
        pairs = zip(chunk, encoded, strict=True)
        own = [(document, tokens) for (name, document), tokens in pairs if name == split]
        if own:
          tokens_N, pieces_P = packing.pieces(own, sources, S, row)
          waiting[split].append((tokens_N, pieces_P))
          report.dropped_tokens += sum(len(tokens) for _, tokens in own) - len(tokens_N)
        size = sum(len(tokens_N) for tokens_N, _ in waiting[split])
        if size > window or (size and not chunk):
          tokens_N, pieces_P = map(np.concatenate, zip(*waiting[split], strict=True))
          rows_R, used = packing.pack(tokens_N, pieces_P, row, tokenizer.pad, first_fit, not chunk)
          rows_R.tofile(files[split])
          packed = int(pieces_P["length"][:used].sum())
          waiting[split] = [(tokens_N[packed:], pieces_P[used:])]
          report.tokens[split] += packed
          report.sequences[split] += len(rows_R)
  outer_share = 1 if config.outer_data else config.outer_fraction
  for split, share in zip(SPLITS, (1, outer_share, config.validation_fraction), strict=True):
    if share and not report.sequences[split]:
      total = sum(sum(counts.values()) for counts in report.documents.values())
      note = f" ({report.in_outer_data} left out: in outer_data)" if report.in_outer_data else ""
      raise UserError(
        f"the {split} split got none of the {total} documents of {', '.join(config.data)}{note}: "
        "give more data or a larger fraction for that split"
      )
  meta = {"sources": list(sources), "report": vars(report)}
  (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _assigned(config: DataConfig, report: Report) -> Iterator[tuple[str, Document]]:
  """Yields (split, document). Corrupts half of the demo corpus, never in the outer split."""
  reserved = set()
  if config.outer_data:
    for document in read_documents(dataclasses.replace(config, data=config.outer_data), report):
      reserved.add(split_of(document.text, config)[1])
      yield "outer", document
  for document in read_documents(config, report):
    split, bits = split_of(document.text, config)
    if bits in reserved:
      report.in_outer_data += 1
      continue
    if config.data == ("demo",):
      rng = np.random.default_rng(bits)
      corrupted = rng.random() < 0.5 and split != "outer"
      noise = float(rng.choice(DEMO_NOISE_LEVELS)) if corrupted else 0.0
      text = demo.corrupt(document.text, noise, rng)
      document = dataclasses.replace(document, text=text, noise=noise)
    yield split, document


def _chunks(pairs: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
  """Chunks of at least CHUNK characters, then the rest, then an empty chunk: the end."""
  chunk, size = [], 0
  for split, document in pairs:
    chunk.append((split, document))
    size += max(512, len(document.text))  # a short document takes memory too
    if size >= CHUNK:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk
  yield []
