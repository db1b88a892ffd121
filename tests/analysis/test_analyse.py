"""analyse.py: known mixtures, correlations and fits; a page that is whole, inert and fits."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import jobs
import numpy as np
import pytest

import config as settings
from analysis import explain, figures, page
from analysis.heuristics import NAMES, heuristics
from analysis.units import Config, Units, read_units
from corpus.batches import load_corpus
from corpus.documents import split_of
from corpus.tokenizer import load_tokenizer
from rating import TrainedRater, open_rater
from runtime.cli import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")

HEADER = {"rater": "runs/<i>x", "fingerprint": "f0", "size": "nano", "data": "d", "units": "u"}
HEADER |= {"command": "python analyse.py --data='a&b'"}


def units(n=200, sources=("a", "b", "c"), seed=0):
  """Random units, whose score is -10 times the share of punctuation and some noise."""
  rng = np.random.default_rng(seed)
  words = np.array("The rater likes. some Words! more, {than} others; 42 of them 7".split())
  texts = [
    "\n".join(" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(rng.integers(1, 6)))
    for _ in range(n)
  ]
  features = np.array([list(heuristics(text).values()) for text in texts])
  scores = -10 * features[:, NAMES.index("punctuation_fraction")] + rng.normal(0, 0.1, n)
  return Units(
    kind="document",
    texts=texts,
    ids=[f"id{i}" for i in range(n)],
    source=np.array(sources)[rng.integers(0, len(sources), n)],
    noise=rng.choice([0, 0.2, 0.4, 0.8], n),
    scores=scores.astype(np.float32),
    features=features,
  )


def rendered(u):
  return page.render(u, HEADER, explain.analyse(u))


NASTY = [
  "<script>alert(1)</script></pre></article><img src=http://x.example/y.png onerror=alert(2)>",
  "&lt;b&gt; &amp; \"quoted\" 'too' ]]> --> <!-- <details>",
  "\0\x01\x1b[31m\x7f\x85\r\nCR LF\r\nthen \ud800 and \udfff, \ufeff\u2028\ufffe",
  "\u202eright to left override \u2066 \u200f\u200b",
  "שלום עולם, مرحبا بالعالم\nעוד שורה",
  "Z" + "\u0300\u0336\u0489" * 300 + " combining",
  "x" * 50_000,
  "\n" * 500 + "far below",
  "\t" * 200 + "far right",
  "👩‍👩‍👧‍👦🙂" * 300,
  " ",
]


def nasty_units():
  u = units()
  sources = [*u.source.tolist()]
  sources[:8] = [*["$x^2_$"] * 4, "<script>", "\u202eweb", "y" * 300, "\ud800"]
  scores = u.scores.copy()
  scores[: len(NASTY)] = -50 - np.arange(
    len(NASTY)
  )  # the lowest: all are shown, overall or by source
  ids = ["</header>\0", *u.ids[1:]]
  texts = [*NASTY, *u.texts[len(NASTY) :]]
  return u._replace(texts=texts, source=np.array(sources), scores=scores, ids=ids)


# Numbers.


def test_mixture_equals_sorting_by_hand_at_every_discard():
  rng = np.random.default_rng(1)
  n = 97
  scores = rng.integers(0, 20, n).astype(np.float32)  # many ties: the earlier stays
  source = rng.choice(["x", "y", "z"], n, p=[0.7, 0.2, 0.1])
  mixture = explain.implied_mixture(scores, source, explain.DISCARDS)
  ranked = sorted(range(n), key=lambda i: (-scores[i], i))
  assert len(explain.DISCARDS) == 10 and list(mixture) == ["x", "y", "z"]
  for k, discard in enumerate(explain.DISCARDS):
    kept = ranked[: round((1 - discard) * n)]
    for name in "xyz":
      share = sum(source[i] == name for i in kept) / len(kept)
      assert mixture[name][k] == pytest.approx(share, abs=1e-7)


def test_scores_by_source_by_hand():
  scores = np.array([1, 2, 3, 10, -50, 99], np.float32)
  noise = np.array([0, 0, np.nan, 0, 0.5, 0.5])  # corrupted: one of a, and all of c
  table = explain.by_source(scores, noise, np.array(["b", "b", "b", "a", "a", "c"]))
  assert list(table) == ["a", "b", "c"]
  assert (table["a"]["mean"], table["a"]["units"], table["a"]["corrupted"]) == (10, 1, 1)
  assert (table["c"]["mean"], table["c"]["units"], table["c"]["corrupted"]) == (99, 1, 1)
  assert table["b"] == {
    "units": 3,
    "corrupted": 0,
    "mean": 2,
    "std": pytest.approx((2 / 3) ** 0.5),
    "lowest": 1,
    "lower_quartile": 1.5,
    "median": 2,
    "upper_quartile": 2.5,
    "highest": 3,
  }


def linear(n, noise, seed=0):
  """Independent features and y = 2 f0 - f5 + 0.5 f9 + noise; the true share explained."""
  rng = np.random.default_rng(seed)
  scale, shift = rng.uniform(0.1, 1000, len(NAMES)), rng.normal(0, 100, len(NAMES))
  z = rng.normal(size=(n, len(NAMES)))
  y = 2 * z[:, 0] - z[:, 5] + 0.5 * z[:, 9] + noise * rng.normal(size=n)
  return z * scale + shift, y.astype(np.float32), 5.25 / (5.25 + noise**2)


def test_fits_recover_a_known_linear_score():
  features, y, explained = linear(6000, noise=1.5)
  result = explain.explain(features, y)
  total = np.sqrt(5.25 / explained)
  for i, weight in {0: 2, 5: -1, 9: 0.5, 3: 0}.items():
    r = result["pearson"][NAMES[i]]
    assert r["r"] == pytest.approx(weight / total, abs=0.04)
    assert r["ci95"][0] < r["r"] < r["ci95"][1] and 0.01 < r["ci95"][1] - r["ci95"][0] < 0.06
    assert r["r"] == pytest.approx(np.corrcoef(features[:, i], y)[0, 1], abs=1e-6)
    assert result["ols"]["coefficients"][NAMES[i]] == pytest.approx(weight / total, abs=0.04)
  assert result["ols"]["r2"] == pytest.approx(explained, abs=0.015)
  assert result["lasso"]["r2_mean"] == pytest.approx(explained, abs=0.02)
  # Of independent z-scores Lasso takes alpha off each coefficient, towards 0.
  expected = {0: 2 / total - 0.03, 5: -1 / total + 0.03, 9: 0.5 / total - 0.03}
  assert list(result["lasso"]["coefficients"]) == [NAMES[i] for i in expected]
  for i, value in expected.items():
    assert result["lasso"]["coefficients"][NAMES[i]] == pytest.approx(value, abs=0.02)


def test_a_score_of_pure_chance_is_explained_in_sample_only():
  features, y, _ = linear(60, noise=1)
  result = explain.explain(features, np.random.default_rng(2).normal(size=60).astype(np.float32))
  assert result["ols"]["r2"] > 0.2  # 23 coefficients fitted to 60 scores
  assert result["lasso"]["r2_mean"] < 0.1


def test_constant_heuristics_are_named_and_copies_of_others_change_no_r2():
  features, y, explained = linear(2000, noise=1)
  plain = explain.explain(features, y)
  features[:, 1] = 7
  features[:, 2] = 3 * features[:, 0] - 1  # a copy
  features[:, 4] = features[:, 5] / 7 + features[:, 6]
  result = explain.explain(features, y)
  assert result["constant"] == [NAMES[1]]
  assert (result["ols"]["heuristics"], result["ols"]["rank"]) == (22, 20)
  assert result["ols"]["r2"] == pytest.approx(plain["ols"]["r2"], abs=0.01)
  both = [result["ols"]["coefficients"][NAMES[i]] for i in (0, 2)]
  assert both[0] == pytest.approx(both[1], rel=1e-6)  # least norm: shared alike
  json.dumps(result, allow_nan=False)


# What is rated.


def fake_rater(**options):
  """Rates the first letters: the sum of a row's first two tokens."""
  config = settings.Config(sequence_length=32, **options)
  score = lambda eta, batch: np.asarray(batch.tokens[:, :2].sum(axis=1), np.float32)
  return TrainedRater(config, load_tokenizer("bytes"), None, score, 0, "f")


