"""Multiple-choice benchmarks: reads the questions, measures accuracy by log-likelihood.

The five tasks of the paper's evaluation, zero-shot: HellaSwag, PIQA, ARC-Easy, SIQA, CommonsenseQA.
The paper states neither the number of shots nor the scoring rule. Ours:

  prompt    HellaSwag: "{activity}: {context}" without WikiHow's [header] marks;
            the others: "Question: {question}\\nAnswer:"; SIQA's context precedes its question
  score     log P(" " + choice | prompt): the sum over tokens decides `accuracy_raw`, the sum
            divided by the choice's UTF-8 bytes `accuracy`, whatever the tokenizer
  tokens    prompt and choice are encoded as one text; the choice starts at the first token that
            differs from the prompt's own encoding, so a token merged across the boundary counts
  too long  the prompt loses its beginning, but not the start token; a choice of more than S - 1
            tokens is scored on its first S - 1, and the sum is scaled up to its length

lm-evaluation-harness calls `accuracy_raw` acc and `accuracy` acc_bytes (its acc_norm divides by
characters). Unlike us it keeps white space around texts, drops a token merged across the boundary,
asks SIQA with "Q:" and "A:" and CommonsenseQA with a list of lettered choices, and scores ARC-Easy
on the test split; we prefer validation.

Reads the files of the hub (JSONL, Parquet, a folder saved by `datasets`) and of the original
releases, with labels in the records or, for X.jsonl, in X-labels.lst in the same folder.

Axes: B sequences, S tokens.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from corpus.documents import find_inputs, read_records
from corpus.tokenizer import Tokenizer
from rating import pad_pieces
from runtime import sharding
from runtime.cli import UserError, check, user_error
from transformer import Batch, LanguageModel, next_token_targets

TASKS = {  # task -> pattern of its usual file names
  "hellaswag": r"hella_?swag",
  "piqa": r"(?<![a-z])piqa|physical_?iqa",
  "arc_easy": r"arc[-_]?easy",
  "siqa": r"(?<![a-z])siqa|social_?i_?qa",
  "csqa": r"csqa|commonsense_?qa",
}

LogProb = Callable[[Batch, np.ndarray], Any]  # (batch [B, S], counted [B, S]) -> [B] float32


class Question(NamedTuple):
  context: str  # the prompt, up to the space before the choice
  choices: tuple[str, ...]
  answer: int | None  # index of the right choice; None: withheld, such questions are skipped


def load_questions(task: str, source: str, limit: int | None = None) -> list[Question]:
  """The answered questions of a task, at most `limit` of them, evenly spaced.

  Args:
    task: one of TASKS.
    source: a file, a folder that holds the task's validation (else test) split under its usual
      name, or hf:NAME[:CONFIG[:SPLIT]], with `validation` as the default split.

  Raises:
    UserError: the source does not exist, holds a malformed record, or no answered question.
  """
  check(task in TASKS, f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
  check(limit is None or limit >= 1, f"limit is {limit}: give 1 or more, or leave it out")
  path = Path(source).expanduser().absolute()
  if source.startswith("hf:"):
    name, config, split, *more = [*source.split(":")[1:], "", ""]
    paths = [":".join(["hf", name, config, split or "validation", *filter(None, more)])]
  elif path.is_dir() and not _is_saved(path):
    paths = _find(task, path)
    problem = f"{source} holds no validation or test file named like {task}"
    check(len(paths) > 0, f"{problem}: name its file")
  else:
    paths = [str(path)]

  questions = []
  for place, record in (x for path in paths for x in _records(path)):
    try:
      question = _READERS[task](record)
      whole = len(question.choices) > 1 and all((question.context, *question.choices))
      check(whole, "it has an empty text, or fewer than two choices")
    except UserError as error:
      raise UserError(f"{place} is no question of {task}: {error}") from None
    questions.append(question)
  answered = [question for question in questions if question.answer is not None]
  withheld = len(questions) - len(answered)
  problem = f"{source} holds no answered question of {task} ({withheld} without an answer)"
  fix = "give its validation split, or put X-labels.lst next to X.jsonl"
  check(len(answered) > 0, f"{problem}: {fix}")
  if withheld:
    logging.warning("%s: %d questions of %s have no answer: skipped", source, withheld, task)
  kept = len(answered) if limit is None else min(limit, len(answered))
  return [answered[i * len(answered) // kept] for i in range(kept)]


def load_all(source: str, limit: int | None = None) -> dict[str, list[Question]]:
  """The questions of every task that a folder holds; UserError if it holds none."""
  folder, names = Path(source).expanduser().absolute(), ", ".join(TASKS)
  check(folder.is_dir(), f"{source} is no folder: give one that holds some of {names}")
  present = [task for task in TASKS if _find(task, folder)]
  check(len(present) > 0, f"{source} holds no validation or test file named like {names}")
  return {task: load_questions(task, source, limit) for task in present}


def accuracy(
  logprob: LogProb,
  questions: list[Question],
  tokenizer: Tokenizer,
  sequence_length: int,
  batch_size: int = 64,
) -> dict[str, float]:
  """The share of questions whose right choice has the highest score; ties go to the earlier choice.

  Args:
    logprob: (batch, counted) -> [B], sums of log P over the counted tokens. A mark stands where a
      token is predicted: counted[b, s] counts tokens[b, s + 1], as in `next_token_targets`. S is a
      power of two or `sequence_length`, so a jitted function compiles a few times.

  Returns: `accuracy` (normalized by length), `accuracy_raw`, `standard_error` (binomial, of
  `accuracy`), `chance` and the counts `questions`, `contexts_cut` (choices whose prompt was cut)
  and `choices_cut`.

  Raises:
    UserError: no questions, or a choice without tokens. FloatingPointError: a score is nan.
  """
  check(len(questions) > 0, "no questions to answer")
  check(sequence_length >= 2, f"sequence_length is {sequence_length}: give 2 or more")
  rows = list(_rows(questions, tokenizer, sequence_length))
  scores = np.zeros(len(rows))
  order = np.argsort([-len(row.tokens) for row in rows], kind="stable")  # the slowest batch first
  for start in range(0, len(rows), batch_size):
    chosen = order[start : start + batch_size]
    batch, counted = _batch([rows[i] for i in chosen], batch_size, sequence_length, tokenizer.pad)
    scores[chosen] = np.asarray(logprob(batch, counted), np.float64)[: len(chosen)]
  if broken := int(np.isnan(scores).sum()):
    raise FloatingPointError(f"{broken} of {len(rows)} choices have log-probability nan: diverged?")
  scores *= [row.scale for row in rows]
  lengths = [len(c.encode("utf-8", "replace")) for question in questions for c in question.choices]
  share = _share_right(scores / lengths, questions)
  return {
    "accuracy": share,
    "accuracy_raw": _share_right(scores, questions),
    "standard_error": math.sqrt(share * (1 - share) / len(questions)),
    "chance": chance(questions),
    "questions": len(questions),
    "contexts_cut": sum(row.context_cut for row in rows),
    "choices_cut": sum(row.scale > 1 for row in rows),
  }


def chance(questions: list[Question]) -> float:
  """The expected accuracy of random choices."""
  return float(np.mean([1 / len(question.choices) for question in questions]))


@partial(jax.jit, static_argnums=0)
def sequence_logprob(model: LanguageModel, params: Any, batch: Batch, counted_BS) -> jax.Array:
  """[B] float32: sums log P(token s + 1 | its document up to s) over the positions s that
  `counted_BS` marks."""
  counted_BS &= next_token_targets(batch)[1]
  _, nll_BS = model.token_loss(params, counted_BS.astype(jnp.float32), batch)
  return sharding.replicate(-nll_BS.sum(-1, where=counted_BS))


class _Row(NamedTuple):
  tokens: np.ndarray  # the start token, the end of the prompt, the beginning of the choice
  first: int  # index of the choice's first token
  scale: float  # the choice's length / its length in `tokens`
  context_cut: bool


def _rows(questions: list[Question], tokenizer: Tokenizer, S: int) -> Iterator[_Row]:
  """A row for each choice of each question."""
  texts = [(q.context, *(f"{q.context} {choice}" for choice in q.choices)) for q in questions]
  encoded = iter(tokenizer.encode([text for group in texts for text in group]))
  for question in questions:
    prompt = next(encoded)
    for choice in question.choices:
      whole = next(encoded)
      shared = min(len(prompt), len(whole))
      differs = np.flatnonzero(prompt[:shared] != whole[:shared])
      first = int(differs[0]) if differs.size else shared
      length = len(whole) - first
      check(length > 0, f"the tokenizer has no token for the choice {choice!r}: take another")
      fits = min(length, S - 1)
      room = S - 1 - fits  # for the prompt, after the start token
      context = whole[1:first][max(first - 1 - room, 0) :]
      tokens = np.concatenate([whole[:1], context, whole[first : first + fits]])
      yield _Row(tokens, 1 + len(context), length / fits, len(context) < first - 1)


def _batch(rows: list[_Row], B: int, S: int, pad: int) -> tuple[Batch, np.ndarray]:
  """(batch, marks of the choices' tokens), its width S or a smaller power of two."""
  width = min(S, max(32, 1 << (max(len(row.tokens) for row in rows) - 1).bit_length()))
  counted = np.zeros((B, width), bool)
  for b, row in enumerate(rows):
    counted[b, row.first - 1 : len(row.tokens) - 1] = True
  return pad_pieces([(0, row.tokens) for row in rows], B, width, pad).batch, counted


def _share_right(scores: np.ndarray, questions: list[Question]) -> float:
  """The share of questions answered right by the scores of all their choices, one after another."""
  ends = np.cumsum([len(question.choices) for question in questions])
  best = [int(np.argmax(part)) for part in np.split(scores, ends[:-1])]
  return sum(b == q.answer for b, q in zip(best, questions, strict=True)) / len(questions)


_SPLITS = {  # word of a file's or folder's name -> its rank, the lowest first; 3 is never read
  **dict.fromkeys(("val", "valid", "validation", "dev"), 0),
  **dict.fromkeys(("test", "tests", "tst"), 1),
  **dict.fromkeys(("train", "trn", "training"), 3),
}
_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.(gz|bz2|zst))?$")
_NO_QUESTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def _find(task: str, folder: Path) -> list[str]:
  """The files (or saved folders) of a task's preferred split; [] if the folder has none."""
  paths = [path.parent for path in folder.rglob("state.json") if _is_saved(path.parent)]
  paths += [p for p in folder.rglob("*") if _FILE.search(p.name) and p.name not in _NO_QUESTIONS]
  places = {path: path.relative_to(folder).as_posix().lower() for path in sorted(paths)}
  places = {path: place for path, place in places.items() if not re.search(r"(^|/)\.", place)}
  named = {path: place for path, place in places.items() if re.search(TASKS[task], place)}
  if not named and re.search(TASKS[task], folder.resolve().name.lower()):
    named = places
  ranks = {path: _rank(place) for path, place in named.items()}
  best = min(ranks.values(), default=3)
  files = [str(path) for path, rank in ranks.items() if rank == best < 3]
  different = {re.sub(r"\d+", "", file) for file in files}  # shards differ by numbers alone
  problem = f"{folder} holds more than one file of {task} ({', '.join(files[:4])})"
  check(len(different) <= 1, f"{problem}: name one of them")
  return files


