"""curate.py, curation/, rating.py: fields, scores, selection, interruption, bad input, Beam."""

import bz2
import datetime
import decimal
import functools
import gzip
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jobs
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.stats
import tokenizers
import zstandard

import config
import curation.job
import rating
import selection
from corpus.documents import DataConfig, find_inputs
from corpus.packing import cut
from corpus.tokenizer import load_tokenizer
from curation import local, records
from runtime.cli import UserError
from runtime.workdir import Checkpoints, open_workdir
from transformer import Batch

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = "the rater scores each text and the inner models learn from what it likes best".split()
NEW = ["datarater_score", "datarater_quantile", "datarater_keep"]


def make_texts(count, seed=0, longest=60):
  rng = np.random.default_rng(seed)
  return [
    f"{seed}/{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest))) for i in range(count)
  ]


def write_lines(path, records):
  lines = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in records]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return str(path)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """As train.py leaves it: a nano rater of sequences of 32 bytes, its scores spread by chance."""
  return make_rater(tmp_path_factory.mktemp("rater") / "run", seed=0)


def make_rater(workdir, seed, tokenizer="bytes"):
  settings = config.Config(rater="nano", sequence_length=32, tokenizer=tokenizer)
  open_workdir(workdir, settings, "corpus")
  rater = config.make_rater(settings, load_tokenizer(tokenizer).vocab_size)
  eta = jax.jit(rater.init)(jax.random.PRNGKey(seed))
  head = jax.random.normal(jax.random.PRNGKey(seed + 1), eta["~"]["score_head"].shape)
  eta["~"]["score_head"] = head
  checkpoints = Checkpoints(workdir)
  checkpoints.manager.save(4, args=ocp.args.StandardSave({"eta": eta}))
  checkpoints.close()
  return workdir


@pytest.fixture(autouse=True)
def one_rater(monkeypatch):
  """The runs of this process share the compiled rater."""
  for module in (curation.job, rating):
    monkeypatch.setattr(module, "open_rater", lambda workdir: OPEN(str(workdir)))


OPEN = functools.cache(rating.open_rater)


@pytest.fixture
def job(workdir, tmp_path):
  """(inputs, flags) -> output folder of a run in this process."""

  def run(*inputs, output=None, **flags):
    output = output or tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    defaults = {"discard": 0.5, "batch_size": 16, "shard_records": 16}
    if flags.get("score_only"):
      del defaults["discard"]
    flags = defaults | {"rater": str(workdir)} | flags
    settings = curation.job.Config(data=tuple(map(str, inputs)), **flags)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
      if settings.runner:
        from curation import beam

        beam.curate(settings, output)
      else:
        local.curate(settings, output)
    finally:
      signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])
    return output

  return run


def read_jsonl(output):
  lines = b"".join(path.read_bytes() for path in sorted(output.glob("part-*.jsonl"))).splitlines()
  return [json.loads(line) for line in lines]


def read_parquet(output):
  return pa.concat_tables([pa.parquet.read_table(p) for p in sorted(output.glob("*.parquet"))])


def manifest(output):
  return json.loads((output / "manifest.json").read_text())


def contents(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


# Records


NASTY_LINES = [
  '{"text": "plain"}',
  '  {"z": 1, "text": "key order", "a": [1, [2, {"b": null}]], "n": {"x": {}}} \t',
  '{"text": "numbers", "big": 123456789012345678901234567890, "x": 0.10, "e": 1E+2, "m": -0.0}',
  '{"text": "unicode \\u00e9 \\ud83d\\ude00 é 😀 \\u2028", "é": "\u2028\u0085", "k": "\\ud800"}',
  '{"text": "lone \\udfff surrogate", "b": true, "c": false, "d": null}',
  '{"text": "first", "text": "a key twice"}',
  '{"text": "braces }}", "s": "}", "q": "\\"}", "datarater": 1}',
  '{"id": "", "text": "text\\nwith\\u0000 control\\t", "": "empty key"}',
  '{"text": "NaN as Python writes it", "x": NaN, "y": -Infinity}',
  '{"text":"no spaces"}',
]


def test_json_lines_stay_as_they_are_up_to_their_last_brace(job, tmp_path):
  path = tmp_path / "nasty.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(NASTY_LINES).encode())  # no last line feed
  output = job(path, shard_records=4)
  written = b"".join(p.read_bytes() for p in sorted(output.glob("part-*"))).split(b"\n")
  assert written.pop() == b"" and len(written) == len(NASTY_LINES)
  for before, after in zip(NASTY_LINES, written, strict=True):
    assert after.startswith(before.strip().encode()[:-1] + b', "datarater_score": ')
    record = json.loads(after)
    assert list(record)[-3:] == NEW
    assert isinstance(record["datarater_keep"], bool)
  with pytest.raises(AssertionError):  # the check above can fail
    assert written[0].startswith(b'{"text": "other"')


def test_gz_zst_and_bz2_come_out_as_plain_jsonl_in_the_order_of_the_names(job, tmp_path):
  texts = make_texts(30)
  lines = [json.dumps({"text": text, "i": i}).encode() for i, text in enumerate(texts)]
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[:10])))
  (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines[10:20])))
  (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(b"\n".join(lines[20:])))
  output = job(tmp_path / "*.jsonl.*", output=tmp_path / "out")
  assert [record["i"] for record in read_jsonl(output)] == list(range(30))
  assert manifest(output)["documents"] == 30


