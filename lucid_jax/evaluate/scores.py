"""The scores of RULER, BABILong, LongBench and SCROLLS, as each benchmark defines them.

All are pure functions of strings with values in [0, 1]. Two benchmarks mean different things
by ROUGE-L: SCROLLS the F-measure of the longest common subsequence (as in Google's
`rouge-score`), LongBench the union of those of all pairs of sentences, over distinct words
(as in the package `rouge`). Both are written out here, since those packages bring NLTK or are
no longer kept.
"""

from __future__ import annotations

import collections
import difflib
import itertools
import re
import string
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")


def best(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The best of the scores of `prediction` against each of `references`."""
    return max((score(prediction, reference) for reference in references), default=0.0)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER: the share of the references that the prediction has, in any case of letters."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER: whether the prediction has any of the references."""
    return float(any(_found(prediction, references)))


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def babilong_strict(prediction: str, target: str, question: str, labels: Collection[str]) -> float:
    """BABILong's own score: whether the first sentence has the target and no other label.

    Labels that the question names are not counted. A label inside a longer one is none
    ("one" in "none"); the benchmark's code counts it, so that there no answer "none" is right.

    Args:
      target: a label, or several with commas between.
      labels: everything that is the answer to some question of the task.
    """
    text = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    label = re.compile("|".join(re.escape(label.lower()) for label in labels))
    said = set(label.findall(text)) - set(label.findall(question.lower()))
    return float(said == set(target.lower().split(",")))


def babilong_lenient(prediction: str, target: str) -> float:
    """lm-eval's score of BABILong: whether the prediction has the target anywhere.

    An answer that lists every place is right.
    """
    return string_match_part(prediction, [target.strip()])


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation or articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Whether both have the same normal form."""
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The F-measure of the words that both have, in their normal forms."""
    said, right = normalize(prediction).split(), normalize(reference).split()
    return _f_measure(_overlap(said, right), len(said), len(right))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F-measures `rouge1`, `rouge2` and `rougeL`, without stemming.

    Words are runs of a-z and 0-9 in lower case. Line breaks mean nothing.
    """
    said, right = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    pairs = [list(itertools.pairwise(words)) for words in (said, right)]
    common = sum(_in_common(right, said))
    return {
        "rouge1": _f_measure(_overlap(said, right), len(said), len(right)),
        "rouge2": _f_measure(_overlap(*pairs), *map(len, pairs)),
        "rougeL": _f_measure(common, len(said), len(right)),
    }


def rouge_l_of_sentences(prediction: str, reference: str) -> float:
    """LongBench's ROUGE-L: distinct words in common subsequences of any two sentences.

    Sentences end at full stops, and words at spaces.
    """
    said, right = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if s]
        for text in (prediction, reference)
    )
    common: set[str] = set()
    for sentence in right:
        for other in said:
            common |= {w for w, shared in zip(sentence, _in_common(sentence, other)) if shared}
    words = [{word for sentence in sentences for word in sentence} for sentences in (said, right)]
    if not all(words):
        return 0.0
    precision, recall = (len(common) / len(w) for w in words)
    # As the package has it; the small number only guards against zero.
    return 2 * precision * recall / (precision + recall + 1e-8)


def count_score(prediction: str, reference: str) -> float:
    """LongBench's passage_count: the share of the numbers in the prediction that are right."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, reference: str) -> float:
    """LongBench's passage_retrieval: `count_score` of the number in "Paragraph n"."""
    return count_score(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def classification_score(prediction: str, reference: str, classes: Collection[str]) -> float:
    """LongBench's trec: 1 over the number of classes named, if the right one is among them.

    Classes whose names are part of the right one's are not counted.
    """
    named = [c for c in classes if c in prediction and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """LongBench's code tasks: how alike the first line of code and the reference are.

    A line with a backtick, `#` or `//` counts as prose. The similarity is `fuzz.ratio` of
    fuzzywuzzy: difflib's ratio, rounded to hundredths.
    """
    lines = [line for line in prediction.split("\n") if line.strip()]
    code = [line for line in lines if not any(mark in line for mark in ("`", "#", "//"))]
    if not code or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, code[0], reference).ratio()) / 100


def _overlap(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    return (collections.Counter(first) & collections.Counter(second)).total()


def _f_measure(common: int, said: int, right: int) -> float:
    # 2PR/(P+R), with precision common/said and recall common/right.
    return 2 * common / (said + right) if common else 0.0


def _in_common(first: Sequence[str], second: Sequence[str]) -> list[bool]:
    """Which of `first` are in its longest common subsequence with `second`.

    Of several that are longest, the one whose words stand last in `first`.
    """
    length = np.zeros((len(first) + 1, len(second) + 1), np.int32)
    ids = {word: i for i, word in enumerate({*first, *second})}
    row_of = np.array([ids[word] for word in second], np.int64)
    for i, word in enumerate(first, 1):
        # A row of the usual recurrence: its running maximum stands for the term to the left.
        matched = np.where(row_of == ids[word], length[i - 1, :-1] + 1, length[i - 1, 1:])
        length[i, 1:] = np.maximum.accumulate(np.maximum(matched, length[i - 1, 1:]))
    shared = [False] * len(first)
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            shared[i - 1] = True
            i, j = i - 1, j - 1
        elif length[i - 1, j] > length[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return shared
