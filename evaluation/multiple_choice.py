"""Multiple-choice benchmarks: questions from their usual files, accuracy by log-likelihood.

The five tasks of the paper's evaluation, zero-shot: HellaSwag, PIQA, ARC-Easy, SIQA, CommonsenseQA.
The paper names neither shots nor rule; this is the convention here:

  prompt    HellaSwag: "{activity}: {context}" without WikiHow's [header] marks, to be continued;
            the others: "Question: {question}\\nAnswer:", where SIQA's question follows its context
  score     log P(" " + choice | prompt), summed over tokens (`accuracy_raw` takes its argmax),
            divided by the UTF-8 bytes of the choice (`accuracy`): independent of the tokenizer
  tokens    prompt and choice are encoded as one text; a choice's tokens are those from the first
            on that the prompt alone does not have, so that a merge across the boundary counts
  too long  the prompt loses its beginning (never the start token); of a choice of more than S - 1
            tokens the first S - 1 are scored and the sum is scaled up to all of them

In lm-evaluation-harness `accuracy_raw` is called acc and `accuracy` acc_bytes (acc_norm divides by
characters). It differs in that it keeps the white space around texts, drops a token merged across
the boundary, asks SIQA with "Q:" and "A:", CommonsenseQA with a list of lettered choices, and
scores ARC-Easy on its test split where we prefer validation.

Files are those of the hub (JSONL, Parquet, or a folder that `datasets` saved) or of the original
releases, with labels inside or, for X.jsonl, in X-labels.lst beside it.

Axes: B sequences, S tokens.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np
import tqdm
from absl import logging

from corpus.documents import find_inputs, read_records
from corpus.tokenizer import Tokenizer
from kernels import score_weighted_loss
from runtime import sharding
from runtime.cli import UserError, one_line
from transformer import Batch, Transformer, TransformerConfig, next_token_targets

TASKS = ("hellaswag", "piqa", "arc_easy", "siqa", "csqa")

LogProb = Callable[[Batch, np.ndarray], Any]  # (batch [B, S], counted [B, S]) -> [B] float32


class Question(NamedTuple):
  context: str  # the prompt, up to the space before the choice
  choices: tuple[str, ...]
  answer: int  # index of the right choice


def load_questions(task: str, source: str, limit: int | None = None) -> list[Question]:
  """The answered questions of a task, at most `limit` of them, evenly spaced.

  Args:
    task: one of TASKS.
    source: a file, a folder that holds the task's validation (else test) split under its usual
      name, or hf:NAME[:CONFIG[:SPLIT]], of which the split `validation` if none is given.

  Raises:
    UserError: nothing of that name, a record that is no question, or no question with an answer.
  """
  if task not in TASKS:
    raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
  if limit is not None and limit < 1:
    raise UserError(f"limit is {limit}: give 1 or more, or leave it out")
  if source.startswith("hf:"):
    name, config, split, *more = [*source.split(":")[1:], "", ""]
    paths = [":".join(["hf", name, config, split or "validation", *filter(None, more)])]
  elif Path(source).expanduser().is_dir() and not _is_saved(Path(source).expanduser()):
    paths = _find(task, Path(source).expanduser())
    if not paths:
      raise UserError(f"{source} holds no validation or test file named like {task}: name its file")
  else:
    paths = [str(Path(source).expanduser())]

  questions, unanswered = [], 0
  for path in paths:
    for where, record in _records(path):
      try:
        context, choices, answer = _READERS[task](record)
        if len(choices) < 2 or not all((context, *choices)):
          raise UserError("it has an empty text, or fewer than two choices")
      except UserError as error:
        raise UserError(f"{where} is no question of {task}: {error}") from None
      if answer is None:
        unanswered += 1
      else:
        questions.append(Question(context, choices, answer))
  if not questions:
    raise UserError(
      f"{source} holds no answered question of {task} ({unanswered} without an answer): give its "
      "validation split, or X-labels.lst beside X.jsonl"
    )
  if unanswered:
    logging.warning("%s: %d questions of %s have no answer: skipped", source, unanswered, task)
  kept = len(questions) if limit is None else min(limit, len(questions))
  return [questions[i * len(questions) // kept] for i in range(kept)]


def load_all(source: str, limit: int | None = None) -> dict[str, list[Question]]:
  """The questions of every task that a folder holds; UserError if it holds none."""
  folder = Path(source).expanduser()
  if not folder.is_dir():
    raise UserError(f"{source} is no folder: give one that holds {', '.join(TASKS)}, or some")
  found = [task for task in TASKS if _find(task, folder)]
  if not found:
    raise UserError(f"{source} holds no validation or test file named like {', '.join(TASKS)}")
  return {task: load_questions(task, source, limit) for task in found}


def accuracy(
  logprob: LogProb,
  questions: list[Question],
  tokenizer: Tokenizer,
  sequence_length: int,
  batch_size: int = 64,
  progress: str | None = None,
) -> dict[str, float]:
  """How often the right choice has the highest score; ties go to the earlier choice.

  Args:
    logprob: (batch, counted) -> [B], the sum of log P of the tokens that `counted` marks where they
      are predicted: counted[b, s] is of tokens[b, s + 1], as in `next_token_targets`. S varies: a
      power of two or `sequence_length`; a jitted function compiles a few times.
    progress: what a progress bar is called; None shows none.

  Returns: `accuracy` (length-normalised), `accuracy_raw`, `standard_error` (binomial, of
  `accuracy`), `chance` (expected of random choices), and counts: `questions`, `contexts_cut` and
  `choices_cut` (choices that lost some of their prompt, or of themselves).

  Raises:
    UserError: no questions, or a choice without tokens. FloatingPointError: a score is nan.
  """
  if not questions:
    raise UserError("no questions to answer")
  if sequence_length < 2:
    raise UserError(f"sequence_length is {sequence_length}: give 2 or more")
  rows = list(_rows(questions, tokenizer, sequence_length))
  scores = np.zeros(len(rows))
  order = np.argsort([-len(row.tokens) for row in rows], kind="stable")  # the slowest batch first
  starts = tqdm.trange(0, len(rows), batch_size, desc=progress, disable=progress is None)
  for start in starts:
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


def sequence_logprob(
  config: TransformerConfig, loss_backend: str | None = None
) -> Callable[[Any, Batch, jax.Array], jax.Array]:
  """(params of `transformer.language_model(config)`, batch, counted) -> [B] float32.

  The sum of log P(token s + 1 | those before it, of its document) where counted[b, s]."""
  forward = hk.without_apply_rng(
    hk.transform(lambda tokens, segments: Transformer(config, causal=True)(tokens, segments))
  )

  score_weighted = sharding.shard_loss(partial(score_weighted_loss, backend=loss_backend))

  def logprob(params, batch, counted_BS):
    hidden_BSD, unembedding_VD = forward.apply(params, *batch)
    targets_BS, real_BS = next_token_targets(batch)
    counted_BS = real_BS & counted_BS
    _, nll_N = score_weighted(
      hidden_BSD.reshape(-1, config.d_model),
      unembedding_VD,
      targets_BS.reshape(-1),
      counted_BS.reshape(-1).astype(hidden_BSD.dtype),
    )
    return sharding.replicate(-nll_N.reshape(counted_BS.shape).sum(-1, where=counted_BS))

  return logprob


class _Row(NamedTuple):
  tokens: np.ndarray  # the start token, what fits of the prompt, the choice
  first: int  # where the choice begins
  scale: float  # tokens of the choice / tokens of it that fit
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
      if length == 0:
        raise UserError(f"the tokenizer has no token for the choice {choice!r}: take another")
      fits = min(length, S - 1)
      room = S - 1 - fits  # for the prompt, beside its start token
      context = whole[1:first][max(first - 1 - room, 0) :]
      tokens = np.concatenate([whole[:1], context, whole[first : first + fits]])
      yield _Row(tokens, 1 + len(context), length / fits, len(context) < first - 1)


def _batch(rows: list[_Row], B: int, S: int, pad: int) -> tuple[Batch, np.ndarray]:
  """Rows as a batch of the least power of two, at most S, that holds them, and what to count."""
  width = min(S, max(32, 1 << (max(len(row.tokens) for row in rows) - 1).bit_length()))
  tokens, segments = np.full((B, width), pad, np.int32), np.zeros((B, width), np.int32)
  counted = np.zeros((B, width), bool)
  for b, row in enumerate(rows):
    tokens[b, : len(row.tokens)], segments[b, : len(row.tokens)] = row.tokens, 1
    counted[b, row.first - 1 : len(row.tokens) - 1] = True
  return Batch(tokens, segments), counted


def _share_right(scores: np.ndarray, questions: list[Question]) -> float:
  """Of questions whose first best choice is the answer; the scores are those of all choices."""
  ends = np.cumsum([len(question.choices) for question in questions])
  best = [int(np.argmax(part)) for part in np.split(scores, ends[:-1])]
  return sum(b == q.answer for b, q in zip(best, questions, strict=True)) / len(questions)


_NAMES = {
  "hellaswag": r"hella_?swag",
  "piqa": r"(?<![a-z])piqa|physical_?iqa",
  "arc_easy": r"arc[-_]?easy",
  "siqa": r"(?<![a-z])siqa|social_?i_?qa",
  "csqa": r"csqa|commonsense_?qa",
}
_SPLITS = {  # a word of a file's or folder's name -> how much we want it; training never
  **dict.fromkeys(("val", "valid", "validation", "dev"), 0),
  **dict.fromkeys(("test", "tests", "tst"), 1),
  **dict.fromkeys(("train", "trn", "training"), 3),
}
_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.(gz|bz2|zst))?$")
_NO_QUESTIONS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def _find(task: str, folder: Path) -> list[str]:
  """The files (or saved folders) of a task's best split; [] if the folder has none."""
  paths = [path.parent for path in folder.rglob("state.json") if _is_saved(path.parent)]
  paths += [p for p in folder.rglob("*") if _FILE.search(p.name) and p.name not in _NO_QUESTIONS]
  places = {path: path.relative_to(folder).as_posix().lower() for path in sorted(paths)}
  places = {path: place for path, place in places.items() if not re.search(r"(^|/)\.", place)}
  named = {path: place for path, place in places.items() if re.search(_NAMES[task], place)}
  if not named and re.search(_NAMES[task], folder.resolve().name.lower()):
    named = places
  ranks = {path: _rank(place) for path, place in named.items()}
  best = min(ranks.values(), default=3)
  found = [path for path, rank in ranks.items() if rank == best < 3]
  if len({re.sub(r"\d+", "", str(path)) for path in found}) > 1:  # shards differ by numbers alone
    names = ", ".join(str(path) for path in found[:4])
    raise UserError(f"{folder} holds more than one file of {task} ({names}): name one of them")
  return [str(path) for path in found]