def test_text_files_become_json_records_of_id_and_text(job, tmp_path):
  (tmp_path / "book.txt").write_text("A paragraph of some words.\n\n" * 600)
  (tmp_path / "note.md").write_text("Short é.")
  records = read_jsonl(job(tmp_path / "book.txt", tmp_path / "note.md"))
  assert list(records[0]) == ["id", "text", *NEW]
  assert [r["id"] for r in records] == ["book:0", "book:1", "book:2", "note:0"]
  assert "".join(r["text"] for r in records[:3]) == "A paragraph of some words.\n\n" * 600


def nasty_table(texts):
  n = len(texts)
  words = pa.array([WORDS[i % 3] for i in range(n)])
  columns = {
    "meta": pa.array([{"text": t, "more": [i, None]} if i % 5 else {"text": t} for i, t in
                      enumerate(texts)]),
    "ns": pa.array([1_600_000_000_000_000_001 + i for i in range(n)], pa.timestamp("ns", "UTC")),
    "day": pa.array([datetime.date(1, 1, 1), None] * (n // 2), pa.date32()),
    "money": pa.array([decimal.Decimal("12.340")] * n, pa.decimal128(12, 3)),
    "raw": pa.array([b"\xff\x00", None] * (n // 2), pa.large_binary()),
    "kind": words.dictionary_encode(),
    "map": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.uint64())),
    "list": pa.array([[], None] * (n // 2), pa.large_list(pa.float16())),
    "big": pa.array([2**63 + i for i in range(n)], pa.uint64()),
    "nothing": pa.nulls(n),
    "nan": pa.array([float("nan"), -0.0] * (n // 2)),
  }  # fmt: skip
  return pa.table(columns).replace_schema_metadata({"owner": "kept"})


def test_parquet_keeps_columns_types_values_and_metadata_next_to_three_more(job, tmp_path):
  table = nasty_table(make_texts(50))
  pa.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
  output = job(tmp_path / "in.parquet", text_field="meta.text")
  result = read_parquet(output)
  source = pa.parquet.read_table(tmp_path / "in.parquet")
  assert result.column_names == table.column_names + NEW
  kept = result.select(table.column_names)
  assert kept.schema.equals(source.schema) and kept.schema.metadata[b"owner"] == b"kept"
  for name in table.column_names:
    a, b = (x[name].cast("int64") if name == "ns" else x[name] for x in (kept, source))
    assert repr(a.to_pylist()) == repr(b.to_pylist()), name  # repr tells nan and -0.0
  assert [result.schema.field(x).type for x in NEW] == [pa.float32(), pa.float32(), pa.bool_()]
  assert manifest(output)["kept"] == sum(result["datarater_keep"].to_pylist())


def test_parquet_files_of_other_columns_and_bad_rows(job, tmp_path):
  texts = make_texts(20)
  a = pa.table({"text": [*texts[:9], None], "x": pa.array(range(10), pa.int32())})
  b = pa.table({"x": pa.array(range(10), pa.int64()), "y": ["z"] * 10, "text": texts[10:]})
  pa.parquet.write_table(a, tmp_path / "a.parquet")
  pa.parquet.write_table(b, tmp_path / "b.parquet")
  output = job(tmp_path / "*.parquet", shard_records=6)
  result = read_parquet(output)
  assert result.column_names == ["text", "x", "y", *NEW]
  assert result["x"].to_pylist() == [*range(9), *range(10)] and result["x"].type == pa.int64()
  assert result["y"].to_pylist() == [None] * 9 + ["z"] * 10
  reject = {"file": str(tmp_path / "a.parquet"), "record": 10}
  assert json.loads((output / "rejects.jsonl").read_text()) == reject | {
    "reason": "without a value in 'text'"
  }


def test_json_to_parquet_and_back(job, tmp_path):
  records = [{"text": t, "n": i, "meta": {"u": str(i)}} for i, t in enumerate(make_texts(40))]
  del records[3]["n"], records[5]["meta"]
  records[20]["late"] = [1.5]
  path = write_lines(tmp_path / "in.jsonl", records)
  there = job(path, format="parquet")
  table = read_parquet(there).drop_columns(NEW).to_pylist()
  full = {"n": None, "meta": None, "late": None}
  assert table == [full | record for record in records]
  pa.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "again.parquet")
  back = read_jsonl(job(tmp_path / "again.parquet", format="jsonl"))
  assert [{k: v for k, v in record.items() if k not in NEW} for record in back] == table


def test_fields_of_two_kinds_cannot_be_parquet_and_dates_cannot_be_json(job, tmp_path):
  records = [{"text": t, "x": "a" if i > 20 else 1} for i, t in enumerate(make_texts(40))]
  path = write_lines(tmp_path / "in.jsonl", records)
  for shard in (16, 40):
    with pytest.raises(UserError, match="--format=jsonl"):
      job(path, format="parquet", shard_records=shard)
  path = write_lines(tmp_path / "in.jsonl", [{"text": "a", "m": {}}, {"text": "b", "x": 2**60 + 1}])
  with pytest.raises(UserError, match="part-00000.parquet cannot be Parquet.*'m'"):
    job(path, format="parquet")
  write_lines(tmp_path / "in.jsonl", [{"text": "a", "x": 0.5}, {"text": "b", "x": 2**60 + 1}])
  with pytest.raises(UserError, match="Parquet.*--format=jsonl"):
    job(path, format="parquet", shard_records=1)
  pa.parquet.write_table(pa.table({"text": ["a"], "x": [1]}), tmp_path / "1.parquet")
  pa.parquet.write_table(pa.table({"text": ["a"], "x": ["1"]}), tmp_path / "2.parquet")
  with pytest.raises(UserError, match="no common Parquet schema"):
    job(tmp_path / "?.parquet")
  day = [datetime.date(2026, 1, 1)] + [None] * 39
  pa.parquet.write_table(pa.table({"text": make_texts(40), "d": day}), tmp_path / "d.parquet")
  output = job(tmp_path / "d.parquet", format="jsonl")
  assert manifest(output)["rejected"] == {"cannot be jsonl (TypeError)": 1}


def test_records_of_the_hub_become_json_lines(job, tmp_path, monkeypatch):
  import datasets

  records = [{"id": i, "text": t, "meta": {"é": [None, 1.5]}} for i, t in enumerate(make_texts(40))]
  calls = []

  def load_dataset(*arguments, **options):
    calls.append((arguments, options))
    return iter(records)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  output = job("hf:some/corpus:en:test")
  old = [{k: v for k, v in record.items() if k not in NEW} for record in read_jsonl(output)]
  assert old == records
  assert calls[0] == (("some/corpus", "en"), {"split": "test", "streaming": True})


# Scores


def scores_one_piece_at_a_time(workdir, texts):
  """phi_eta of each text, with no buckets and no company: its pieces of 32 tokens, each alone."""
  rater, expected = rating.open_rater(str(workdir)), []
  for tokens in rater.tokenizer.encode(texts):
    pieces = [tokens[start : start + 32] for start in range(0, len(tokens), 32)]
    pieces = [piece for i, piece in enumerate(pieces) if i == 0 or len(piece) >= 16]
    scores = []
    for piece in pieces:
      padding = (0, 32 - len(piece))
      rows = np.pad(piece, padding), np.pad(np.ones(len(piece), int), padding)
      batch = Batch(*(np.asarray(x, np.int32)[None] for x in rows))
      scores.append(float(rater.apply(rater.eta, batch)[0]))
    expected.append(np.average(scores, weights=[len(piece) for piece in pieces]))
  return expected


def test_scores_are_the_trained_rater_s_at_any_length(workdir, job, tmp_path):
  texts = make_texts(60) + ["x" * n for n in range(1, 70)]
  output = job(write_lines(tmp_path / "in.jsonl", [{"text": t} for t in texts]), score_only=True)
  records = read_jsonl(output)
  assert list(records[0])[-2:] == NEW[:2] and "kept" not in manifest(output)
  scores = np.array([record["datarater_score"] for record in records])
  assert scores.std() > 1e-3
  expected = scores_one_piece_at_a_time(workdir, texts)
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(rating.load_rater(workdir)(texts), expected, rtol=1e-5, atol=1e-6)
  quantiles = [record["datarater_quantile"] for record in records]
  expected = scipy.stats.rankdata(scores, "max") / len(scores)
  np.testing.assert_allclose(quantiles, expected, rtol=1e-6)


def test_a_score_does_not_depend_on_the_other_documents(workdir):
  rater, texts = rating.open_rater(str(workdir)), make_texts(150)
  order = np.random.default_rng(0).permutation(150)
  score = lambda texts: rating.score_texts(rater.score, texts, rater.tokenizer, 32)
  scores, tokens = score(texts)
  assert tokens == sum(len(p) for t in rater.tokenizer.encode(texts) for p in cut(t, 32))
  np.testing.assert_array_equal(scores[order], score([texts[i] for i in order])[0])
  alone = [score([text])[0][0] for text in texts[:20]]
  np.testing.assert_array_equal(scores[:20], alone)


def test_batches_hold_every_piece_once_and_have_few_shapes():
  tokenizer, texts = load_tokenizer("bytes"), ["a" * n for n in range(1, 200)]
  batches = list(rating.make_rows(texts, tokenizer, 33))
  assert {x.batch.tokens.shape for x in batches} == {
    (31, 33),
    (35, 29),
    (40, 25),
    (48, 21),
    (60, 17),
  }
  pieces = [
    (int(i), x.batch.tokens[row, :n].tolist())
    for x in batches
    for row, (i, n) in enumerate(zip(x.index, x.tokens, strict=True))
    if i >= 0
  ]
  expected = [
    (i, piece.tolist())
    for i, tokens in enumerate(tokenizer.encode(texts))
    for piece in cut(tokens, 33)
  ]
  assert sorted(pieces) == sorted(expected)
  for x in batches:
    assert (x.batch.segments.sum(-1) == x.tokens).all() and (x.batch.segments <= 1).all()
    assert (x.batch.tokens[x.batch.segments == 0] == tokenizer.pad).all()


def test_a_rater_that_diverged_and_one_that_has_not_learned_are_reported(
  job, tmp_path, monkeypatch, capsys
):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(40)])
  monkeypatch.setattr(rating, "score_rows", lambda score, rows, n, _: np.zeros(n, np.float32))
  job(path)
  assert "40 of 40 documents have the same score" in capsys.readouterr().out
  monkeypatch.setattr(
    rating, "score_rows", lambda score, rows, n, _: np.full(n, np.nan, np.float32)
  )
  with pytest.raises(UserError, match="diverged"):
    job(path)


def test_a_tokenizer_json_and_a_text_longer_than_a_sequence(tmp_path, job, monkeypatch):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
  tokenizer.train_from_iterator(make_texts(50), trainer)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  workdir = make_rater(tmp_path / "rater", seed=2, tokenizer=str(tmp_path / "tokenizer.json"))
  texts = make_texts(30, longest=300)
  path = write_lines(tmp_path / "in.jsonl", [{"body": {"text": t}} for t in texts])
  output = job(path, rater=str(workdir), text_field="body.text")
  scores = [record["datarater_score"] for record in read_jsonl(output)]
  expected = scores_one_piece_at_a_time(workdir, texts)
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
  assert manifest(output)["tokenizer"]["name"].endswith("tokenizer.json")


# Selection


def test_the_coin_is_a_hash_and_uniform():
  key = (7).to_bytes(8, "little")
  digest = hashlib.blake2b("é\ud800".encode("utf-8", "surrogatepass"), key=key, digest_size=8)
  expected = (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
  assert selection.coin(7, "é\ud800") == expected
  coins = [selection.coin(-1, str(i)) for i in range(20_000)]
  assert scipy.stats.kstest(coins, "uniform").pvalue > 1e-3
  other = [selection.coin(0, str(i)) for i in range(20_000)]
  assert abs(np.corrcoef(coins, other)[0, 1]) < 0.03


def test_quantiles_count_ties_as_equal():
  ordered = np.array([0, 1, 1, 1, 5], np.float32)
  quantiles = selection.quantiles(np.array([1, 5, 0, -1, 3], np.float32), ordered)
  np.testing.assert_allclose(quantiles, [0.8, 1, 0.2, 0, 0.8])


@pytest.mark.parametrize("B, discard", [(16, 0.5), (256, 0.75), (7, 0.1), (4, 0.0)])
def test_pointwise_selection_against_the_binomial_sum(B, discard):
  rng = np.random.default_rng(0)
  n, keep = 20_000, round((1 - discard) * B)
  quantiles = (rng.permutation(n) + 1).astype(np.float32) / n
  coins = rng.random(n)
  p = quantiles.astype(float)
  chance = sum(math.comb(B - 1, s) * (1 - p) ** s * p ** (B - 1 - s) for s in range(keep))
  keep_n = selection.pointwise(quantiles, coins, B, discard)
  clear = np.abs(coins - chance) > 1e-9
  assert clear.mean() > 0.999
  np.testing.assert_array_equal(keep_n[clear], (coins < chance)[clear])
  assert keep_n.mean() == pytest.approx(keep / B, abs=0.015)
  part = selection.pointwise(quantiles[:1500], coins[:1500], B, discard)
  np.testing.assert_array_equal(part, keep_n[:1500])
  assert selection.pointwise(quantiles[:0], coins[:0], B, discard).tolist() == []


@pytest.mark.parametrize("n, B, discard", [(500, 7, 0.3), (33, 32, 0.75), (5, 8, 0.5), (64, 8, 0)])
def test_top_k_against_a_loop(n, B, discard):
  scores = np.random.default_rng(1).integers(0, 9, n).astype(np.float32)  # with ties
  order, kept = np.random.default_rng(3).permutation(n), set()
  for start in range(0, n, B):
    batch = order[start : start + B]
    best = sorted(range(len(batch)), key=lambda i: (-scores[batch[i]], i))
    kept |= {int(batch[i]) for i in best[: round((1 - discard) * len(batch))]}
  keep_n = selection.top_k(scores, B, discard, seed=3)
  assert set(np.flatnonzero(keep_n)) == kept
  if n > B and discard:
    assert (selection.top_k(scores, B, discard, seed=4) != keep_n).any()


def kept_texts(output):
  return {r["text"] for r in read_jsonl(output) if r["datarater_keep"]}


def test_however_the_input_is_split_the_same_documents_are_kept(job, tmp_path):
  records = [{"text": t} for t in make_texts(300)]
  path = write_lines(tmp_path / "all.jsonl", records)
  whole = job(path, shard_records=300)
  kept = kept_texts(whole)
  assert kept_texts(job(path, shard_records=7)) == kept
  a = write_lines(tmp_path / "a.jsonl", records[100:])
  b = write_lines(tmp_path / "b.jsonl", records[:100][::-1])
  assert kept_texts(job(a, b)) == kept
  other = kept_texts(job(path, seed=1))
  assert 0 < len(other ^ kept)
  assert len(kept) / 300 == pytest.approx(0.5, abs=0.1)
  means = [
    np.mean([r["datarater_score"] for r in read_jsonl(whole) if r["datarater_keep"] == keep])
    for keep in (True, False)
  ]
  assert means[0] > means[1]


def test_a_top_k_run_keeps_the_exact_share_and_the_manifest_says_so(job, tmp_path):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(128)])
  output = job(path, selection="top_k", discard=0.75, shard_records=50)
  lines, facts = read_jsonl(output), manifest(output)
  assert sum(x["datarater_keep"] for x in lines) == facts["kept"] == 32
  scores = np.array([x["datarater_score"] for x in lines], np.float32)
  expected = selection.top_k(scores, 16, 0.75, seed=0)
  assert [x["datarater_keep"] for x in lines] == expected.tolist()
  assert facts["selection"] == {
    "selection": "top_k", "discard": 0.75, "batch_size": 16, "seed": 0, "keep_of_batch": 4
  }  # fmt: skip
  assert [f["documents"] for f in facts["files"]] == [50, 50, 28]
  assert sum(f["kept"] for f in facts["files"]) == 32
  assert facts["records"] == facts["documents"] == 128 and facts["rejected"] == {}
  cdf = dict(zip(facts["cdf"]["quantile"], facts["cdf"]["score"], strict=True))
  ordered = np.sort(scores)
  assert (cdf[0], cdf[0.5], cdf[1]) == pytest.approx((ordered[0], ordered[63], ordered[-1]))
  rater = rating.open_rater(facts["rater"]["workdir"])
  assert facts["rater"]["fingerprint"] == rater.fingerprint
  assert facts["tokenizer"] == {"name": "bytes", "fingerprint": "bytes", "entries": 258}


# Interruption


class Crash(BaseException):
  """Ends a run as kill -9 does: nothing catches it on the way."""


def test_a_crash_before_or_after_any_file_appears_changes_nothing_in_the_end(
  job, tmp_path, monkeypatch
):
  records = [{"text": t, "i": i} for i, t in enumerate(make_texts(70))]
  records[7], records[64] = {"text": 1}, b"{"
  path = write_lines(tmp_path / "in.jsonl", records)
  whole = contents(job(path, output=tmp_path / "whole"))
  assert {"part-00004.jsonl", "rejects.jsonl", "manifest.json", "config.json"} <= set(whole)
  replace, crashes = os.replace, 0
  for after in (False, True):
    output = tmp_path / f"crashed{after}"
    for _ in range(40):

      def crash(source, target, count=iter(range(100)), after=after):
        if next(count) == 1 - after:  # one file more in each run
          if after:
            replace(source, target)
          raise Crash
        replace(source, target)

      monkeypatch.setattr(os, "replace", crash)
      try:
        job(path, output=output)
        break
      except Crash:
        crashes += 1
        monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "replace", replace)
    job(path, output=output)  # finished: changes nothing
    assert contents(output) == whole
  assert crashes > 15


def command(workdir, output, *flags):
  return [sys.executable, "curate.py", f"--rater={workdir}", f"--output={output}", *flags]


@pytest.fixture(scope="module")
def environment(cache):
  """Programs are compiled as in this process: the same bytes."""
  return jobs.environment(cache)


def run(environment, *arguments):
  return subprocess.run(
    arguments, cwd=jobs.ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


def test_killed_three_times_the_output_is_the_same_bytes(job, workdir, tmp_path, environment):
  texts = make_texts(1200)
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in texts] + [b"{"])
  flags = [f"--data={path}", "--discard=0.5", "--shard_records=8"]
  output, rng = tmp_path / "killed", random.Random(0)
  left = []
  for pattern, count in (("scores/*", 3), ("scores/*", 90), ("part-*", 40)):
    process = subprocess.Popen(
      command(workdir, output, *flags),
      cwd=jobs.ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while len(list(output.glob(pattern))) < count and process.poll() is None:
      assert time.monotonic() < end
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"
    left.append(len(list(output.glob(pattern))))
  result = run(environment, *command(workdir, output, *flags))
  assert result.returncode == 0, result.stderr
  assert left[0] < 151 > left[2] and not (output / "scores").exists()
  whole = job(path, output=tmp_path / "whole", shard_records=8, batch_size=256)
  assert contents(output) == contents(whole)


def test_ctrl_c_stops_at_the_next_batch_and_the_rest_follows(job, tmp_path, monkeypatch, capsys):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(64)])
  whole = contents(job(path, output=tmp_path / "whole"))
  score_rows, calls = rating.score_rows, iter(range(99))

  def interrupted(*arguments):
    if next(calls) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return score_rows(*arguments)

  monkeypatch.setattr(rating, "score_rows", interrupted)
  output = job(path, output=tmp_path / "stopped")
  assert "stopped: start again" in capsys.readouterr().out
  assert sorted(p.name for p in output.rglob("*.npz")) == ["00000.npz", "00001.npz"]
  assert contents(job(path, output=output)) == whole


