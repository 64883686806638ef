"""Scores equal those of the benchmarks' own code."""

import pytest

from lucid_jax.evaluate import scores

_PREDICTION = "The cat sat on the mat. It was warm."
_REFERENCE = "A cat was on the mat. The mat was warm."


@pytest.mark.parametrize(
    ("prediction", "all_", "part"),
    [
        (" 1234567 and\x007654321.", 1.0, 1.0),
        ("only 7654321", 0.5, 1.0),
        ("12345 67", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_string_match(prediction, all_, part):
    references = ["1234567", "7654321"]
    assert scores.string_match_all(prediction, references) == all_
    assert scores.string_match_part(prediction, references) == part


def test_string_match_ignores_case_and_treats_control_characters_as_line_breaks():
    assert scores.string_match_all("it is ABLE-Acorn", ["able-acorn"]) == 1
    assert scores.string_match_all("\x02a\x01b\x03", ["a\nb"]) == 1


_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


@pytest.mark.parametrize(
    ("prediction", "target", "question", "labels", "strict", "lenient"),
    [
        ("The garden", "garden", "Where is Mary?", _PLACES, 1, 1),
        ("GARDEN. Not the kitchen.", "garden", "Where is Mary?", _PLACES, 1, 1),
        ("garden<example>kitchen", "garden", "Where is Mary?", _PLACES, 1, 1),
        ("garden <context> kitchen", "garden", "Where is Mary?", _PLACES, 1, 1),
        ("Well. garden", "garden", "Where is Mary?", _PLACES, 0, 1),
        (", ".join(_PLACES), "garden", "Where is Mary?", _PLACES, 0, 1),
        ("kitchen", "garden", "Where is Mary?", _PLACES, 0, 0),
        ("Before the office the milk was in the garden", "garden",
         "Where was the milk before the office?", _PLACES, 1, 1),
        ("Fred", "Fred", "Who did Mary give it to?", ("Bill", "Fred", "Mary"), 1, 1),
        ("none", "none", "How many?", ("none", "one", "two"), 1, 1),
        ("none", "one", "How many?", ("none", "one", "two"), 0, 1),
        ("milk and apple", "apple,milk", "What?", ("apple", "milk", "nothing"), 1, 0),
        ("apple,milk", "apple,milk", "What?", ("apple", "milk", "nothing"), 1, 1),
        ("apple", "apple,milk", "What?", ("apple", "milk", "nothing"), 0, 0),
        ("", "garden", "Where is Mary?", _PLACES, 0, 0),
    ],
)  # fmt: skip
def test_babilong(prediction, target, question, labels, strict, lenient):
    assert scores.babilong_strict(prediction, target, question, labels) == strict
    assert scores.babilong_lenient(prediction, target) == lenient


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "exact"),
    [
        ("The Cat!", "a cat", 1.0, 1.0),
        ("the cat sat", "cat", 2 / 3, 0.0),
        ("cat cat", "cat", 2 / 3, 0.0),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("theatre  of\nan  era", "theatre of era", 1.0, 1.0),
    ],
)
def test_f1_and_exact_match(prediction, reference, f1, exact):
    assert scores.token_f1(prediction, reference) == pytest.approx(f1)
    assert scores.exact_match(prediction, reference) == exact


def test_best_takes_the_highest_score():
    assert scores.best(scores.token_f1, "a cat", ["dog", "cat sat", "cat"]) == 1


def test_scrolls_rouge():
    """The expected values are from rouge-score 0.1.2 without its stemmer."""
    assert scores.rouge(_PREDICTION, _REFERENCE) == pytest.approx(
        {"rouge1": 0.7368421052631577, "rouge2": 0.35294117647058826, "rougeL": 0.631578947368421}
    )
    assert scores.rouge("x-ray, X", "x ray x") == dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1)
    assert scores.rouge("", "cat") == dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0)
    assert scores.rouge("one", "one") == {"rouge1": 1, "rouge2": 0, "rougeL": 1}


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        (_PREDICTION, _REFERENCE, 0.823529406782007),
        # Each word counts once; case and commas matter.
        ("b a b a", "a b, A", 0.399999995200000),
        # Of the two longest common subsequences the package takes "d d".
        ("d b d", "b d d", 0.499999995000000),
        ("", "cat", 0.0),
        ("...", "cat", 0.0),
    ],
)
def test_longbench_rouge(prediction, reference, value):
    """The expected values are from the package rouge 1.0.1."""
    assert scores.rouge_l_of_sentences(prediction, reference) == pytest.approx(value, abs=1e-12)


def test_longbench_numbers():
    assert scores.count_score("There are 7, or 8.", "7") == 0.5
    assert scores.count_score("17", "7") == 0
    assert scores.count_score("seven", "7") == 0
    assert scores.retrieval_score("Paragraph 12", "Paragraph 12") == 1
    assert scores.retrieval_score("3 or 12", "Paragraph 12") == 0.5


def test_longbench_classes():
    classes = ["Other", "Other entity", "City", "Date"]
    assert scores.classification_score("Type: Other entity", "Other entity", classes) == 1
    assert scores.classification_score("City or Date", "City", classes) == 0.5
    assert scores.classification_score("Date", "City", classes) == 0
    assert scores.classification_score("", "City", classes) == 0


@pytest.mark.parametrize(
    ("prediction", "value"),
    [
        ("return x+1", 1.0),
        # fuzzywuzzy 0.18 gives 91.
        ("\n# a comment\n  \nreturn x + 1\nmore", 0.91),
        ("```\n// only prose", 0.0),
        ("", 0.0),
    ],
)
def test_code_similarity(prediction, value):
    assert scores.code_similarity(prediction, "return x+1") == value
