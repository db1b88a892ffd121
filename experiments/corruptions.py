"""Corruptions that the demo lacks: does a rater find them in a corpus?

  python -m experiments.corruptions --folder=runs/corruptions     # mine.jsonl, clean.jsonl
  python train.py --workdir=runs/c --data=runs/corruptions/mine.jsonl \\
    --outer_data=runs/corruptions/clean.jsonl --report_documents=3000
  python -m experiments.corruptions --judge=runs/c                     # a table by kind
  python -m experiments.corruptions --worth                            # what each kind costs

Documents of eight sources of the demo corpus; half of mine.jsonl is corrupted by one of four kinds
at a level of 0.1 to 0.8 (a share of words, of characters, or of the text). clean.jsonl is a fifth
of the documents, as they are. Without --outer_data the held-out loss is on the corrupted mixture.
--worth trains an inner model of the demo on text of each kind at level 0.8 and prints its loss on
clean text: a kind that costs nothing there sends no meta-gradient.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import inner_loop
import meta_step
import transformer
from corpus import demo
from corpus.packing import cut
from corpus.tokenizer import load_tokenizer
from rating import pad_pieces
from runtime import cli
from runtime.cli import UserError, option


@dataclasses.dataclass(frozen=True)
class Settings:
  folder: str | None = option(None, "folder to write the two corpora to")
  judge: str | None = option(None, "workdir of a finished run on mine.jsonl")
  worth: bool = option(False, "print the loss on clean text after training on each kind")
  updates: int = option(160, "inner updates of --worth", at_least=1)
  seed: int = option(0, "of the corruptions")


SOURCES = ("encyclopedia", "speeches", "debates_en", "verse_drama", "software_docs", "code_python")
SOURCES += ("tweets", "python_help")
BOILERPLATE = (
  '<div class="nav"><ul><li><a href="/home">Home</a></li><li><a href="/about">About</a></li></ul>',
  '<script type="text/javascript">var _gaq=_gaq||[];_gaq.push(["_trackPageview"]);</script>',
  '<p class="footer">Copyright &copy; 2024. <a href="/privacy">Privacy Policy</a></p></div>',
  '<span style="color:#333;font-size:12px">&nbsp;</span><br/>',
  '<meta name="viewport" content="width=device-width, initial-scale=1.0">',
  '<a class="btn btn-primary" href="/login?next=%2F">Log in</a> <a href="/register">Sign up</a>',
)
MISREAD = {"l": "1", "i": "l", "o": "0", "e": "c", "a": "o", "m": "rn", "n": "ri", "h": "b"}
MISREAD |= {"s": "5", "t": "f", "u": "v", "g": "9", "b": "6", "d": "cl", "c": "e", "w": "vv"}


def shuffled_words(text, level, rng):
  words = np.array(text.split(" "), object)
  moved = np.flatnonzero(rng.random(len(words)) < level)
  words[moved] = words[rng.permutation(moved)]
  return " ".join(words)


def html_boilerplate(text, level, rng):
  """Inserts lines of markup until they make up `level` of the whole."""
  lines, read, written = [], 0, 0
  for line in text.split("\n"):
    lines.append(line)
    read += len(line) + 1
    while written < level / (1 - level) * read:
      lines.append(BOILERPLATE[rng.integers(len(BOILERPLATE))])
      written += len(lines[-1]) + 1
  return "\n".join(lines)


def mojibake(text, level, rng):
  """Replaces words by accented letters read in the wrong encoding."""
  accented = lambda c: c if rng.random() < 0.5 else "éèüöâ€™“”ñçßøåœ–"[rng.integers(16)]
  broken = lambda word: "".join(map(accented, word)).encode().decode("cp1252", "replace")
  return " ".join(broken(w) if rng.random() < level else w for w in text.split(" "))


def ocr_noise(text, level, rng):
  return "".join(MISREAD.get(c, c) if rng.random() < level else c for c in text)


KINDS = (mojibake, ocr_noise, html_boilerplate, shuffled_words)


def write(folder: Path, seed: int) -> None:
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "mine.jsonl", "w") as mine, open(folder / "clean.jsonl", "w") as clean:
    for record in read_sources():
      if rng.random() < 0.2:
        print(json.dumps(record), file=clean)
        continue
      kind, level = "clean", 0.0
      if rng.random() < 0.5:
        corrupt, level = KINDS[rng.integers(len(KINDS))], rng.integers(1, 9) / 10
        kind, record["text"] = corrupt.__name__, corrupt(record["text"], level, rng)
      record |= {"id": f"{record['id']}#{kind}", "noise": level}
      print(json.dumps(record), file=mine)


def judge(workdir: Path) -> None:
  """Means over the sources with at least 5 documents of a kind."""
  lines = (workdir / "validation_scores.jsonl").read_text().splitlines()
  rows = list(map(json.loads, lines))
  for kind in (k.__name__ for k in KINDS):
    spearman, auroc = [], []
    for source in SOURCES:
      mine = [r | {"kind": r["id"].rpartition("#")[2]} for r in rows if r["source"] == source]
      bad = [r for r in mine if r["kind"] == kind]
      good = [r["score"] for r in mine if r["kind"] == "clean"]
      worse = [r["score"] for r in bad if r["noise"] >= 0.2]
      if len(bad) < 5 or not worse or not good:
        continue
      level, score = zip(*((r["noise"], r["score"]) for r in bad), strict=True)
      spearman.append(scipy.stats.spearmanr(level, score).statistic)
      auroc.append(scipy.stats.mannwhitneyu(good, worse).statistic / len(good) / len(worse))
    means = f"Spearman {np.mean(spearman):+.2f}  AUROC {np.mean(auroc):.2f}" if auroc else ""
    print(f"{kind:18s} {means}  ({len(auroc)} sources)")


def worth(updates: int, seed: int, B: int = 16, S: int = 128) -> None:
  rng = np.random.default_rng(seed)
  tokenizer = load_tokenizer("bytes")
  model = transformer.language_model(transformer.preset("tiny", tokenizer.vocab_size))
  optimizer = meta_step.inner_adamw(3e-3)
  train = jax.jit(lambda *inputs: inner_loop.unroll(model.loss, optimizer, *inputs)[0])
  loss = jax.jit(lambda params, batch: model.loss(params, jnp.full(B, 1 / B), batch)[0])

  def batches(texts, count):
    """[count, B, S] of pieces drawn from all texts."""
    pieces = [piece for tokens in tokenizer.encode(texts) for piece in cut(tokens, S)]
    drawn = rng.permutation(len(pieces))[: count * B]
    batch = pad_pieces([(0, pieces[i]) for i in drawn], count * B, S, tokenizer.pad).batch
    return jax.tree.map(lambda x: x.reshape(count, B, S), batch)

  texts = [record["text"] for record in read_sources()]
  rng.shuffle(texts)
  held_out, texts = texts[: len(texts) // 5], texts[len(texts) // 5 :]
  test = batches(held_out, 100)
  for kind in (None, *KINDS):
    corrupted = [kind(text, 0.8, rng) for text in texts] if kind else texts
    state = inner_loop.init(optimizer, model.init(jax.random.key(seed)))
    state = train(state, jnp.full((updates, B), 1 / B), batches(corrupted, updates))
    losses = [loss(state.params, jax.tree.map(lambda x, i=i: x[i], test)) for i in range(100)]
    name = kind.__name__ if kind else "clean"
    print(
      f"trained on {name:18s} loss on clean text {np.mean(losses):.3f} nats per byte", flush=True
    )


def read_sources() -> list[dict]:
  lines = demo.build().read_text(encoding="utf-8").splitlines()
  return [record for record in map(json.loads, lines) if record["source"] in SOURCES]


def main() -> None:
  settings = cli.read(Settings)
  if settings.worth:
    worth(settings.updates, settings.seed)
  elif settings.judge:
    judge(Path(settings.judge))
  elif settings.folder:
    write(Path(settings.folder), settings.seed)
  else:
    raise UserError("name what to do with --folder, --judge or --worth")


if __name__ == "__main__":
  cli.run(main, Settings)