def test_shards_and_parts_that_lack_one_between_them_are_completed(job, tmp_path, monkeypatch):
  """As several hosts leave them when one was slower or died."""
  lines = [{"text": t, "x": i} for i, t in enumerate(make_texts(80))]
  lines[20] = {"text": 1}  # in a shard that is scored again
  lines[70] = b"{"  # in one that is not
  path = write_lines(tmp_path / "in.jsonl", lines)
  whole = contents(job(path, output=tmp_path / "whole"))
  scored, written = [], []
  score_rows, write, output = rating.score_rows, records.write, tmp_path / "gaps"

  def count_scored(score, rows, n, progress):
    scored.append(n)
    return score_rows(score, rows, n, progress)

  def crash_at_end(path, *arguments):
    if path.name == end:
      raise Crash
    written.append(path.name)
    return write(path, *arguments)

  monkeypatch.setattr(rating, "score_rows", count_scored)
  monkeypatch.setattr(records, "write", crash_at_end)
  end = "part-00000.jsonl"
  with pytest.raises(Crash):
    job(path, output=output)
  assert scored == [16, 15, 16, 16, 15]
  for gaps, again in (([1], [15]), ([0, 2], [16, 16]), ([4], [15]), ([], [])):
    for i in gaps:
      (output / "scores" / f"0000{i}.npz").unlink()
    scored.clear()
    end = "part-00003.jsonl" if not gaps else end
    with pytest.raises(Crash):
      job(path, output=output)
    assert scored == again
  assert written == [f"part-0000{i}.jsonl" for i in range(3)]
  (output / "part-00001.jsonl").unlink()
  written.clear(), (end := None)
  assert contents(job(path, output=output)) == whole
  assert written == [f"part-0000{i}.jsonl" for i in (1, 3, 4)]