@pytest.fixture
def letters(tmp_path):
  path = tmp_path / "letters.jsonl"
  texts = [chr(97 + i % 26) * (3 + i % 11) + str(i) for i in range(600)]
  path.write_text("".join(json.dumps({"text": t, "source": t[0]}) + "\n" for t in texts))
  return path


def test_packed_runs_are_rated_by_packed_sequence(letters, tmp_path):
  rater = fake_rater(data=(str(letters),), packing="pack", validation_fraction=0.5)
  u = read_units(Config(), rater, tmp_path / "cache")
  corpus = load_corpus(rater.config, tmp_path / "cache", progress=False)
  assert (
    u.kind == "packed sequence" and len(u.texts) == len(corpus.splits["validation"].tokens) > 64
  )
  documents = sorted(text for row in u.texts for text in row.split("\n"))
  assert documents == sorted(d.text for d in corpus.validation_documents())
  columns = dict(zip(NAMES, u.features.T, strict=True))
  articles = [row.count("\n") + 1 for row in u.texts]
  assert columns["num_articles"].tolist() == articles and len(set(articles)) > 1
  filled = [len(row) - row.count("\n") + n for row, n in zip(u.texts, articles, strict=True)]
  np.testing.assert_allclose(
    columns["packing_density"], np.array(filled) / 32
  )  # a start token each
  assert u.scores.tolist() == [257 + ord(row[0]) for row in u.texts]
  some = read_units(Config(documents=20), rater, tmp_path / "cache")
  assert len(some.texts) == 20 and set(some.ids) < set(u.ids)