def _rank(place: str) -> int:
  """Rank of the split named by the innermost path component that names one: train-dev/dev.jsonl is
  dev. 2 if none does."""
  for name in reversed(place.split("/")):
    ranks = [_SPLITS[word] for word in re.split("[^a-z]+", name) if word in _SPLITS]
    if ranks:
      return min(ranks)
  return 2


def _is_saved(path: Path) -> bool:
  """Whether `Dataset.save_to_disk` wrote this folder."""
  return all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def _records(path: str) -> Iterator[tuple[str, dict]]:
  """(place, record) of a file, a saved folder or a hub name."""
  if _is_saved(Path(path)):
    import datasets

    with user_error(Exception, f"{path} cannot be read", "save it again"):  # of several libraries
      rows = datasets.load_from_disk(path)
    yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, 1))
    return
  for item in find_inputs((path,)):
    records = [(number, record) for number, record, *_ in read_records(item)]
    labels, file = [None] * len(records), Path(re.sub(_FILE, "-labels.lst", item.path))
    if item.kind == "json" and file.is_file():
      labels = file.read_text("utf-8", "replace").split()
    counts = f"{len(labels)} labels for {len(records)} records"
    check(len(labels) == len(records), f"{file} has {counts}: fix it")
    unit = "line" if item.kind == "json" else "record"
    for (number, record), label in zip(records, labels, strict=True):
      place = f"{item.path}, {unit} {number}"
      check(not isinstance(record, str), f"{place}: {record}")
      yield place, {"label": label} | record  # a record's own label wins