def test_shards_are_bounded_in_bytes_and_do_not_depend_on_where_reading_starts(
  tmp_path, monkeypatch
):
  lines = [{"text": "x" * n} for n in np.random.default_rng(0).integers(1, 400, 90).tolist()]
  lines[30], lines[60] = {"text": "y" * 5000}, {"text": 1}
  path = write_lines(tmp_path / "in.jsonl", lines)
  monkeypatch.setattr(local, "SHARD_BYTES", 1000)
  settings = curation.job.Config(rater="any", data=(path,), score_only=True, shard_records=8)
  job = curation.job.Job(settings, None, find_inputs((path,)), DataConfig((path,)), "jsonl")
  shards = list(local.read(job, [], lambda number: True))
  assert [x.value for shard in shards for x in shard.records] == lines
  sizes = [[len(x.original) for x in shard.records] for shard in shards]
  assert all(sum(size) <= 1000 or len(size) == 1 for size in sizes)
  fits = lambda size, more: sum(size) + more[0] <= 1000 and len(size) < 8
  assert not any(map(fits, sizes, sizes[1:]))  # none could have been larger
  assert max(map(len, sizes)) == 8 and min(map(len, sizes)) == 1
  documents = np.cumsum([len(shard.usable) for shard in shards])
  assert [shard.documents for shard in shards] == documents.tolist()
  done = [local.Scored(None, None, local.describe(job, shard)) for shard in shards]
  for start in range(len(shards)):
    assert list(map(str, local.read(job, done[:start], lambda number: True))) == list(
      map(str, shards[start:])
    )


