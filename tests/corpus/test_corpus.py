"""corpus/: nasty files, splits, packing, order, cache."""

import bz2
import dataclasses
import gzip
import json
import math
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from corpus import batches, demo
from corpus.batches import batch_iterator, load_corpus
from corpus.documents import (
  SPLITS,
  DataConfig,
  Report,
  corpus_records,
  read_documents,
  split_of,
)
from corpus.tokenizer import load_tokenizer
from runtime.cli import UserError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron".split()
# Seeded: pytest puts parameters into test names, which must be equal in every worker.
RANDOM_BYTES = np.random.default_rng(0).bytes(99_999)


def _texts(count, seed=0, longest=200):
  rng = np.random.default_rng(seed)
  return [
    f"{i} " + " ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for i in range(count)
  ]


def _jsonl(path, records):
  lines = [
    record if isinstance(record, bytes) else json.dumps(record).encode() for record in records
  ]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return str(path)


def _config(*names, **changes):
  defaults = dict(sequence_length=64, packing="pack", outer_fraction=0.2, validation_fraction=0.2)
  return DataConfig(data=names, **(defaults | changes))


def _read(*names, **changes):
  report = Report()
  return list(read_documents(_config(*names, **changes), report)), report


@pytest.fixture
def corpus_file(tmp_path):
  texts = _texts(300)
  return _jsonl(tmp_path / "c.jsonl", [{"text": t, "source": f"s{len(t) % 3}"} for t in texts])


@pytest.fixture
def corpus(corpus_file, tmp_path):
  return load_corpus(_config(corpus_file), tmp_path / "cache", progress=False)


# Reading


def test_unusable_records_are_skipped_with_reasons(tmp_path):
  good = [{"text": t, "id": 10 + i} for i, t in enumerate(_texts(90))]
  bad = [
    b'{"text": "cut off',
    b"not json at all",
    b'{"text": "\xff\xfe"}',
    b'["text"]',
    b"[" * 100_000,
    {"other": "x"},
    {"text": None},
    {"text": 7},
    {"text": ["a"]},
    {"text": " \n\t"},
  ]
  path = _jsonl(tmp_path / "mixed.jsonl", bad[:5] + good[:45] + [b"", b"  "] + bad[5:] + good[45:])
  documents, report = _read(path)
  assert [d.text for d in documents] == [g["text"] for g in good]
  assert documents[0] == dataclasses.replace(documents[0], source="mixed", id="10")
  assert report.records == 100
  assert report.skipped == {
    "broken JSON": 3,
    "invalid UTF-8": 1,
    "not a JSON object": 1,
    "without a value in 'text'": 2,
    "'text' is not text but int": 1,
    "'text' is not text but list": 1,
    "empty text": 1,
  }
  with pytest.raises(UserError, match=r"10 of 100 records.*broken JSON.*max_bad_fraction"):
    _read(path, max_bad_fraction=0.05)


