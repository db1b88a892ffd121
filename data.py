"""Corpora -> documents -> tokens -> packed, shuffled, resumable batches; disjoint splits.

Axes: S sequence length in tokens, R sequences (rows) of a split, B rows of a batch.

  corpus = load_corpus(DataConfig(data=("texts/*.jsonl.gz",)), ".cache")  # the second call: instant
  batches = batch_iterator(corpus.splits["train"], seed=0, shape=(8, 2, 16), start_step=0)
  next(batches)                                                           # Batch of [8, 2, 16, S]

What `DataConfig.data` may name, and how files become documents: documents.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tokenizers
import tqdm

import demo_corpus
from documents import (  # the reading side: `data.DataConfig` and so on are the same objects
  SPLITS,
  DataConfig,
  DataError,
  Document,
  Report,
  find_inputs,
  one_line,
  read_documents,
  split_of,
)
from transformer import Batch

MIN_REMAINDER = 16  # tokens; a shorter rest of a longer document is dropped
DEMO_NOISE_LEVELS = np.arange(1, 9) / 10
FORMAT = 1  # of the cache; raise it when anything that is written changes


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

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def summary(self) -> str:
    """A few plain lines for the start of a run."""
    report, length = self.report, self.config.sequence_length
    skipped = ", ".join(f"{n} {reason}" for reason, n in report.skipped.items())
    lines = [
      f"data {', '.join(self.config.data)}: {report.records} records, skipped: {skipped or 'none'}",
      f"tokenizer {self.config.tokenizer}: {self.vocab_size} entries",
    ]
    if self.config.outer_data:
      names = ", ".join(self.config.outer_data)
      lines.append(f"outer data {names}: {report.in_outer_data} of its documents left out of data")
    noisy = self.splits["outer"].noise[:10_000] > 0
    if noisy.any():
      lines.append(
        f"note: {noisy.mean():.0%} of the outer sequences have a known noise level too: the rater "
        "learns what helps on noisy text. Name clean text with --outer_data for what helps on that"
      )
    for split in SPLITS:
      tokens, rows = report.tokens.get(split, 0), report.sequences.get(split, 0)
      lines.append(
        f"{split}: {sum(report.documents[split].values())} documents, {tokens} tokens, {rows} "
        f"sequences of {length} ({tokens / max(rows * length, 1):.0%} filled)"
      )
    shown = ", ".join(self.sources[:20]) + (", ..." if len(self.sources) > 20 else "")
    return "\n".join([*lines, f"{len(self.sources)} sources: {shown}"])

  def validation_documents(self, limit: int | None = None) -> list[Document]:
    """The texts of the validation split (at most `limit`, evenly spaced), as they were packed."""
    count = sum(self.report.documents["validation"].values())
    kept = (
      range(count) if limit is None else np.linspace(0, count - 1, min(limit, count)).astype(int)
    )
    kept = set(kept)
    with open(self.folder / "validation.documents", encoding="utf-8") as file:
      records = [json.loads(line) for i, line in enumerate(file) if i in kept]
    return [Document(**record) for record in records]


def load_corpus(config: DataConfig, cache_dir: str | os.PathLike, progress: bool = True) -> Corpus:
  """Reads, splits, tokenises and packs a corpus, or maps what an earlier call has written.

  The cache is a folder under `cache_dir` named by the configuration, the tokenizer and the names,
  sizes and times of the input files (a hub data set: by its name only). It appears by one rename,
  so that an interrupted call leaves nothing that is used.
  """
  tokenizer = load_tokenizer(config.tokenizer)
  fingerprint = _fingerprint(config, tokenizer)
  folder = Path(cache_dir) / f"corpus-{fingerprint}"
  corpus = _open_corpus(folder, config, tokenizer, fingerprint)
  if corpus is None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temp:
      (Path(temp) / "corpus").mkdir()
      _build_corpus(config, tokenizer, Path(temp), progress)
      try:
        os.rename(Path(temp) / "corpus", folder)
      except OSError:  # another process was first, or what lies there is broken
        if _open_corpus(folder, config, tokenizer, fingerprint) is None:
          shutil.rmtree(folder)
          os.rename(Path(temp) / "corpus", folder)
    corpus = _open_corpus(folder, config, tokenizer, fingerprint)
  return corpus


def batch_iterator(
  split: Split,
  seed: int,
  shape: tuple[int, ...],
  start_step: int = 0,
  part: tuple[slice, ...] = (),
) -> Iterator[Batch]:
  """Endless batches of arrays [*shape, S], int32; batch t is a function of (seed, t) alone.

  Each epoch is a new permutation of the split. A run resumes with `start_step` = the batches it has
  used. Of several hosts each reads its `part` of the same batches: batch[part], of axes of `shape`.
  The result has a `close()` that ends its prefetching threads at once.
  """
  rows, size = len(split.tokens), math.prod(shape)
  if rows < size:
    raise DataError(
      f"the split has {rows} sequences, fewer than one batch of {size} ({shape}) takes: give more "
      "data, a shorter sequence_length, a larger fraction for this split, or a smaller batch"
    )
  order = lambda step: drawn_rows(rows, seed, step * size, size).reshape(shape)[part]
  return row_batches(split, order, start_step)


def drawn_rows(rows: int, seed: int, start: int, count: int) -> np.ndarray:
  """The draws start, start + 1, ... [count] of the endless order of `seed` over rows 0..rows-1.

  Each epoch is a new permutation, each draw a function of (rows, seed, its number) alone.
  """
  mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # seeds 0 and 1 share no epoch
  draws = (divmod(draw, rows) for draw in range(start, start + count))
  # What grain's own shuffle does, without its cost of 15 us a sequence.
  chosen = [
    grain.experimental.index_shuffle(i, rows - 1, seed=(mixed + epoch) % 2**32, rounds=4)
    for epoch, i in draws
  ]
  return np.array(chosen, np.int64)


def row_batches(
  split: Split, rows_of_step: Callable[[int], np.ndarray], start_step: int = 0
) -> Iterator[Batch]:
  """Endless batches: of step t the rows that `rows_of_step(t)` names, formed ahead by threads."""

  def batch(step: int) -> Batch:
    rows = rows_of_step(step)
    return Batch(split.tokens[rows].astype(np.int32), split.segments[rows].astype(np.int32))

  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  return iter(grain.MapDataset.range(start_step, 2**62).map(batch).to_iter_dataset(options))


def document_batches(
  documents: Iterable[Document], tokenizer: Tokenizer, sequence_length: int, batch_size: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
  """Documents in order, one piece a row, to be scored.

  Yields (Batch of [B, S], index of each row's document [B] int32, its tokens [B] int32); the rows
  that fill up the last batch have index -1 and no tokens. Every document has at least one row.
  """
  pieces = (
    (index, piece)
    for index, _, tokens in _encoded(enumerate(documents), tokenizer)
    for piece in _cut(tokens, sequence_length)
  )
  while chunk := list(itertools.islice(pieces, batch_size)):
    tokens = np.full((batch_size, sequence_length), tokenizer.pad, np.int32)
    index, length = np.full(batch_size, -1, np.int32), np.zeros(batch_size, np.int32)
    for row, (document, piece) in enumerate(chunk):
      tokens[row, : len(piece)], index[row], length[row] = piece, document, len(piece)
    segments = (np.arange(sequence_length) < length[:, None]).astype(np.int32)
    yield Batch(tokens, segments), index, length


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Of "bytes": 0-255 are the UTF-8 bytes, 256 is padding, 257 starts a document.

  From a tokenizer.json: its own start token (or end-of-text token) starts a document, else one
  entry is added; padding reuses that entry (`Batch.segments` tells them apart).
  """

  vocab_size: int
  bos: int
  pad: int
  fingerprint: str
  model: tokenizers.Tokenizer | None = None  # None: bytes

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Each text as int32 tokens, the start token first. A lone surrogate counts as '?'."""
    raw = [text.encode("utf-8", "replace") for text in texts]
    if self.model is None:
      ids = [np.frombuffer(text, np.uint8) for text in raw]
    else:
      clean = [text.decode() for text in raw]
      ids = [each.ids for each in self.model.encode_batch_fast(clean, add_special_tokens=False)]
    return [np.concatenate([[self.bos], each]).astype(np.int32) for each in ids]

  def decode(self, tokens: Iterable[int]) -> str:
    plain = [int(token) for token in tokens if token not in (self.bos, self.pad)]
    if self.model is None:
      return bytes(plain).decode("utf-8", "replace")
    return self.model.decode(plain, skip_special_tokens=False)


def load_tokenizer(name: str) -> Tokenizer:
  """The bytes, the tokenizer.json at a path (or in a folder), or a name on the Hugging Face hub."""
  if name == "bytes":
    return Tokenizer(vocab_size=258, bos=257, pad=256, fingerprint="bytes")
  path = Path(name).expanduser()
  path = path / "tokenizer.json" if path.is_dir() else path
  try:
    if path.exists() or path.suffix == ".json":  # a mistyped path is no name on the hub
      model = tokenizers.Tokenizer.from_file(str(path))
    else:
      model = tokenizers.Tokenizer.from_pretrained(name)
  except Exception as error:  # the library raises bare Exceptions
    raise DataError(
      f"tokenizer {name!r} cannot be loaded ({one_line(error)}): give 'bytes', the path of a "
      "tokenizer.json, or a name on the Hugging Face hub (needs the network)"
    ) from None
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True  # "<s>" inside a text is text
  vocabulary = model.get_vocab(with_added_tokens=True)
  size = max(vocabulary.values()) + 1
  names = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>", "[CLS]", "</s>", "<eos>")
  bos = next((vocabulary[name] for name in names if name in vocabulary), size)
  fingerprint = hashlib.blake2b(model.to_str().encode(), digest_size=8).hexdigest()
  return Tokenizer(max(size, bos + 1), bos, bos, fingerprint, model)


def _fingerprint(config: DataConfig, tokenizer: Tokenizer) -> str:
  inputs = find_inputs(config.data), find_inputs(config.outer_data)
  parts = [FORMAT, dataclasses.asdict(config), tokenizer.fingerprint, inputs]
  return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


_PIECE = np.dtype([("length", "<i4"), ("source", "<i4"), ("noise", "<f4")])


def _row(config: DataConfig, tokenizer: Tokenizer) -> np.dtype:
  length = config.sequence_length
  token = "<u2" if tokenizer.vocab_size <= 2**16 else "<i4"
  fields = [("tokens", token, length), ("segments", "u1", length)]
  return np.dtype([*fields, ("source", "<i4"), ("noise", "<f4")])


def _open_corpus(
  folder: Path, config: DataConfig, tokenizer: Tokenizer, fingerprint: str
) -> Corpus | None:
  """The corpus in `folder`; None if there is none, or if its files are not as long as it says."""
  try:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report, row = Report(**meta["report"]), _row(config, tokenizer)
    splits = {}
    for split in SPLITS:
      count, path = report.sequences[split], folder / f"{split}.rows"
      if path.stat().st_size != count * row.itemsize:
        return None
      rows = np.memmap(path, row, mode="r") if count else np.zeros(0, row)
      splits[split] = Split(*(rows[field] for field in Split._fields))
  except (OSError, ValueError, KeyError, TypeError):
    return None
  sources = tuple(meta["sources"])
  return Corpus(splits, sources, tokenizer, report, fingerprint, folder, config)


def _build_corpus(config: DataConfig, tokenizer: Tokenizer, temp: Path, progress: bool) -> None:
  """Writes the pieces of all documents under `temp`, then the packed rows in `temp`/corpus."""
  report, sources = Report(), {}
  with contextlib.ExitStack() as stack:
    files = {
      (split, part): stack.enter_context(open(temp / f"{split}.{part}", "wb"))
      for split in SPLITS
      for part in ("tokens", "pieces")
    }
    held_out = temp / "corpus" / "validation.documents"
    texts = stack.enter_context(open(held_out, "w", encoding="utf-8"))
    documents = tqdm.tqdm(
      _assigned(config, report), "reading", unit=" documents", disable=not progress
    )
    for split, document, tokens in _encoded(documents, tokenizer):
      report.documents[split][document.source] += 1
      source = sources.setdefault(document.source, len(sources))
      pieces = _cut(tokens, config.sequence_length)
      report.dropped_tokens += len(tokens) - sum(map(len, pieces))
      np.concatenate(pieces).tofile(files[split, "tokens"])
      rows = [(len(piece), source, document.noise) for piece in pieces]
      np.array(rows, _PIECE).tofile(files[split, "pieces"])
      if split == "validation":
        texts.write(json.dumps(dataclasses.asdict(document)) + "\n")
  for split in SPLITS:
    _pack(split, config, tokenizer, temp, report, progress)
  outer_share = 1 if config.outer_data else config.outer_fraction
  shares = dict(zip(SPLITS, (1, outer_share, config.validation_fraction), strict=True))
  for split, share in shares.items():
    if share and not report.sequences[split]:
      total = sum(sum(counts.values()) for counts in report.documents.values())
      also = f" ({report.in_outer_data} left out: in outer_data)" if report.in_outer_data else ""
      raise DataError(
        f"the {split} split got none of the {total} documents of {', '.join(config.data)}{also}: "
        "give more data (or a larger fraction for that split)"
      )
  meta = {"sources": list(sources), "report": vars(report)}
  (temp / "corpus" / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _assigned(config: DataConfig, report: Report) -> Iterator[tuple[str, Document]]:
  """Documents with their splits; of the demo corpus alone, half are corrupted (never in outer)."""
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
      text = demo_corpus.corrupt(document.text, noise, rng)
      document = dataclasses.replace(document, text=text, noise=noise)
    yield split, document


def _encoded(
  pairs: Iterable[tuple[Any, Document]], tokenizer: Tokenizer
) -> Iterator[tuple[Any, Document, np.ndarray]]:
  pairs = iter(pairs)
  while chunk := list(itertools.islice(pairs, 128)):
    encoded = tokenizer.encode([document.text for _, document in chunk])
    for (key, document), tokens in zip(chunk, encoded, strict=True):
      yield key, document, tokens


def _cut(tokens: np.ndarray, length: int) -> list[np.ndarray]:
  """Pieces of at most `length` tokens, less a short rest of a document of several pieces."""
  pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
  if len(pieces) > 1 and len(pieces[-1]) < min(MIN_REMAINDER, length // 2):
    del pieces[-1]
  return pieces


def _pack(
  split: str, config: DataConfig, tokenizer: Tokenizer, temp: Path, report: Report, progress: bool
) -> None:
  """First-fit packing of the pieces of a split into rows of S tokens."""
  pieces = np.fromfile(temp / f"{split}.pieces", _PIECE)
  report.tokens[split] = int(pieces["length"].sum(dtype=np.int64))
  report.sequences[split] = 0
  ends = np.cumsum(pieces["length"], dtype=np.int64)
  flat = np.memmap(temp / f"{split}.tokens", np.int32, mode="r") if len(pieces) else None

  def piece(index: int) -> dict[str, Any]:
    return {"tokens": flat[ends[index] - pieces["length"][index] : ends[index]], "piece": index}

  packed = grain.experimental.FirstFitPackIterDataset(
    grain.MapDataset.range(len(pieces))
    .map(piece)
    .to_iter_dataset(grain.ReadOptions(num_threads=0)),
    length_struct={"tokens": config.sequence_length},
    padding_struct={"tokens": tokenizer.pad},
    num_packing_bins=512,
    shuffle_bins=False,
    meta_features=("piece",),
    max_sequences_per_bin=255 if config.packing == "pack" else 1,
  )
  row = np.zeros((), _row(config, tokenizer))
  with open(temp / "corpus" / f"{split}.rows", "wb") as file:
    for element in tqdm.tqdm(packed, f"packing {split}", unit=" sequences", disable=not progress):
      longest = max(element["piece"], key=lambda index: pieces["length"][index])
      row["tokens"], row["segments"] = element["tokens"], element["tokens_segment_ids"]
      row["source"], row["noise"] = pieces["source"][longest], pieces["noise"][longest]
      row.tofile(file)
      report.sequences[split] += 1