def test_shards_of_few_bytes_resume_to_the_same_bytes(job, tmp_path, monkeypatch):
  monkeypatch.setattr(local, "SHARD_BYTES", 2000)
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(64)])
  whole = job(path, output=tmp_path / "whole", shard_records=100)
  assert len(list(whole.glob("part-*"))) > 4
  score_rows, calls, output = rating.score_rows, iter(range(99)), tmp_path / "stopped"

  def interrupted(*arguments):
    if next(calls) == 2:
      raise Crash
    return score_rows(*arguments)

  monkeypatch.setattr(rating, "score_rows", interrupted)
  with pytest.raises(Crash):
    job(path, output=output, shard_records=100)
  job(path, output=output, shard_records=100)
  assert contents(output) == contents(whole)


@pytest.mark.parametrize("hosts", [1, 2, 3, 12])
@pytest.mark.parametrize("done", [(), (0,), (0, 1, 3), (0, 1, 2, 9), (1, 4, 5), range(9)])
def test_hosts_score_what_is_not_done_once_in_as_many_rounds(hosts, done, tmp_path, monkeypatch):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(75)] + [b"{"])
  settings = curation.job.Config(rater="any", data=(path,), score_only=True, shard_records=8)
  job = curation.job.Job(settings, None, find_inputs((path,)), DataConfig((path,)), "jsonl")
  everything = list(local.read(job, [], lambda number: True))
  assert [len(shard.usable) for shard in everything] == [8] * 9 + [3]
  abouts = [local.describe(job, shard) for shard in everything]
  scored = {i: local.Scored(np.zeros(8), np.zeros(8), abouts[i]) for i in done}
  start = local.unbroken(scored)
  monkeypatch.setattr(local, "prepare", lambda job, shard: ([x.value for x in shard.usable],))
  monkeypatch.setattr(jax, "process_count", lambda: hosts)
  taken, ends = [], []
  for host in range(hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    rounds = list(local.prepared(job, scored, start))
    assert len(rounds) == -(-(10 - len(start)) // hosts)
    assert all(len(own) <= 1 for own, _ in rounds)
    taken += [shard for own, _ in rounds for shard in own]
    ends.append([after for _, after in rounds])
  assert ends == [ends[0]] * hosts and ends[0][-1] == 75
  expected = [(i, [x.value for x in everything[i].usable]) for i in range(10) if i not in done]
  assert sorted(taken, key=lambda shard: shard[0]) == expected


def test_another_configuration_input_or_rater_is_refused_untouched(job, tmp_path, monkeypatch):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(20)])
  output = job(path)
  before = sorted((p, p.stat().st_mtime_ns) for p in output.rglob("*"))
  with pytest.raises(UserError, match="discard was 0.5, is 0.6.*use another --output"):
    job(path, output=output, discard=0.6)
  other = make_rater(tmp_path / "other", seed=5)
  with pytest.raises(UserError, match="scored by"):
    monkeypatch.setattr(curation.job, "open_rater", lambda _: OPEN(str(other)))
    job(path, output=output)
  monkeypatch.undo()
  write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(21)])
  with pytest.raises(UserError, match="corpus was"):
    job(path, output=output)
  assert sorted((p, p.stat().st_mtime_ns) for p in output.rglob("*")) == before