def _hellaswag(record: dict) -> Question:
  halves = "ctx_a" in record
  context = _text(record, "ctx_a" if halves else "ctx")
  if halves and record.get("ctx_b"):
    context += f" {_text(record, 'ctx_b').capitalize()}"
  if record.get("activity_label"):
    context = f"{_text(record, 'activity_label')}: {context}"
  endings = _texts(record.get("endings"), "endings")
  answer = _answer(record.get("label"), [str(i) for i in range(len(endings))])
  return Question(_without_headers(context), tuple(map(_without_headers, endings)), answer)


def _without_headers(text: str) -> str:
  """WikiHow's marks: " [title]" ends a sentence; [header], [step] and the like are removed."""
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return " ".join(text.split())


def _piqa(record: dict) -> Question:
  choices = (_text(record, "sol1"), _text(record, "sol2"))
  return _asked(_text(record, "goal"), choices, record.get("label"), ["0", "1"])


def _siqa(record: dict) -> Question:
  choices = tuple(_text(record, f"answer{letter}") for letter in "ABC")
  key, labels = ("correct", "ABC") if "correct" in record else ("label", "123")  # released, hub
  question = f"{_text(record, 'context')} {_text(record, 'question')}"
  return _asked(question, choices, record.get(key), list(labels))


def _lettered(record: dict) -> Question:
  """ARC and CommonsenseQA: choices with letters or numbers."""
  question = record.get("question")
  if isinstance(question, dict):  # as released: {"stem": ..., "choices": [{"label", "text"}, ...]}
    text, choices = _text(question, "stem"), question.get("choices")
  else:
    text, choices = _text(record, "question"), record.get("choices")
  if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
    choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
  columns = choices if isinstance(choices, dict) else {}
  texts, labels = (_texts(columns.get(key), f"choices.{key}") for key in ("text", "label"))
  check(len(texts) == len(labels), "choices.text and choices.label differ in length")
  return _asked(text, texts, record.get("answerKey"), labels)


_READERS = dict(hellaswag=_hellaswag, piqa=_piqa, arc_easy=_lettered, siqa=_siqa, csqa=_lettered)


def _asked(text: str, choices: tuple[str, ...], label: Any, labels: Sequence[str]) -> Question:
  return Question(f"Question: {text}\nAnswer:", choices, _answer(label, labels))


def _text(record: dict, name: str) -> str:
  value = record.get(name)
  check(isinstance(value, str) and value.strip() != "", f"no text in {name!r}")
  return value.strip()


def _texts(values: Any, name: str) -> tuple[str, ...]:
  texts = isinstance(values, list | tuple) and all(isinstance(v, str) for v in values)
  check(texts, f"{name!r} is no list of texts")
  return tuple(value.strip() for value in values)


def _answer(label: Any, labels: Sequence[str]) -> int | None:
  """The index of a label; None where it is withheld (empty, or -1)."""
  label = "" if label is None else str(label).strip()
  if label in ("", "-1"):
    return None
  check(label in labels, f"its answer {label!r} is none of {', '.join(labels)}")
  return labels.index(label)