def _rank(place: str) -> int:
  """Of the split that the innermost name with a split's word tells: train-dev/dev.jsonl is dev."""
  for name in reversed(place.split("/")):
    ranks = [_SPLITS[word] for word in re.split("[^a-z]+", name) if word in _SPLITS]
    if ranks:
      return min(ranks)
  return 2


def _is_saved(path: Path) -> bool:
  """Whether `Dataset.save_to_disk` wrote this folder."""
  return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _records(path: str) -> Iterator[tuple[str, dict]]:
  """The records of a file, a saved folder or a hub name, each after the place where it stands."""
  if _is_saved(Path(path)):
    import datasets

    try:
      rows = datasets.load_from_disk(path)
    except Exception as error:  # of several libraries
      raise UserError(f"{path} cannot be read ({one_line(error)}): save it again") from None
    yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, 1))
    return
  for item in find_inputs((path if path.startswith("hf:") else str(Path(path).absolute()),)):
    unit = "line" if item.kind == "json" else "record"
    records = read_records(item)
    labels = Path(re.sub(_FILE, "-labels.lst", item.path))
    if item.kind == "json" and labels.is_file():
      records, values = list(records), labels.read_text("utf-8", "replace").split()
      if len(records) != len(values):
        raise UserError(f"{labels} has {len(values)} labels for {len(records)} records: mend it")
      records = [
        (number, record if isinstance(record, str) else {"label": value} | record)
        for (number, record), value in zip(records, values, strict=True)
      ]
    for number, record in records:
      if isinstance(record, str):
        raise UserError(f"{item.path}, {unit} {number}: {record}")
      yield f"{item.path}, {unit} {number}", record