def test_records_can_be_read_from_any_place_on_and_tell_how_far_they_are(tmp_path):
  good = [{"text": t, "id": i} for i, t in enumerate(_texts(20))]
  lines = [json.dumps(x).encode() for x in good]
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n\n".join([b"{", *lines[:9], b"[]"])))
  pa.parquet.write_table(pa.Table.from_pylist([*good[9:], {"text": None}]), tmp_path / "b.parquet")
  (tmp_path / "c.txt").write_text("words of a line\n" * 2000)
  names = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.parquet", "c.txt")]
  config = _config(*names, max_bad_fraction=0.2)
  whole = list(corpus_records(config))
  places = [record[:2] for record in whole]
  assert places == [(0, i) for i in range(11)] + [(1, i) for i in range(12)] + [
    (2, i) for i in range(5)
  ]
  assert [record.original for record in whole[:2]] == [b"{", lines[0]]
  assert [record.document is None for record in whole].count(True) == 3
  assert all((record.document is None) == (record.problem != "") for record in whole)
  for record, following in zip(whole, [*whole[1:], None], strict=True):
    assert 0 < record.read <= 1
    if following is None or following.input != record.input:
      assert record.read == 1
  assert [record.number for record in whole[:12]] == [*range(1, 22, 2), 1]
  facts = lambda records: repr([(*r[:6], type(r.original)) for r in records])
  for start in range(len(whole)):
    bad = sum(record.document is None for record in whole[:start])
    report = Report(start, {"before": bad} if bad else {})
    rest = list(corpus_records(config, report, places[start]))
    assert facts(rest) == facts(whole[start:])
    assert report.records == len(whole) and sum(report.skipped.values()) == 3


def test_a_parquet_row_that_python_cannot_hold_is_skipped_alone(tmp_path):
  times = pa.array([0, 2**50, 0, 5], pa.timestamp("ms"))
  pa.parquet.write_table(
    pa.table({"text": ["a", "b", "c", "d"], "t": times}), tmp_path / "t.parquet"
  )
  read, report = _read(str(tmp_path / "t.parquet"), max_bad_fraction=0.5)
  assert [document.text for document in read] == ["a", "c", "d"]
  assert report.skipped == {"a value that Python cannot hold": 1}


def test_bad_file_stops_after_a_thousand_records(tmp_path):
  path = _jsonl(tmp_path / "bad.jsonl", [b"{"] * 900 + [{"text": "x"}] * 100 + [b"{"] * 5000)
  with pytest.raises(UserError, match="900 of 1000"):
    _read(path)


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("gone.jsonl", None, "does not exist"),
    ("*.nothing", None, "no file matches"),
    ("empty.jsonl", b"", "holds no documents"),
    ("blank.txt", b"\n \n", "holds no documents"),
    ("picture.png", b"x", "unknown kind"),
    ("other.jsonl", b'{"body": "x", "title": "y"}\n' * 9, r"set --text_field.*body, title"),
    ("cut.jsonl.gz", gzip.compress(RANDOM_BYTES, mtime=0)[:50_000], "cannot be read to its end"),
    ("cut.jsonl.zst", zstandard.compress(RANDOM_BYTES)[:50_000], "cannot be read to its end"),
    ("not.jsonl.gz", b"plain", "cannot be read to its end"),
    ("not.parquet", b"plain", "cannot be read to its end"),
    ("array.json", b'[\n{"text": "x"},\n{"text": "y"}\n]\n', "broken JSON"),
    ("utf16.txt", "words".encode("utf-16"), "invalid UTF-8"),
  ],
)
def test_bad_input_is_one_clear_line(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    _read(str(tmp_path / name))
  assert "\n" not in str(caught.value)


def test_bad_names_and_settings(tmp_path):
  for changes, message in [
    (dict(packing="concat"), "--packing=concat is unknown: choose one of pack, document"),
    (dict(sequence_length=1), "--sequence_length=1 must be at least 2"),
    (dict(outer_fraction=0.7, validation_fraction=0.3), "leave nothing to train on"),
    (dict(max_documents=0), "--max_documents=0 must be at least 1"),
    (dict(data="demo"), "--data: give at least one name"),
    (dict(data=()), "--data: give at least one name"),
  ]:
    with pytest.raises(UserError, match=message):
      DataConfig(**changes)
  with pytest.raises(UserError, match="no file of a known kind"):
    _read(str(tmp_path))
  with pytest.raises(UserError, match="hf:NAME"):
    _read("hf:a/b:c:d:e")
  (tmp_path / "broken.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer .* cannot be loaded"):
    load_tokenizer(str(tmp_path / "broken.json"))
  with pytest.raises(UserError, match="tokenizer .* cannot be loaded"):
    load_tokenizer("no/such/tokenizer.json")


def test_bom_crlf_and_odd_characters(tmp_path):
  path = tmp_path / "windows.jsonl"
  path.write_bytes(
    b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "t\\ud800wo \\u0000"}\r\n{"text": "\xc3\xa9"}'
  )
  documents, report = _read(str(path))
  assert [d.text for d in documents] == ["one", "t\ud800wo \0", "é"] and not report.skipped
  tokenizer = load_tokenizer("bytes")
  assert tokenizer.decode(tokenizer.encode([documents[1].text])[0]) == "t?wo \0"
  (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
  assert _read(str(tmp_path / "windows.txt"))[0][0].text == "one\ntwo\n"


def test_compressed_files_and_parquet_equal_the_plain_one(tmp_path):
  records = [{"text": t, "source": "s", "id": str(i)} for i, t in enumerate(_texts(40))]
  plain = _jsonl(tmp_path / "p.jsonl", records)
  first, second = (
    (tmp_path / "p.jsonl").read_bytes()[:1000],
    (tmp_path / "p.jsonl").read_bytes()[1000:],
  )
  for suffix, compress in (
    ("gz", gzip.compress),
    ("bz2", bz2.compress),
    ("zst", zstandard.compress),
  ):
    # two members (frames) in one file, as parallel compressors write
    (tmp_path / f"p.jsonl.{suffix}").write_bytes(compress(first) + compress(second))
  pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
  expected, _ = _read(plain)
  assert len(expected) == 40
  for name in ("p.jsonl.gz", "p.jsonl.bz2", "p.jsonl.zst", "p.parquet"):
    assert _read(str(tmp_path / name))[0] == expected, name


def test_text_files(tmp_path):
  (tmp_path / "a.txt").write_text("short\n\ntext", encoding="utf-8")
  paragraphs = "\n\n".join(text * 3 for text in _texts(60))
  (tmp_path / "long.txt").write_text(paragraphs, encoding="utf-8")
  (tmp_path / "line.txt").write_text("é" * 50_001, encoding="utf-8")
  assert [d.text for d in _read(str(tmp_path / "a.txt"))[0]] == ["short\n\ntext"]
  for name, text in (("long", paragraphs), ("line", "é" * 50_001)):
    documents, _ = _read(str(tmp_path / f"{name}.txt"), text_field="body")
    assert len(documents) > 5 and max(len(d.text) for d in documents) <= 8000
    assert "".join(d.text for d in documents) == text
    assert {d.source for d in documents} == {name} and len({d.id for d in documents}) > 5
  (tmp_path / "half.txt").write_bytes(b"good words " * 3000 + b"\xff")
  documents, report = _read(str(tmp_path / "half.txt"), max_bad_fraction=0.5)
  assert report.skipped == {"invalid UTF-8": 1} and len(documents) == 4


def test_globs_folders_fields_and_limits(tmp_path):
  (tmp_path / "sub").mkdir()
  _jsonl(tmp_path / "b.jsonl", [{"text": "b", "meta": {"set": "inner"}, "noise": 0.25}])
  _jsonl(tmp_path / "sub" / "a.jsonl.old", [{"text": "no"}])
  _jsonl(tmp_path / "sub" / "a.jsonl", [{"text": "a", "noise": "?"}, {"text": "c", "source": ""}])
  documents, report = _read(str(tmp_path), source_field="meta.set")
  assert [(d.text, d.source) for d in documents] == [("b", "inner"), ("a", "a"), ("c", "a")]
  assert documents[0].noise == 0.25 and math.isnan(documents[1].noise) and report.ignored_noise == 1
  once, _ = _read(str(tmp_path / "**" / "*.jsonl"), str(tmp_path / "b.jsonl"))
  assert sorted(d.text for d in once) == ["a", "b", "c"]
  assert len(_read(str(tmp_path), max_documents=2)[0]) == 2


def test_hub_names(monkeypatch):
  import datasets

  asked = []

  def load_dataset(*args, **kwargs):
    asked.append((args, kwargs))
    return [{"text": "a", "source": "own"}, {"text": "b"}]

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  for name in ("hf:who/what", "hf:who/what:en", "hf:who/what::test"):
    assert [(d.text, d.source) for d in _read(name)[0]] == [("a", "own"), ("b", "what")]
  assert [args for args, _ in asked] == [("who/what", c) for c in (None, "en", None)]
  assert [kwargs["split"] for _, kwargs in asked] == ["train", "train", "test"]
  assert all(kwargs["streaming"] for _, kwargs in asked)
  monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: 1 / 0)
  with pytest.raises(UserError, match="hf:who/what cannot be read .ZeroDivisionError"):
    _read("hf:who/what")


