"""Generated retrieval: key–value pairs hidden in noise, then asked in another order.

A row is text in bytes, so that the byte tokenizer reads it and `run.py` can evaluate what was
trained on it. With keys of two digits:

    BOS +%-}( 37Q #&( 42K ~&# 42K 37Q

Slots of one width come first, some of which hold a pair and the others noise; then the pairs
are asked, and the value is what a model has to tell. With few digits keys share most of them.
With as many slots as pairs, and keys of one digit, this is associative recall.

Some rows may be a random sequence again and again instead. There nearly every token can be
told from those before, in the way in which values can, which models do not find from the few
answers of pairs alone. Where such a sequence has few different tokens, one must look at several
of them, as with keys of several digits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.models.loss import Batch

_BOS = 256
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8)
_VALUES = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_NOISE = np.frombuffer(b"#$%&()*+,-./:;<=>?@[]^_{|}~", np.uint8)
_ALL = np.concatenate([_DIGITS, _VALUES, _NOISE])
# Tokens of a sequence that is repeated, and how many different ones: powers of two.
_PERIODS = (8, 32)
_SYMBOLS = (4, 64)
# Of the loss on tokens that are no answers.
_OTHER_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A distribution of rows.

    Attributes:
      length: Tokens of a row (T).
      digits: Of a key.
      alphabet: How many values a digit has, at most 36.
      needles: The most pairs in a row; their number is drawn by powers of two.
      queries: The most questions of a row: pairs are asked once each, as far as these go.
      repeated: Share of the rows that are a random sequence again and again.
    """

    length: int
    digits: int
    alphabet: int
    needles: int
    queries: int = 32
    repeated: float = 0.0

    def __post_init__(self):
        if self.needles > self.most_needles:
            raise ValueError(
                f"{self.needles} needles need as many places and keys; {self.length} tokens have"
                f" {self.places} places, {self.digits} digits of {self.alphabet} values"
                f" {self.alphabet**self.digits} keys"
            )

    @property
    def width(self) -> int:
        """Tokens of a slot or a question."""
        return self.digits + 1

    @property
    def asked_tokens(self) -> int:
        """Tokens of all questions, at the end of a row."""
        return self.queries * self.width

    @property
    def places(self) -> int:
        """Slots before the questions."""
        return (self.length - self.asked_tokens) // self.width

    @property
    def most_needles(self) -> int:
        """How many pairs a row can have."""
        return min(self.places, self.alphabet**self.digits)

    def rows(
        self, key: jax.Array, count: int, needles: jax.Array | int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Rows of text, and which of it are answers.

        Args:
          key: Of `jax.random`.
          count: How many (B).
          needles: Pairs of every row, none of which is a repeated sequence then; drawn for
            each row unless given.

        Returns:
          int32 `[B,T+1]` and bool `[B,T+1]`.
        """
        pair_key, sequence_key, which_key = jax.random.split(key, 3)
        pairs = self._pairs(pair_key, count, needles)
        if needles is not None or not self.repeated:
            return pairs
        which = jax.random.bernoulli(which_key, self.repeated, (count, 1))
        sequences = self._sequences(sequence_key, count)
        text, answers = (jnp.where(which, x, y) for x, y in zip(sequences, pairs))
        return text, answers

    def _pairs(self, key: jax.Array, count: int, needles: jax.Array | int | None):
        keys = iter(jax.random.split(key, 6))
        most = self.needles
        if needles is None:
            power = jax.random.randint(next(keys), (count, 1), 0, (most - 1).bit_length() + 1)
            drawn = jnp.minimum(2**power, most)
        else:
            drawn = jnp.full((count, 1), needles)

        which = _permutations(next(keys), count, self.alphabet**self.digits)[:, :most, None]
        digits = which // self.alphabet ** np.arange(self.digits)[::-1] % self.alphabet
        value = jax.random.choice(next(keys), _VALUES, (count, most, 1))
        pair = jnp.concatenate([jnp.asarray(_DIGITS)[digits], value], 2)

        def placed(pair_of_slot, noise_key):
            """Pairs in slots, and noise in those that name none of the drawn pairs."""
            noise = jax.random.choice(noise_key, _NOISE, (*pair_of_slot.shape, self.width))
            there = (pair_of_slot < drawn)[..., None]
            index = jnp.minimum(pair_of_slot, most - 1)[..., None]
            return jnp.where(there, jnp.take_along_axis(pair, index, 1), noise), there

        slots, _ = placed(_permutations(next(keys), count, self.places), next(keys))
        # Where they stand is random, so this is no order of theirs.
        in_turn = jnp.broadcast_to(jnp.arange(self.queries), (count, self.queries))
        asked, there = placed(in_turn, next(keys))
        answers = there & (jnp.arange(self.width) == self.digits)

        padding = self.length - (self.places + self.queries) * self.width
        head = jnp.broadcast_to(np.array([_BOS] + [_NOISE[0]] * padding), (count, 1 + padding))
        text = jnp.concatenate([head, slots.reshape(count, -1), asked.reshape(count, -1)], 1)
        where = jnp.pad(
            answers.reshape(count, -1), ((0, 0), (self.length + 1 - self.asked_tokens, 0))
        )
        return text.astype(jnp.int32), where

    def _sequences(self, key: jax.Array, count: int):
        keys = jax.random.split(key, 4)
        low, high = _PERIODS
        period = jax.random.randint(keys[0], (count, 1), low, high + 1)
        least, most = (x.bit_length() - 1 for x in _SYMBOLS)
        different = 2 ** jax.random.randint(keys[1], (count, 1), least, most + 1)
        which = jax.random.randint(keys[2], (count, high), 0, different)
        symbols = jnp.asarray(_ALL)[_permutations(keys[3], count, len(_ALL))]
        sequence = jnp.take_along_axis(symbols, which, 1).astype(jnp.int32)
        place = jnp.arange(self.length + 1)
        return jnp.take_along_axis(sequence, place % period, 1), place > period

    def batch(self, text: jax.Array, answers: jax.Array) -> Batch:
        """A batch of the objective of what `rows` gave."""
        shape = text[:, 1:].shape
        return {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), shape),
            "weights": jnp.where(answers[:, 1:], 1.0, _OTHER_WEIGHT),
        }


def _permutations(key: jax.Array, count: int, size: int) -> jax.Array:
    """`[B,size]`, a random order of the integers below `size` in every row."""
    return jax.random.uniform(key, (count, size)).argsort(1)