def _hellaswag(record: dict) -> tuple[str, tuple[str, ...], int | None]:
  if "ctx_a" in record:
    rest = _text(record, "ctx_b").capitalize() if record.get("ctx_b") else ""
    context = f"{_text(record, 'ctx_a')} {rest}"
  else:
    context = _text(record, "ctx")
  if record.get("activity_label"):
    context = f"{_text(record, 'activity_label')}: {context}"
  endings = _texts(record.get("endings"), "endings")
  answer = _answer(record.get("label"), [str(place) for place in range(len(endings))])
  return _without_headers(context), tuple(map(_without_headers, endings)), answer


def _without_headers(text: str) -> str:
  """WikiHow's marks: " [title]" ends a sentence; [header], [step] and the like go."""
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return " ".join(text.split())


def _piqa(record: dict) -> tuple[str, tuple[str, ...], int | None]:
  choices = tuple(_text(record, name) for name in ("sol1", "sol2"))
  return _prompt(_text(record, "goal")), choices, _answer(record.get("label"), ["0", "1"])


def _siqa(record: dict) -> tuple[str, tuple[str, ...], int | None]:
  choices = tuple(_text(record, f"answer{letter}") for letter in "ABC")
  if "correct" in record:  # as released: a letter
    answer = _answer(record["correct"], ["A", "B", "C"])
  else:
    answer = _answer(record.get("label"), ["1", "2", "3"])
  return _prompt(f"{_text(record, 'context')} {_text(record, 'question')}"), choices, answer