# Tokens, splits, packing


def test_tokenizer_json(tmp_path):
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  for name, specials in (("plain", []), ("own", ["<|endoftext|>"])):
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_texts(50), trainer)
    bpe.enable_truncation(5)  # must not shorten documents
    bpe.save(str(tmp_path / f"{name}.json"))
  plain, own = (load_tokenizer(str(tmp_path / f"{n}.json")) for n in ("plain", "own"))
  assert plain.vocab_size == plain.bos + 1 and plain.fingerprint != own.fingerprint
  assert own.bos == 0 and own.vocab_size == 300
  text = "alpha <|endoftext|> \ud800 é " + "omega " * 50
  for tokenizer in (plain, own, load_tokenizer("bytes")):
    (tokens,) = tokenizer.encode([text])
    assert tokens[0] == tokenizer.bos and tokens.dtype == np.int32
    assert (tokens[1:] != tokenizer.bos).all() and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text.replace("\ud800", "?")


def test_duplicates_stay_on_one_side(tmp_path):
  texts = _texts(200)
  _jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
  _jsonl(
    tmp_path / "b.jsonl", [{"text": f"\r\n {t.replace(' ', '  ')}\n"} for t in reversed(texts)]
  )
  split = {name: split_of(name, _config("x"))[0] for name in texts}
  assert {split_of(f"\n{t} ", _config("x"))[0] == split[t] for t in texts} == {True}
  assert split != {t: split_of(t, _config("x", seed=1))[0] for t in texts}
  corpus = load_corpus(_config(str(tmp_path)), tmp_path / "cache", progress=False)
  for name in SPLITS:
    counts = corpus.report.documents[name]
    assert counts["a"] == counts["b"] == list(split.values()).count(name) > 20


