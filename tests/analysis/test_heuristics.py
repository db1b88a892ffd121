"""heuristics.py against values counted by hand, on plain and on nasty text."""

import math
import time

import pytest

from analysis.heuristics import NAMES, count_sentences, heuristics, passes_c4

TEXT = "Hello World, 42!\n\nlo lo lo lo lo lo. No {end}"
# 16 + 2 newlines + 18 + 9 = 45 characters. Words: Hello World, 42! lo lo lo lo lo lo. No {end}


def near(value):
  return pytest.approx(value, rel=1e-12, abs=1e-12)


def test_every_heuristic_of_a_small_text_by_hand():
  assert len(TEXT) == 45
  assert heuristics(TEXT, packing_density=0.75, num_articles=3) == {
    "packing_density": 0.75,
    "num_articles": 3,
    "text_length_cutoff": 45,
    "word_count": 11,
    "sentence_count": 2,  # ! and .
    "empty_line_fraction": near(1 / 2),  # two newlines, the second ends an empty line
    "unique_characters": near(18 / 45),  # Helo Wrd,42!⏎.N{n}
    "word_type_token_ratio": near(7 / 11),  # lo comes five times, lo. once
    "non_alphanumeric_fraction": near((5 + 9 + 2) / 45),  # , ! . { }, spaces, newlines
    "uppercase_letters_fraction": near(3 / 45),
    "punctuation_fraction": near(5 / 45),
    "average_word_length": near((5 + 6 + 3 + 5 * 2 + 3 + 2 + 5) / 11),
    "numeric_fraction": near(2 / 45),
    "5gram_repetition_fraction": near(0 / 7),  # lo lo lo lo lo comes once
    "c4_lorem_ipsum": 0,
    "c4_curly_brace": 1,
    "c4_contains_javascript": 0,
    "c4_has_long_word": 0,
    "c4_fraction_lines_fail_terminal_punct": near(2 / 3),  # the empty line and the last
    "c4_fraction_lines_fail_min_words": near(1 / 3),
    "c4_contains_policy_keyword": 0,
    "c4_sentence_count": 3,
    "passes_all_c4_filters": 0,
  }


def test_names_are_the_23_of_table_1_in_order():
  assert tuple(heuristics("some text")) == NAMES and len(NAMES) == 23


def test_repeated_5grams_are_those_after_the_first():
  assert heuristics("a b c d e")["5gram_repetition_fraction"] == 0
  text = "a b c d e a b c d e"  # 6 grams: abcde bcdea cdeab deabc eabcd abcde
  assert heuristics(text)["5gram_repetition_fraction"] == near(1 / 6)
  assert heuristics("x " * 14)["5gram_repetition_fraction"] == near(9 / 10)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("Lorem IPSUM", {"c4_lorem_ipsum": 1}),
    ("enable JavaScript now", {"c4_contains_javascript": 1}),
    ("our Privacy Policy", {"c4_contains_policy_keyword": 1}),
    ("This uses cookies", {"c4_contains_policy_keyword": 1}),
    ("a" * 1000, {"c4_has_long_word": 0, "average_word_length": 1000}),
    ("a" * 1001, {"c4_has_long_word": 1, "c4_fraction_lines_fail_min_words": 1}),
    ("One.\nTwo?\nThree!\n'Four'\n\"5\"", {"c4_fraction_lines_fail_terminal_punct": 0}),
    ("One...\nTwo\nthree,", {"c4_fraction_lines_fail_terminal_punct": 1}),
    ("So it is.[12]\nand so.[edit]", {"c4_fraction_lines_fail_terminal_punct": 0}),
    ("so it is [citation]", {"c4_fraction_lines_fail_terminal_punct": 1}),
    ("a b c\na b\n\nc", {"c4_fraction_lines_fail_min_words": 0.75}),
    ("a_b-c", {"punctuation_fraction": near(0.2), "non_alphanumeric_fraction": near(0.2)}),
    ("ÄÖé", {"uppercase_letters_fraction": 0, "non_alphanumeric_fraction": 0}),
    ("٣4", {"numeric_fraction": 0.5}),  # an Arabic-Indic digit is none of 0-9
    ("a\r\n\r\nb\r\n", {"empty_line_fraction": near(1 / 3), "word_count": 2}),
    ("\n\n\n", {"empty_line_fraction": 1, "text_length_cutoff": 3}),
    ("🙂🙂", {"unique_characters": 0.5, "punctuation_fraction": 1, "text_length_cutoff": 2}),
  ],
)
def test_single_heuristics_by_hand(text, expected):
  values = heuristics(text)
  assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
  "text",
  ["", " \n\t ", "x" * 200_000, "!?" * 100_000, ".) " * 50_000, "🙂👩‍👩‍👧‍👦", "a\r\nb\r\n"]
  + ["\0\0 \0", "\ud800 \udfff.", "\u2028\x85\x1c", "[" * 100_000, "\n" * 100_000, "٣ ३ ²"],
)
def test_nasty_text_gives_finite_values_in_linear_time(text):
  start = time.process_time()
  values = heuristics(text)
  assert time.process_time() - start < 2  # milliseconds where it is linear, minutes where not
  assert all(type(value) is float and math.isfinite(value) for value in values.values())
  fractions = [v for k, v in values.items() if "fraction" in k or "ratio" in k]
  assert len(fractions) == 9 and all(0 <= value <= 1 for value in fractions)


def test_empty_text_is_zero_throughout_but_for_what_it_is_told():
  values = heuristics("", packing_density=0.5, num_articles=1)
  assert {k: v for k, v in values.items() if v} == {"packing_density": 0.5, "num_articles": 1}


@pytest.mark.parametrize(
  "text, count",
  [
    ("", 0),
    (" \n", 0),
    ("no end", 1),
    ("One. Two! Three? Four", 4),
    ("It ended. then it went on.", 2),  # as Punkt: a small letter may begin a sentence
    ("Mr. Smith met Dr. A. B. Jones, e.g. at 3 p.m. today.", 1),
    ("Pi is 3.14 and v1.2.3 runs.", 1),
    ("Well... perhaps. Well... No.", 3),
    ('He said "Stop!" Then (at last.) she left.', 3),
    ("What?! No!!! Yes.", 3),
  ],
)
def test_sentences(text, count):
  assert count_sentences(text) == count


GOOD = "This line has four words."


def test_the_c4_filter_wants_five_sentences_in_lines_that_pass():
  assert not passes_c4("\n".join([GOOD] * 4))
  assert passes_c4("\n".join([GOOD] * 5))
  assert passes_c4("One two three. Four. Five. Six. Seven.")
  for bad in (
    "no full stop here",
    "Too short.",
    "Please enable javascript now.",
    "x" * 1001 + " a b.",
  ):
    assert not passes_c4("\n".join([GOOD] * 4 + [bad]))
    assert passes_c4("\n".join([GOOD] * 5 + [bad]))
  assert not passes_c4("\n".join([GOOD] * 4 + ["Read our cookie policy here."]))


def test_a_brace_or_lorem_ipsum_fails_the_text_only_in_a_line_that_got_so_far():
  for word in ("{", "lorem ipsum"):
    assert not passes_c4("\n".join([GOOD] * 5 + [f"This line has {word} in it."]))
    assert passes_c4("\n".join([GOOD] * 5 + [f"no full stop after {word}"]))
  assert passes_c4("\n".join([GOOD] * 5 + ["The javascript line goes first {."]))
