"""Shared parts of RULER's tasks: their scores, the noise, and keys and words from `wonderwords`."""

import functools
import uuid
from collections.abc import Collection

import numpy as np
import wonderwords

from lucid_jax.evaluate import scores
from lucid_jax.evaluate.tasks.task import Sample, Task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class RulerTask(Task):
    """A task whose metric is a function of `lucid_jax.evaluate.scores`."""

    metric = "string_match_all"

    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """See `Task`."""
        return {self.metric: getattr(scores, self.metric)(prediction, sample.answers)}


def insert_lines(lines: list[str], items: list[str], rng: np.random.Generator) -> list[str]:
    """Inserts `items`, in their order, before distinct random lines."""
    places = np.sort(rng.choice(len(lines), len(items), replace=False))
    item_before = dict(zip(places.tolist(), items))
    return [x for i, line in enumerate(lines) for x in (item_before.get(i), line) if x]


def draw(
    rng: np.random.Generator, kind: str, count: int, without: Collection[str] = ()
) -> list[str]:
    """Draws distinct strings. NVIDIA's code may draw a key twice, which then has two answers.

    The kind "words" are compounds, "numbers" have seven digits, "uuids" are of version 4.
    Strings in `without` are not drawn.
    """
    # A dictionary is a set that keeps its order, so that the result is reproducible.
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        for text in _draw_any(rng, kind, count - len(drawn)):
            if text not in without:
                drawn[text] = None
    return list(drawn)


def _draw_any(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    if kind == "numbers":
        return [str(n) for n in rng.integers(10**6, 10**7, count)]
    if kind == "uuids":
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    return [compound(n) for n in rng.integers(num_compounds(), size=count).tolist()]


def compound(number: int) -> str:
    """Returns an adjective-noun compound; `number` is below `num_compounds()`."""
    nouns = _category("noun")
    return f"{_category('adjective')[number // len(nouns)]}-{nouns[number % len(nouns)]}"


def num_compounds() -> int:
    """Returns the number of adjective-noun compounds."""
    return len(_category("adjective")) * len(_category("noun"))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns all nouns, adjectives and verbs, sorted and without duplicates."""
    return tuple(sorted({*_category("noun"), *_category("adjective"), *_category("verb")}))


@functools.cache
def _category(name: str) -> tuple[str, ...]:
    return tuple(wonderwords.RandomWord().filter(include_categories=[name]))