def test_other_runs_are_rated_by_document_and_seen_by_neither_loop(letters, tmp_path):
  rater = fake_rater(data=(str(letters),), validation_fraction=0.3)
  u = read_units(Config(), rater, tmp_path / "cache")
  config = rater.config
  assert u.kind == "document" and {split_of(t, config)[0] for t in u.texts} == {"validation"}
  columns = dict(zip(NAMES, u.features.T, strict=True))
  assert set(columns["num_articles"]) == {1}
  np.testing.assert_allclose(columns["packing_density"], [(len(t) + 1) / 32 for t in u.texts])


def test_a_sample_of_other_data_does_not_depend_on_its_order(letters, tmp_path):
  lines = letters.read_text().splitlines(keepends=True)
  turned = tmp_path / "turned.jsonl"
  turned.write_text("".join(lines[::-1]).replace('"text"', '"body"'))
  rater = fake_rater(packing="pack")
  config = Config(data=(str(letters),), documents=50)
  u = read_units(config, rater, tmp_path)
  config = Config(data=(str(turned),), documents=50, text_field="body")
  again = read_units(config, rater, tmp_path)
  assert u.kind == "document" and len(u.texts) == 50 and u.texts == again.texts
  assert len(set(u.source)) > 15


def test_what_cannot_be_analysed_is_told_in_one_line(letters, tmp_path):
  config = Config(data=(str(letters),))
  silent = fake_rater()._replace(apply=lambda eta, batch: np.zeros(len(batch.tokens), np.float32))
  with pytest.raises(UserError, match="the same score"):
    read_units(config, silent, tmp_path)
  broken = fake_rater()._replace(apply=lambda eta, batch: np.full(len(batch.tokens), np.nan))
  with pytest.raises(UserError, match="not finite"):
    read_units(config, broken, tmp_path)
  few = tmp_path / "few.jsonl"
  few.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(19)))
  with pytest.raises(UserError, match="19 documents to rate, 20 are needed"):
    read_units(Config(data=(str(few),)), fake_rater(), tmp_path)
  with pytest.raises(UserError, match="--documents=3"):
    Config(documents=3)


# The page.


class Page(html.parser.HTMLParser):
  """Tags, attributes and text of a page; complains about tags that do not pair."""

  EMPTY = {"meta", "img", "br"}

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    self.open += [] if tag in self.EMPTY else [tag]

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, text):
    self.text.append(text)


def test_the_page_is_whole_and_fetches_and_runs_nothing():
  text = rendered(nasty_units())
  p = Page(text)
  assert not {"script", "img", "iframe", "link", "object", "base", "form"} & set(p.tags)
  assert p.tags.count("svg") == 5
  for name, value in p.attributes:
    assert not name.startswith("on") and name not in ("src", "action", "srcset")
    assert "http" not in (value or "") and "javascript:" not in (value or "")
    if name in ("href", "xlink:href"):
      assert value.startswith("#")
  assert "@import" not in text and not re.search(r"url\((?!#)", text)
  ids = [value for name, value in p.attributes if name == "id"]
  assert len(ids) == len(set(ids)) > 50
  used = {v[1:] for n, v in p.attributes if n in ("href", "xlink:href")}
  assert used | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
  assert "nan" not in re.findall(r"[a-z]+", " ".join(v or "" for n, v in p.attributes if n == "d"))


