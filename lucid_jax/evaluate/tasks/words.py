"""Keys and words of RULER: the lists of `wonderwords`, as NVIDIA's code draws from them."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Collection

import numpy as np
import wonderwords


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every noun, adjective and verb once, sorted."""
    return tuple(sorted({*_category("noun"), *_category("adjective"), *_category("verb")}))


def compound(number: int) -> str:
    """The adjective-noun compound of `number`, which is below `compounds()`."""
    nouns = _category("noun")
    return f"{_category('adjective')[number // len(nouns)]}-{nouns[number % len(nouns)]}"


def compounds() -> int:
    """How many compounds there are."""
    return len(_category("adjective")) * len(_category("noun"))


def draw(rng: np.random.Generator, kind: str, count: int, without: Collection[str] = ()):
    """`count` distinct strings.

    NVIDIA's code may draw a key twice, which has two answers; none here does.

    Args:
      rng: what draws.
      kind: "words" are compounds, "numbers" have seven digits, "uuids" are version 4.
      count: how many.
      without: strings that are not drawn.
    """
    # A dictionary is a set that keeps its order, and so the draw reproducible.
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
    return [compound(n) for n in rng.integers(compounds(), size=count).tolist()]


@functools.cache
def _category(name: str) -> tuple[str, ...]:
    return tuple(wonderwords.RandomWord().filter(include_categories=[name]))
