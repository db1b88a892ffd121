"""demo.py: the noise, the cutting, the build with and without packages."""

import json

import numpy as np
import pytest

from corpus import demo


def test_corrupt_replaces_the_given_fraction():
  text = "é" * 20_000  # replaced characters are ASCII, so that they can be counted
  for level in (0.0, 0.3, 1.0):
    noisy = demo.corrupt(text, level, np.random.default_rng(0))
    replaced = [character for character in noisy if character != "é"]
    assert len(noisy) == len(text)
    assert len(replaced) / len(text) == pytest.approx(level, abs=0.02)
    assert all(" " <= character <= "~" for character in replaced)
    if level:
      assert len(set(replaced)) == 95
  odd = "a\ud800\U0001f600\n"
  assert demo.corrupt(odd, 0.0, np.random.default_rng(0)) == odd
  same = [demo.corrupt(text, 0.5, np.random.default_rng(7)) for _ in range(2)]
  assert same[0] == same[1]


def test_cut_keeps_order_and_bounds():
  text = "\n\n".join(f"paragraph {i} " + "word " * (i % 90) for i in range(2000))
  parts = list(demo._cut(text, np.random.default_rng(0)))
  lengths = [len(part) for part in parts]
  assert min(lengths) >= demo.MIN_CHARS and max(lengths) <= demo.MAX_CHARS
  position = 0
  for part in parts:
    position = text.index(part, position) + len(part)
  assert sum(lengths) > 0.97 * len(text)


def test_strip_markup():
  source = (
    "{{Infobox|a={{nested}}}}'''Bold''' [[link|shown]] [[plain]]<ref name=x>note</ref>\n"
    "== Head ==\n* item [[File:x.png|thumb|a [[linked]] caption]]\n{| class=x\n| cell\n|}"
    "[[Category:C]]"
  )
  assert demo._strip_markup(source).split() == "Bold shown plain Head item".split()


def test_without_packages_python_help_remains(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(demo, "_fetch", lambda *args: "no network")
  output = demo.build(tmp_path / "new" / "demo.jsonl")
  records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
  assert {record["source"] for record in records} == {"python_help"} and len(records) > 50
  errors = capsys.readouterr().err
  assert "no package could be fetched" in errors and "gensim==4.4.0: no network" in errors
  assert sorted(path.name for path in output.parent.iterdir()) == ["SOURCES.md", "demo.jsonl"]
  before = output.stat().st_mtime_ns
  demo.build(output)  # incomplete: tried again, and nothing better found
  assert output.stat().st_mtime_ns == before


def test_the_corpus_is_complete_and_building_it_again_is_instant(monkeypatch):
  output = demo.build()  # at most once on a machine: under a minute
  table = (output.parent / "SOURCES.md").read_text(encoding="utf-8")
  monkeypatch.setattr(demo, "_fetch", None)
  if missing := [source.name for source in demo.SOURCES if source.name not in table]:
    pytest.skip(f"built without {', '.join(missing)} (no network)")
  demo.build()
  with open(output, encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  assert len({record["id"] for record in records}) == len(records) > 8000
  lengths = [len(record["text"]) for record in records]
  assert min(lengths) >= 200 and max(lengths) <= 8000 and 1500 < np.median(lengths) < 2200
  for source in demo.SOURCES:
    size = sum(len(r["text"].encode()) for r in records if r["source"] == source.name)
    assert 20_000 < size <= demo.MAX_SOURCE_BYTES, source.name