def test_nasty_text_is_shown_as_text():
  text = rendered(nasty_units())
  shown = "".join(Page(text).text)
  assert NASTY[0] in shown and NASTY[1] in shown
  assert "<U+0000><U+0001><U+001B>[31m<U+007F><U+0085><U+000D>\nCR LF<U+000D>\nthen" in shown
  assert "<U+D800> and <U+DFFF>, <U+FEFF><U+2028><U+FFFE>" in shown
  assert "<U+202E>right to left override <U+2066> <U+200F><U+200B>" in shown
  assert "שלום עולם, مرحبا بالعالم" in shown and "$x^2_$" in shown
  assert "44,000 more characters are not shown" in shown
  assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_the_page_is_a_function_of_its_arguments():
  assert rendered(units()) == rendered(units())


def test_lowest_and_highest_are_at_their_places():
  u = units()
  shown = rendered(u)
  parts = re.split("<h3>(?:Lowest|At|Highest)[^<]*</h3>", shown)
  low, middle, high, by_source = [re.findall(r"<bdi>(id\d+)</bdi>", part) for part in parts[1:]]
  ranked = [u.ids[i] for i in np.argsort(u.scores)]
  assert low == ranked[:6] and high == ranked[::-1][:6]
  assert middle == ranked[98:102]
  for name in "abc":
    mine = [i for i in ranked if u.source[u.ids.index(i)] == name]
    assert {*mine[:2], *mine[-2:]} <= set(by_source)


def test_many_sources_are_grouped_and_one_source_or_no_noise_are_no_error():
  u = units(sources=[f"source-{i}" for i in range(60)])
  many = rendered(u)
  assert "41 other sources" in many and many.count('class="swatch"') == 20
  last = re.search(r"41 other sources</td>(.*?)</tr>", many)[1]
  cells = [float(x) for x in re.findall(r"[\d.]+", last.replace("td", ""))]
  largest = sorted(map(u.source.tolist().count, set(u.source)))[-19:]
  assert many.count("The 19 most frequent of 60 sources are shown by name") == 3
  assert "are shown by name" not in rendered(units())
  assert len(cells) == 10 and cells[0] == pytest.approx(100 * (1 - sum(largest) / 200), abs=0.06)
  one = units(sources=("all",))
  one = rendered(one._replace(noise=np.full(len(one.texts), np.nan)))
  assert one.count("<svg") == 4 and "Score against noise" not in one


def test_the_page_ranks_sources_and_centers_scores_by_clean_text(monkeypatch):
  drawn = {}
  names = ("distributions", "noise")
  originals = {name: getattr(figures, name) for name in names}
  for name in names:
    keep = lambda *args, name=name: drawn.update({name: args}) or originals[name](*args)
    monkeypatch.setattr(figures, name, keep)
  u = units(n=120)
  noise, shift = np.zeros(120), np.zeros(120)
  shift[u.source == "a"] = 5
  noise[(u.source == "a") & (np.arange(120) % 4 > 0)] = 0.5  # most of the best source
  noise[u.source == "c"], shift[u.source == "c"] = 0.3, 20  # nothing is clean
  scores = (u.scores + shift - 40 * noise).astype(np.float32)
  text = rendered(u._replace(noise=noise, scores=scores))
  (groups,) = drawn["distributions"]
  assert list(groups) == ["c (corrupted)", "b", "a"]  # upwards
  clean = scores[(u.source == "a") & (noise == 0)]
  np.testing.assert_allclose(sorted(groups["a"]), sorted(clean))
  assert "the scores of each source's clean documents, the best median on top" in text
  levels, centered = drawn["noise"]
  assert levels is not u.noise and np.array_equal(levels, noise)
  for name in "ab":  # zero is the mean of the source's clean text
    assert centered[(u.source == name) & (noise == 0)].mean() == pytest.approx(0, abs=1e-5)
  assert centered[(u.source == "a") & (noise > 0)].mean() < -19


def test_noise_boxes_stand_on_their_labels():
  levels = np.array([0, 0.04, 0.2, 0.2, 0.45, 1, np.nan])
  figure = figures.noise(levels, np.arange(7.0))
  (axis,) = figure.axes
  assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "0.2", "0.4", "1"]
  centers = [np.mean(patch.get_path().get_extents().intervalx) for patch in axis.patches]
  assert axis.get_xticks() == pytest.approx(centers)
  low, high = axis.get_xlim()
  assert low < -0.025 and high > 1.025  # boxes are whole
  figures.plt.close(figure)


def test_a_long_noise_table_says_how_many_rows_are_missing(monkeypatch):
  monkeypatch.setattr(page, "MAX_ROWS", 2)
  text = rendered(units())
  assert "The first 2 of 3 sources; analysis.json lists each." in text
  results = explain.analyse(units())
  results["noise"]["too_few_documents"] = [f"source {i}" for i in range(45)]
  assert "source 39 and 5 more.</p>" in page.render(units(), HEADER, results)