@pytest.mark.parametrize("count", [1, 32, 47, 49, 64])
def test_an_input_that_changes_between_the_passes_is_noticed(count, job, tmp_path, monkeypatch):
  path = tmp_path / "in.jsonl"
  write_lines(path, [{"text": t} for t in make_texts(48)])  # three shards
  select = local.select

  def change(*arguments):
    write_lines(path, [{"text": t} for t in make_texts(count)])
    return select(*arguments)

  monkeypatch.setattr(local, "select", change)
  with pytest.raises(UserError, match="changed while it was read"):
    job(path)


# Bad input


def test_bad_records_are_listed_with_place_and_reason_and_stop_nothing(job, tmp_path):
  good = [{"text": t} for t in make_texts(40)]
  bad = [
    b'{"text": "cut',
    b'{"text": "\xff"}',
    b"[1]",
    {"text": None},
    {"text": 5},
    {"text": "  "},
    {"text": "x", "datarater_keep": None},
  ]
  path = write_lines(tmp_path / "in.jsonl", [*bad[:3], *good, b"", *bad[3:]])
  output = job(path, max_bad_fraction=0.2, shard_records=5)
  assert len(read_jsonl(output)) == 40
  reasons = ["broken JSON", "invalid UTF-8", "not a JSON object", "without a value in 'text'"]
  reasons += ["'text' is not text but int", "empty text", "has a field 'datarater_keep' already"]
  rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
  assert rejects == [
    {"file": path, "record": number, "reason": reason}
    for number, reason in zip([1, 2, 3, 45, 46, 47, 48], reasons, strict=True)
  ]
  assert manifest(output)["records"] == 47
  assert manifest(output)["rejected"] == dict.fromkeys(reasons, 1)
  for limit in (0.14, 0.0):
    with pytest.raises(UserError, match="7 of 47 records are unusable.*max_bad_fraction"):
      job(path, max_bad_fraction=limit, shard_records=5)