def _segments_of(split, tokenizer):
  """All pieces of a split as texts, with whether they start a document."""
  for tokens, segments in zip(split.tokens, split.segments, strict=True):
    count = segments.max()
    assert count > 0 and (np.diff(segments[segments > 0].astype(int)) >= 0).all()
    assert (
      not segments[np.argmax(segments == 0) :].any() or segments.all()
    )  # padding only at the end
    assert (tokens[segments == 0] == tokenizer.pad).all()
    for segment in range(1, count + 1):
      piece = tokens[segments == segment]
      assert (piece[1:] != tokenizer.bos).all()
      yield tokenizer.decode(piece), piece[0] == tokenizer.bos


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_packed_pieces_are_the_documents(tmp_path, packing):
  texts = _texts(300)
  path = _jsonl(tmp_path / "c.jsonl", [{"text": t} for t in texts])
  config = _config(path, packing=packing)
  corpus = load_corpus(config, tmp_path / "cache", progress=False)
  tokenizer, missing = corpus.tokenizer, 0
  for name in SPLITS:
    expected = []
    for text in (t for t in texts if split_of(t, config)[0] == name):
      whole = b"\0" + text.encode()  # \0 stands for the start token
      pieces = [whole[i : i + 64] for i in range(0, len(whole), 64)]
      if len(pieces) > 1 and len(pieces[-1]) < 16:
        missing += len(pieces.pop())
      expected += [(piece.lstrip(b"\0").decode(), i == 0) for i, piece in enumerate(pieces)]
    split = corpus.splits[name]
    assert sorted(_segments_of(split, tokenizer)) == sorted(expected)
    assert corpus.report.tokens[name] == (split.segments > 0).sum()
    assert corpus.report.sequences[name] == len(split.tokens)
    if packing == "document":
      assert len(split.tokens) == len(expected) and split.segments.max() == 1
    elif name == "train":
      assert (split.segments > 0).mean() > 0.9 and split.segments.max() > 1
  assert corpus.report.dropped_tokens == missing > 0