# A browser.

MEASURE = """<body><script>
const page = %s, results = {};
async function measure(width) {
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 2000px`;
  const loaded = new Promise(done => frame.onload = done);
  frame.srcdoc = page;
  document.body.append(frame);
  await loaded;
  const root = frame.contentDocument.documentElement;
  root.querySelectorAll("details").forEach(d => d.open = true);
  const cut = [], style = frame.contentWindow.getComputedStyle(frame.contentDocument.body);
  for (const svg of root.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const t = text.getBoundingClientRect();
      if (t.left < box.left - 2 || t.right > box.right + 2 || t.top < box.top - 2 ||
          t.bottom > box.bottom + 2) cut.push(text.textContent);
    }
  }
  results[width] = {scroll: root.scrollWidth, client: root.clientWidth, cut: cut,
    svg: [...root.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
    ink: style.color, paper: style.backgroundColor};
}
onload = async () => {
  for (const width of [1280, 400]) await measure(width);
  document.body.innerHTML = "";
  const out = document.createElement("output");
  out.textContent = JSON.stringify(results);
  document.body.append(out);
};
</script>"""


def in_chromium(path, text):
  """Sizes of the page, all of it unfolded, in frames 1280 and 400 pixels wide."""
  browser = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
  )
  if browser is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
  (path / "measure.html").write_text(MEASURE % json.dumps(text).replace("</", "<\\/"))
  flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path}/profile"]
  result = subprocess.run(
    [browser, *flags, "--virtual-time-budget=20000", "--dump-dom", f"file://{path}/measure.html"],
    capture_output=True,
    timeout=120,
  )
  found = re.search(r"<output>(.*?)</output>", result.stdout.decode(), re.S)
  assert found, result.stderr.decode()[-2000:]
  return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("make", [units, nasty_units])
def test_in_a_browser_nothing_overflows_and_no_label_is_cut(make, tmp_path):
  sizes = in_chromium(tmp_path, rendered(make()))
  assert set(sizes) == {"1280", "400"}
  for width, found in sizes.items():
    assert found["scroll"] <= found["client"] <= int(width)
    assert found["cut"] == []
    assert len(found["svg"]) == 5 and min(found["svg"]) > 300 and max(found["svg"]) <= int(width)
    assert found["ink"] != found["paper"]


# The command.


def test_the_command_writes_page_numbers_and_scores(small_rater, cache, tmp_path):
  arguments = [f"--rater={small_rater}", f"--output={tmp_path}/out", f"--cache_dir={cache}"]
  printed = jobs.succeed("analyse.py", cache, *arguments)
  out = tmp_path / "out"
  assert sorted(os.listdir(out)) == ["analysis.json", "report.html", "scores.jsonl"]
  rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
  expected = (small_rater / "validation_scores.jsonl").read_text().splitlines()
  expected = [json.loads(line) for line in expected]
  assert [row["id"] for row in rows] == [row["id"] for row in expected]
  np.testing.assert_allclose(
    [row["score"] for row in rows], [row["score"] for row in expected], rtol=1e-5
  )
  assert set(rows[0]) == {"id", "source", "noise", "score", *NAMES}
  numbers = json.loads((out / "analysis.json").read_text())
  assert numbers["fingerprint"] == open_rater(small_rater).fingerprint
  assert "num_articles" in numbers["constant"] and numbers["noise"] is not None
  scores = [row["score"] for row in rows]
  for name in ("punctuation_fraction", "word_count"):
    r = np.corrcoef([row[name] for row in rows], scores)[0, 1]
    assert numbers["pearson"][name]["r"] == pytest.approx(r, abs=1e-5)
  assert f"OLS R^2 {numbers['ols']['r2']:.3f}" in printed
  shown = "".join(Page((out / "report.html").read_text()).text)
  assert numbers["fingerprint"] in shown and f"{len(rows)} documents of 2 sources" in shown


def test_mistakes_end_in_one_line(small_rater, cache, tmp_path):
  (tmp_path / "file").write_text("")
  for flags, message in (
    ([f"--rater={small_rater}", f"--output={tmp_path}/file"], "is a file"),
    ([f"--rater={small_rater}", f"--output={tmp_path}/o", "--data=absent.jsonl"], "absent.jsonl"),
  ):
    jobs.assert_one_line_error(jobs.run("analyse.py", cache, *flags), message)
  assert not (tmp_path / "o").exists()
