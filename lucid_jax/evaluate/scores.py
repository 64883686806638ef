"""The scores of RULER, BABILong, LongBench and SCROLLS, as each benchmark defines them.

All scores are pure functions of strings with values in [0, 1]. ROUGE-L differs between two
benchmarks: SCROLLS takes the F-measure of the longest common subsequence (as in Google's
`rouge-score`), LongBench that of the union of the longest common subsequences of all pairs of
sentences, counting distinct words (as in the package `rouge`). Both are implemented here, since
`rouge-score` needs NLTK and `rouge` is no longer maintained.
"""

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
    """Returns the highest score of `prediction` against any of `references`."""
    return max((score(prediction, reference) for reference in references), default=0.0)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER: the share of the references that occur in the prediction, ignoring case."""
    found = _occurrences(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER: whether any of the references occurs in the prediction, ignoring case."""
    return float(any(_occurrences(prediction, references)))


def _occurrences(prediction: str, references: Sequence[str]) -> list[bool]:
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def babilong_strict(prediction: str, target: str, question: str, labels: Collection[str]) -> float:
    """BABILong's own score: whether the first sentence has the target and no other label.

    Labels that occur in the question are ignored. A label inside a longer one ("one" in "none")
    does not count; the benchmark's code counts it, so there the answer "none" is never right.

    Args:
      target: The right label, or several separated by commas.
      labels: All labels that answer any question of the task.
    """
    text = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    label = re.compile("|".join(re.escape(label.lower()) for label in labels))
    predicted = set(label.findall(text)) - set(label.findall(question.lower()))
    return float(predicted == set(target.lower().split(",")))


def babilong_lenient(prediction: str, target: str) -> float:
    """lm-eval's score of BABILong: whether the target occurs anywhere in the prediction.

    A prediction that lists every place is right.
    """
    return string_match_part(prediction, [target.strip()])


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation or articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns whether the normal forms are equal."""
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The F-measure of the words that the normal forms share."""
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    return _f_measure(_overlap(predicted, expected), len(predicted), len(expected))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """The F-measures `rouge1`, `rouge2` and `rougeL`, without stemming.

    Words are runs of a-z and 0-9 in lower case. Line breaks are ignored.
    """
    predicted, expected = (
        re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference)
    )
    bigrams = [list(itertools.pairwise(words)) for words in (predicted, expected)]
    common = sum(_in_common_subsequence(expected, predicted))
    return {
        "rouge1": _f_measure(_overlap(predicted, expected), len(predicted), len(expected)),
        "rouge2": _f_measure(_overlap(*bigrams), *map(len, bigrams)),
        "rougeL": _f_measure(common, len(predicted), len(expected)),
    }


def rouge_l_of_sentences(prediction: str, reference: str) -> float:
    """LongBench's ROUGE-L: distinct words in common subsequences of any two sentences.

    Sentences end at full stops, and words at spaces.
    """
    predicted, expected = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if s]
        for text in (prediction, reference)
    )
    common: set[str] = set()
    for sentence, other in itertools.product(expected, predicted):
        in_common = _in_common_subsequence(sentence, other)
        common |= set(itertools.compress(sentence, in_common))
    words = [set(itertools.chain(*sentences)) for sentences in (predicted, expected)]
    if not all(words):
        return 0.0
    precision, recall = (len(common) / len(w) for w in words)
    # The package adds the small number against division by zero.
    return 2 * precision * recall / (precision + recall + 1e-8)


def count_score(prediction: str, reference: str) -> float:
    """LongBench's passage_count: the share of the numbers in the prediction that are right."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, reference: str) -> float:
    """LongBench's passage_retrieval: `count_score` of the number n in "Paragraph n"."""
    return count_score(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def classification_score(prediction: str, reference: str, classes: Collection[str]) -> float:
    """LongBench's trec: 1 / (number of predicted classes) if the right one is among them.

    A class whose name is part of the right one's name does not count.
    """
    predicted = [c for c in classes if c in prediction and (c == reference or c not in reference)]
    return 1 / len(predicted) if reference in predicted else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """LongBench's code tasks: the similarity of the first line of code and the reference.

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


def _f_measure(common: int, predicted: int, expected: int) -> float:
    # 2PR/(P+R) with precision P = common/predicted and recall R = common/expected.
    return 2 * common / (predicted + expected) if common else 0.0


def _in_common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[bool]:
    """Marks the words of `first` that are in its longest common subsequence with `second`.

    Of several longest subsequences it takes the one whose words come last in `first`.
    """
    length = np.zeros((len(first) + 1, len(second) + 1), np.int32)
    ids = {word: i for i, word in enumerate({*first, *second})}
    second_ids = np.array([ids[word] for word in second], np.int64)
    for i, word in enumerate(first, 1):
        # The running maximum replaces the left neighbour of the usual recurrence.
        matched = np.where(second_ids == ids[word], length[i - 1, :-1] + 1, length[i - 1, 1:])
        length[i, 1:] = np.maximum.accumulate(np.maximum(matched, length[i - 1, 1:]))
    common = [False] * len(first)
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            common[i - 1] = True
            i, j = i - 1, j - 1
        elif length[i - 1, j] > length[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return common