def _plain_rows(documents, S, packing, window):
  """(tokens, segments, source, noise) of each row by first fit, as plain Python."""
  done, rows = [], []  # a row: its pieces (tokens, source, noise)
  for text, source, noise in documents:
    tokens = [257, *text.encode()]
    pieces = [tokens[i : i + S] for i in range(0, len(tokens), S)]
    if len(pieces) > 1 and len(pieces[-1]) < min(16, S // 2):
      pieces.pop()
    for piece in pieces:
      most = 255 if packing == "pack" else 1
      room = lambda row: S - sum(len(tokens) for tokens, _, _ in row) if len(row) < most else 0  # noqa: B023, E731
      row = next((row for row in rows if room(row) >= len(piece)), None)
      if row is None:
        if len(rows) == window:
          done, rows = done + rows, []
        rows.append(row := [])
      row.append((piece, source, noise))
  for row in done + rows:
    tokens = [token for piece, _, _ in row for token in piece]
    segments = [i for i, (piece, _, _) in enumerate(row, 1) for _ in piece]
    rest = S - len(tokens)
    _, source, noise = max(row, key=lambda x: len(x[0]))
    yield tokens + [256] * rest, segments + [0] * rest, source, noise


@pytest.mark.parametrize("packing", ["pack", "document"])
@pytest.mark.parametrize("S, window", [(2, 7), (3, 512), (16, 4), (40, 3), (900, 512)])
def test_rows_are_those_of_plain_first_fit(tmp_path, monkeypatch, packing, S, window):
  rng = np.random.default_rng(S)
  lengths = [1, S - 2, S - 1, S, S + 6, S + 7, S + 14, S + 15, 2 * S - 1, 5 * S]
  lengths = [n for n in rng.permutation(lengths * 6 + [1] * 600) if n > 0]
  records = [
    {"text": "".join(rng.choice(list("abcd"), n)), "source": f"s{i % 31}", "noise": i % 5 / 4}
    for i, n in enumerate(lengths)
  ]
  blank = [{"text": ""}, {"text": " "}]
  path = _jsonl(tmp_path / "c.jsonl", [*blank, *records[:9], *blank, *records[9:]])
  config = _config(path, sequence_length=S, packing=packing, outer_fraction=0.0)
  monkeypatch.setattr("corpus.packing.WINDOW", window)
  for chunk in (1, 3 * 512, 2**19):  # characters, a document counting as 512 of them at least
    monkeypatch.setattr(batches, "CHUNK", chunk)
    corpus = load_corpus(config, tmp_path / f"cache{chunk}", progress=False)
    assert len(corpus.splits["outer"].tokens) == 0 and corpus.report.skipped == {"empty text": 4}
    for name in ("train", "validation"):
      own = [tuple(r.values()) for r in records if split_of(r["text"], config)[0] == name]
      tokens, segments, source, noise = zip(*_plain_rows(own, S, packing, window), strict=True)
      split = corpus.splits[name]
      assert np.array_equal(split.tokens, tokens) and np.array_equal(split.segments, segments)
      assert [corpus.sources[i] for i in split.source] == list(source)
      assert np.array_equal(split.noise, np.float32(noise))


def test_documents_far_shorter_and_longer_than_a_sequence(tmp_path):
  long = "".join(np.random.default_rng(0).choice(list("abc def"), 5_000_000))
  records = [{"text": long}] + [{"text": f"{i}"} for i in range(2000)]
  path = _jsonl(tmp_path / "c.jsonl", records)
  corpus = load_corpus(_config(path, sequence_length=4096), tmp_path, progress=False)
  assert sum(corpus.report.documents["train"].values()) > 1000
  assert (
    max(split.segments.max() for split in corpus.splits.values()) == 255
  )  # the most there may be
  assert sum(corpus.report.tokens.values()) + corpus.report.dropped_tokens > 5_000_000
  home = split_of(long, corpus.config)[0]
  assert len(corpus.splits[home].tokens) >= 1220


def test_source_and_noise_of_a_sequence(tmp_path):
  records = [
    {"text": t, "source": f"s{i % 3}", "noise": i % 3 / 2} for i, t in enumerate(_texts(200))
  ]
  path = _jsonl(tmp_path / "c.jsonl", records)
  corpus = load_corpus(_config(path, packing="document"), tmp_path / "cache", progress=False)
  owner = {record["text"]: record for record in records}
  split = corpus.splits["train"]
  assert sorted(corpus.sources) == ["s0", "s1", "s2"]
  starts = [i for i in range(len(split.tokens)) if split.tokens[i, 0] == corpus.tokenizer.bos]
  for i in starts:
    start = corpus.tokenizer.decode(split.tokens[i])
    (record,) = (owner[text] for text in owner if text.startswith(start))
    assert corpus.sources[split.source[i]] == record["source"] and split.noise[i] == record["noise"]
  held = corpus.validation_documents()
  assert {d.text for d in held} == {
    t for t in owner if split_of(t, corpus.config)[0] == "validation"
  }
  assert all(owner[d.text]["noise"] == d.noise for d in held)
  assert len(corpus.validation_documents(5)) == 5


def test_too_small_a_corpus_says_so(tmp_path, corpus):
  path = _jsonl(tmp_path / "small.jsonl", [{"text": "only one"}])
  with pytest.raises(UserError, match="split got none of the 1 documents"):
    load_corpus(_config(path), tmp_path / "cache", progress=False)
  with pytest.raises(UserError, match=r"sequences, one batch takes 100000 \(1000, 100\)"):
    batch_iterator(corpus.splits["outer"], 0, (1000, 100))
  alone = _config(path, outer_fraction=0.0, validation_fraction=0.0)
  split = load_corpus(alone, tmp_path / "cache", progress=False).splits["train"]
  assert next(batch_iterator(split, 0, (1,))).tokens.shape == (1, 64)


# Order


def _take(split, count, *args, **kwargs):
  batches = batch_iterator(split, *args, **kwargs)
  taken = [next(batches) for _ in range(count)]
  batches.close()
  return taken


def _rows(batches):
  """Each drawn row as bytes."""
  tokens = np.concatenate([batch.tokens.reshape(-1, batch.tokens.shape[-1]) for batch in batches])
  return [row.tobytes() for row in tokens]


def test_order_is_a_function_of_seed_and_step(corpus):
  split = corpus.splits["train"]
  first = _take(split, 20, 3, (2, 3, 4))
  assert first[0].tokens.shape == (2, 3, 4, 64) and first[0].segments.dtype == np.int32
  assert _rows(first) == _rows(_take(split, 20, 3, (2, 3, 4)))
  assert _rows(first)[13 * 24 :] == _rows(_take(split, 7, 3, (2, 3, 4), start_step=13))
  assert _rows(first) != _rows(_take(split, 20, 4, (2, 3, 4)))
  assert not np.array_equal(first[0].tokens, first[1].tokens)


def test_each_epoch_draws_every_sequence_once_in_a_new_order(corpus):
  split = corpus.splits["train"]
  count = len(split.tokens)
  drawn = _rows(_take(split, 3 * count, 0, (1,)))
  everything = sorted(row.astype(np.int32).tobytes() for row in split.tokens)
  epochs = [drawn[i * count : (i + 1) * count] for i in range(3)]
  assert all(sorted(epoch) == everything for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  others = _rows(_take(split, count, 1, (1,)))  # a neighboring seed shares no epoch
  assert sorted(others) == everything and others not in epochs


def test_hosts_share_each_batch(corpus):
  """Whatever part of the axes a host's devices hold."""
  split = corpus.splits["train"]
  whole = _take(split, 3, 0, (2, 8))
  for part in (np.s_[:, 2:4], np.s_[1:2, :], np.s_[0:1, 4:8]):
    mine = _take(split, 3, 0, (2, 8), part=part)
    for step in range(3):
      assert np.array_equal(mine[step].tokens, whole[step].tokens[part])
      assert np.array_equal(mine[step].segments, whole[step].segments[part])


def test_iterators_leave_no_threads(corpus):
  for _ in range(3):
    _take(corpus.splits["train"], 2, 0, (4,))
  threads = [thread for thread in threading.enumerate() if "prefetch" in thread.name]
  for thread in threads:
    thread.join(timeout=5)
  assert not any(thread.is_alive() for thread in threads)


# Cache


def test_second_call_reads_nothing_and_changed_files_are_seen(corpus_file, tmp_path, monkeypatch):
  cache, config = tmp_path / "cache", _config(corpus_file)
  first = load_corpus(config, cache, progress=False)
  with monkeypatch.context() as patch:
    patch.setattr(batches, "_build_corpus", None)
    second = load_corpus(config, cache)
  assert np.array_equal(first.splits["train"].tokens, second.splits["train"].tokens)
  assert second.sources == first.sources and vars(second.report) == vars(first.report)
  assert second.summary() == first.summary() and "300 records" in first.summary()
  assert sorted(p.name for p in cache.iterdir()) == [f"corpus-{first.fingerprint}"]
  longer = dataclasses.replace(config, sequence_length=128)
  assert load_corpus(longer, cache, progress=False).fingerprint != first.fingerprint
  with open(corpus_file, "a") as file:
    file.write(json.dumps({"text": "one more"}) + "\n")
  third = load_corpus(config, cache, progress=False)
  assert third.fingerprint != first.fingerprint and third.report.records == 301


def test_interrupted_and_damaged_caches_are_not_used(corpus_file, tmp_path, monkeypatch):
  cache, config = tmp_path / "cache", _config(corpus_file)

  def interrupted(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr("corpus.packing.pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
      load_corpus(config, cache, progress=False)
  assert list(cache.iterdir()) == []
  (cache / ".building-killed" / "corpus").mkdir(parents=True)
  first = load_corpus(config, cache, progress=False)
  expected = np.array(first.splits["train"].tokens)
  for damage in ("train.rows", "meta.json"):
    path = first.folder / damage
    path.write_bytes(path.read_bytes()[:-200])  # of the rows: exactly one
    again = load_corpus(config, cache, progress=False)
    assert np.array_equal(again.splits["train"].tokens, expected), damage


def test_two_builders_at_once(corpus_file, tmp_path):
  got = []
  config = _config(corpus_file)
  load = lambda: got.append(load_corpus(config, tmp_path / "c", progress=False))  # noqa: E731
  threads = [threading.Thread(target=load) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 3 and len(list((tmp_path / "c").iterdir())) == 1
  assert all(np.array_equal(c.splits["outer"].tokens, got[0].splits["outer"].tokens) for c in got)


def test_a_noisy_outer_split_is_reported_with_a_fix(corpus_file, corpus, tmp_path):
  assert "--outer_data" not in corpus.summary()
  noisy = _jsonl(tmp_path / "n.jsonl", [{"text": t.upper(), "noise": 0.5} for t in _texts(300)])
  corpus = load_corpus(_config(noisy), tmp_path / "cache", progress=False)
  assert "100% of the outer sequences have a known noise level" in corpus.summary()
  assert "--outer_data" in corpus.summary()
  clean = _config(noisy, outer_data=(corpus_file,))
  assert "known noise" not in load_corpus(clean, tmp_path / "cache", False).summary()


def test_noise_that_is_no_number_is_reported(corpus_file, corpus, tmp_path):
  assert "ignored" not in corpus.summary()
  records = [{"text": text, "noise": "high" if i < 7 else 0} for i, text in enumerate(_texts(300))]
  noisy = load_corpus(_config(_jsonl(tmp_path / "n.jsonl", records)), tmp_path / "cache", False)
  assert "noise: no number from 0 to 1 in 7 records, ignored there" in noisy.summary()


def test_outer_data_is_the_outer_split_and_is_kept_out_of_the_others(tmp_path):
  texts = _texts(400)
  outer = _jsonl(tmp_path / "outer.jsonl", [{"text": t, "source": "o"} for t in texts[:90]])
  path = _jsonl(tmp_path / "c.jsonl", [{"text": t + " \n", "source": "c"} for t in texts[50:]])
  config = _config(path, outer_data=(outer,), validation_fraction=0.3)
  corpus = load_corpus(config, tmp_path / "cache", progress=False)
  documents = corpus.report.documents
  assert documents["outer"] == {"o": 90}  # and no share of `data`
  assert documents["train"]["c"] + documents["validation"]["c"] == 350 - 40
  assert corpus.report.in_outer_data == 40
  assert "40 of its documents left out of data" in corpus.summary()
  held_out = {d.text.strip() for d in corpus.validation_documents()}
  assert held_out and not held_out & set(texts[:90])
  other = load_corpus(_config(path, validation_fraction=0.3), tmp_path / "cache", False)
  assert other.fingerprint != corpus.fingerprint
  with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
    load_corpus(_config(path, outer_data=("nowhere.jsonl",)), tmp_path / "cache", False)
  with pytest.raises(UserError, match="train split got none .*90 left out: in outer_data"):
    load_corpus(_config(outer, outer_data=(outer,)), tmp_path / "cache", False)


def test_demo_is_half_corrupted_but_never_in_outer(tmp_path, monkeypatch):
  path = _jsonl(tmp_path / "demo.jsonl", [{"text": t, "source": "s"} for t in _texts(400)])
  monkeypatch.setattr(demo, "build", lambda: Path(path))
  config = _config("demo", packing="document")
  corpus = load_corpus(config, tmp_path / "cache", progress=False)
  assert (corpus.splits["outer"].noise == 0).all()
  noise = corpus.splits["train"].noise
  assert 0.35 < (noise == 0).mean() < 0.65
  assert set(noise.round(1).tolist()) == {np.float32(level / 10).item() for level in range(9)}
  clean = set(_texts(400))
  assert all((d.text in clean) == (d.noise == 0) for d in corpus.validation_documents())