def _lettered(record: dict) -> tuple[str, tuple[str, ...], int | None]:
  """ARC and CommonsenseQA: choices with letters or numbers."""
  question = record.get("question")
  if isinstance(question, dict):  # as released: {"stem": ..., "choices": [{"label", "text"}, ...]}
    text, choices = _text(question, "stem"), question.get("choices")
  else:
    text, choices = _text(record, "question"), record.get("choices")
  columns = {}
  for key in ("text", "label"):
    if isinstance(choices, list):
      column = [choice.get(key) if isinstance(choice, dict) else None for choice in choices]
    else:
      column = choices.get(key) if isinstance(choices, dict) else None
    columns[key] = _texts(column, f"choices.{key}")
  if len(columns["text"]) != len(columns["label"]):
    raise UserError("choices.text and choices.label differ in length")
  return _prompt(text), columns["text"], _answer(record.get("answerKey"), columns["label"])


_READERS = {
  "hellaswag": _hellaswag,
  "piqa": _piqa,
  "arc_easy": _lettered,
  "siqa": _siqa,
  "csqa": _lettered,
}


def _prompt(question: str) -> str:
  return f"Question: {question}\nAnswer:"


def _text(record: dict, name: str) -> str:
  value = record.get(name)
  if not isinstance(value, str) or not value.strip():
    raise UserError(f"no text in {name!r}")
  return value.strip()


def _texts(values: Any, name: str) -> tuple[str, ...]:
  if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
    raise UserError(f"{name!r} is no list of texts")
  return tuple(value.strip() for value in values)


def _answer(label: Any, labels: Sequence[str]) -> int | None:
  """The place of a label among `labels`; None where it is withheld (empty, or -1)."""
  label = "" if label is None else str(label).strip()
  if label in ("", "-1"):
    return None
  if label not in labels:
    raise UserError(f"its answer {label!r} is none of {', '.join(labels)}")
  return labels.index(label)
