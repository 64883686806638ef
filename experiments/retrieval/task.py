"""Generated retrieval: key–value pairs hidden in noise, then asked in another order.

A row is text in bytes, so that the byte tokenizer reads it and `run.py` can evaluate what was
trained on it. With keys of two digits, repeated after the value:

    BOS +%-}( 37Q37 #&(*% 42K42 ~&#^| 42K 37Q

Slots of one width come first, some of which hold a pair and the others noise; then the pairs
are asked, and the value is what a model has to tell. With few digits keys share most of them.
With as many slots as pairs, and keys of one digit, this is associative recall.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.objective import Batch

_BOS = 256
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8)
_VALUES = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_NOISE = np.frombuffer(b"#$%&()*+,-./:;<=>?@[]^_{|}~", np.uint8)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A distribution of rows.

    Attributes:
      length: Tokens of a row (T).
      digits: Of a key.
      alphabet: How many values a digit has, at most 36.
      needles: The most pairs in a row; their number is drawn by powers of two.
      queries: The most questions of a row: pairs are asked once each, as far as these go.
      echo: Whether the key stands behind the value too, in front of the questions.
      in_order: Share of the rows that ask in the order in which the pairs stand.
      other_weight: Of the loss on all tokens that are no answers.
    """

    length: int
    digits: int
    alphabet: int
    needles: int
    queries: int = 32
    echo: bool = False
    in_order: float = 0.0
    other_weight: float = 0.1

    def __post_init__(self):
        if self.needles > self.most_needles:
            raise ValueError(
                f"{self.needles} needles need as many places and keys; {self.length} tokens have"
                f" {self.places} places, {self.digits} digits of {self.alphabet} values"
                f" {self.alphabet**self.digits} keys"
            )

    @property
    def width(self) -> int:
        """Tokens of a slot before the questions."""
        return self.digits + 1 + self.echo * self.digits

    @property
    def asked_tokens(self) -> int:
        """Tokens of all questions, at the end of a row."""
        return self.queries * (self.digits + 1)

    @property
    def places(self) -> int:
        """Slots before the questions."""
        return (self.length - self.asked_tokens) // self.width

    @property
    def most_needles(self) -> int:
        """How many pairs a row can have."""
        return min(self.places, self.alphabet**self.digits)

    def rows(
        self, rng: np.random.Generator, count: int, needles: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of text, and which of it are answers.

        Args:
          rng: Where they are drawn from.
          count: How many (B).
          needles: Pairs of every row; drawn for each row unless given.

        Returns:
          int16 `[B,T+1]` and bool `[B,T+1]`.
        """
        most, index = self.needles, np.arange(self.needles)
        if needles is None:
            drawn = np.minimum(2 ** rng.integers(0, (most - 1).bit_length() + 1, count), most)
        else:
            drawn = np.full(count, needles)
        there = index < drawn[:, None]
        key = rng.random((count, self.alphabet**self.digits)).argsort(1)[:, :most, None]
        key = _DIGITS[key // self.alphabet ** np.arange(self.digits)[::-1] % self.alphabet]
        pair = np.concatenate([key, rng.choice(_VALUES, (count, most, 1))], 2)

        slots = rng.choice(_NOISE, (count, self.places, self.width))
        place = rng.random((count, self.places)).argsort(1)[:, :most]
        row, i = np.nonzero(there)
        needle = np.concatenate([pair, key], 2) if self.echo else pair
        slots[row, place[row, i]] = needle[row, i]

        in_order = rng.random((count, 1)) < self.in_order
        rank = np.where(in_order, place, rng.random(place.shape))
        order = np.where(there, rank, np.inf).argsort(1)
        asked = rng.choice(_NOISE, (count, self.queries, self.digits + 1))
        answers = np.zeros(asked.shape, bool)
        row, i = np.nonzero(there[:, : self.queries])
        asked[row, i] = pair[row, order[row, i]]
        answers[row, i, -1] = True

        text = np.full((count, self.length + 1), _NOISE[0], np.int16)
        text[:, 0] = _BOS
        start = self.length + 1 - self.asked_tokens
        text[:, start - slots[0].size : start] = slots.reshape(count, -1)
        text[:, start:] = asked.reshape(count, -1)
        where = np.zeros(text.shape, bool)
        where[:, start:] = answers.reshape(count, -1)
        return text, where

    def batch(self, text: jax.Array, answers: jax.Array) -> Batch:
        """A batch of the objective of what `rows` gave."""
        tokens = text.astype(jnp.int32)
        shape = tokens[:, 1:].shape
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), shape),
            "weights": jnp.where(answers[:, 1:], 1.0, self.other_weight),
        }