def test_a_curated_file_is_not_curated_again(job, tmp_path):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(20)])
  output = job(path)
  with pytest.raises(UserError, match="16 has a field 'datarater_score' already"):
    job(output / "part-00000.jsonl", shard_records=100)


def test_max_documents_and_many_bad_records_in_a_long_file(job, tmp_path):
  records = [{"text": "x"}] * 5 + [b"{"] * 995 + [{"text": "y"}] * 9000
  path = write_lines(tmp_path / "in.jsonl", records)
  assert manifest(job(path, max_documents=5))["documents"] == 5
  with pytest.raises(UserError, match="995 of 1000"):
    job(path)


@pytest.mark.parametrize(
  "flags, message",
  [
    (dict(discard=1.0), "--discard=1.0 must be below 1"),
    (dict(discard=-0.1), "--discard=-0.1 must be at least 0"),
    (dict(discard=None), "--score_only"),
    (dict(discard=0.99), "keeps none of a batch of 16"),
    (dict(selection="best"), "--selection=best is unknown: choose one of pointwise, top_k"),
    (dict(format="csv"), "--format=csv is unknown: choose one of jsonl, parquet"),
    (dict(batch_size=0), "--batch_size=0 must be at least 1"),
    (dict(batch_size=2**21), "at most 2"),
    (dict(text_field="body"), "set --text_field to"),
    (dict(runner="DirectRunner", selection="top_k"), "use pointwise"),
    (dict(runner="DirectRunner", max_documents=3), "leave it out"),
    (dict(runner="NoSuchRunner"), "--runner=NoSuchRunner"),
    (dict(runner="DirectRunner", format="parquet"), "use jsonl"),
  ],
)
def test_mistakes_are_named_with_the_fix(flags, message, job, tmp_path):
  if "runner" in flags:
    pytest.importorskip("apache_beam")
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(20)])
  with pytest.raises(UserError, match=message):
    job(path, output=tmp_path / "out", **flags)
  assert not (tmp_path / "out").exists() or "format" in flags  # the next run can use it


@pytest.mark.parametrize("runner", [None, "DirectRunner"])
def test_files_that_cannot_be_read_are_named(runner, job, tmp_path):
  if runner:
    pytest.importorskip("apache_beam")
  path = write_lines(tmp_path / "in.jsonl", [{"text": str(i)} for i in range(1100)])
  (tmp_path / "plain.parquet").write_text("text")
  with pytest.raises(UserError, match="plain.parquet cannot be read"):
    job(tmp_path / "plain.parquet", runner=runner)
  cut = gzip.compress(random.Random(0).randbytes(99_999))[:50_000]
  (tmp_path / "z.jsonl.gz").write_bytes(cut)
  with pytest.raises(UserError, match="z.jsonl.gz cannot be read to its end"):
    job(path, tmp_path / "z.jsonl.gz", runner=runner, shard_records=500)


def test_output_must_be_apart_from_the_input_and_empty(job, tmp_path):
  (tmp_path / "in").mkdir()
  path = write_lines(tmp_path / "in" / "in.jsonl", [{"text": t} for t in make_texts(20)])
  for name in ("in", "in/out"):
    with pytest.raises(UserError, match="overlap"):
      job(path, tmp_path / "in", output=tmp_path / name)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "note.txt").write_text("x")
  with pytest.raises(UserError, match="neither empty nor a run"):
    job(path, output=tmp_path / "full")
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="--output=.*is a file"):
    job(path, output=tmp_path / "file")


def test_from_the_command_line_mistakes_are_one_line(workdir, tmp_path, environment, cache):
  path = write_lines(tmp_path / "in.jsonl", [{"text": t} for t in make_texts(20)])
  (tmp_path / "apache_beam.py").write_text("raise ImportError('No module named apache_beam')")
  without_beam = environment | {"PYTHONPATH": str(tmp_path)}
  good = [*command(workdir, tmp_path / "o")[2:], f"--data={path}", "--discard=0.5"]
  result = run(without_beam, sys.executable, "curate.py", *good, "--runner=DirectRunner")
  jobs.assert_one_line_error(result, "pip install -e '.[beam]'")
  assert result.returncode == 2
  for wrong, message in (
    ([f"--rater={tmp_path / 'none'}"], "no run"),
    (["--runner=DirectRunner", "--coordinator=localhost:1"], "leave one out"),
    (["--process_id=0"], "go with --coordinator"),
  ):
    result = jobs.run("curate.py", cache, *good, *wrong)
    jobs.assert_one_line_error(result, message)
    assert result.returncode == 2


# Beam


def sorted_records(output):
  return sorted(b"".join(p.read_bytes() for p in output.glob("part-*")).splitlines())


@pytest.mark.parametrize("score_only", [False, True])
def test_beam_gives_the_same_lines_rejects_and_manifest(score_only, job, tmp_path):
  pytest.importorskip("apache_beam")
  records = [{"text": t, "i": i} for i, t in enumerate(make_texts(330, longest=200))]
  records[5], records[100] = b"{", {"text": "é", "datarater_score": 1}
  a = write_lines(tmp_path / "a.jsonl", records[:300] + [line.encode() for line in NASTY_LINES])
  (tmp_path / "b.jsonl.gz").write_bytes(
    gzip.compress(b"\n".join(json.dumps(r).encode() for r in records[300:]))
  )
  flags = dict(score_only=score_only)
  here = job(a, tmp_path / "b.jsonl.gz", shard_records=37, **flags)
  beam = job(a, tmp_path / "b.jsonl.gz", runner="DirectRunner", **flags)
  assert sorted_records(beam) == sorted_records(here)
  lines = [sorted((x / "rejects.jsonl").read_text().splitlines()) for x in (here, beam)]
  assert lines[0] == lines[1] and len(lines[0]) == 2
  facts = [manifest(x) | {"files": None} for x in (here, beam)]
  assert facts[0] == facts[1]
  left = {p.name for p in beam.iterdir() if not p.name.startswith("part-")}
  assert left == {"config.json", "manifest.json", "rejects.jsonl"}


def test_beam_keeps_parquet_and_refuses_too_many_bad_records(job, tmp_path):
  pytest.importorskip("apache_beam")
  pa.parquet.write_table(nasty_table(make_texts(50)), tmp_path / "in.parquet")
  flags = dict(text_field="meta.text")
  here, beam = (
    read_parquet(job(tmp_path / "in.parquet", **flags, **more)).sort_by("ns")
    for more in ({}, {"runner": "DirectRunner"})
  )
  assert beam.schema.equals(here.schema)
  assert repr(beam.drop_columns("ns").to_pylist()) == repr(here.drop_columns("ns").to_pylist())
  assert beam["ns"].cast("int64").to_pylist() == here["ns"].cast("int64").to_pylist()
  path = write_lines(tmp_path / "bad.jsonl", [{"text": "x"}] * 3 + [b"{"] * 3)
  with pytest.raises(UserError, match="3 of 6"):
    job(path, runner="DirectRunner")
