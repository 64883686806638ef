"""Generated retrieval: key–value pairs hidden in noise, then asked in another order.

A sequence is text in bytes, so that the byte tokenizer reads it and `run.py` can evaluate what was
trained on it. With keys of two digits:

    BOS +%-}( 37Q #&( 42K ~&# 42K 37Q

First come slots of one width, some with a pair and the others with noise. Then the pairs are asked,
and the model has to give the values. With as many slots as pairs, and keys of one digit, this is
associative recall. Some sequences may repeat a random text instead, where nearly every token
follows from those before by the same kind of lookup.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.models.loss import Batch

_BOS = 256
_DIGITS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvwxyz", np.uint8)
_VALUES = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_NOISE = np.frombuffer(b"#$%&()*+,-./:;<=>?@[]^_{|}~", np.uint8)
_ALL = np.concatenate([_DIGITS, _VALUES, _NOISE])
# Least and most tokens of a repeated text, and of its different tokens (powers of two).
_PERIODS = (8, 32)
_SYMBOLS = (4, 64)
# Weight of the loss on tokens that are not answers.
_OTHER_WEIGHT = 0.1
# The most needles of an evaluation.
_EVAL_NEEDLES = 256


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A distribution of sequences."""

    length: int  # Tokens of a sequence (T).
    digits: int  # Digits of a key.
    alphabet: int  # Number of values of a digit, at most 36.
    needles: int  # The most pairs of a sequence; the number is drawn among powers of two.
    queries: int  # The most questions; each pair is asked once while there are questions.
    repeated: float = 0.0  # Share of the sequences that repeat a random text.

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
        """Tokens of all questions, at the end of a sequence."""
        return self.queries * self.width

    @property
    def places(self) -> int:
        """Slots before the questions."""
        return (self.length - self.asked_tokens) // self.width

    @property
    def most_needles(self) -> int:
        """The most pairs that a sequence can have."""
        return min(self.places, self.alphabet**self.digits)

    @property
    def cases(self) -> list[int]:
        """The numbers of needles to evaluate: 1, 2, 4, … and the most."""
        return [*(2**i for i in range((self.needles - 1).bit_length())), self.needles]

    @property
    def curve_cases(self) -> list[int]:
        """The number of needles that is evaluated during training: the most."""
        return [self.needles]

    def at_length(self, length: int) -> Self:
        """Returns a task with the same keys in longer sequences, and more needles if they fit."""
        free = dataclasses.replace(self, length=length, needles=1)
        return dataclasses.replace(free, needles=min(_EVAL_NEEDLES, free.most_needles))

    def draw(
        self, key: jax.Array, count: int, needles: jax.Array | int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Draws `count` sequences, with so many needles and no repeated texts if `needles` says.

        Returns tokens int32 `[B,T+1]`, and whether each is an answer, bool `[B,T+1]`.
        """
        pair_key, repeat_key, choice_key = jax.random.split(key, 3)
        pairs = self._draw_pairs(pair_key, count, needles)
        if needles is not None or not self.repeated:
            return pairs
        choice = jax.random.bernoulli(choice_key, self.repeated, (count, 1))
        repeats = self._draw_repeats(repeat_key, count)
        text, answers = (jnp.where(choice, x, y) for x, y in zip(repeats, pairs))
        return text, answers

    def _draw_pairs(self, key: jax.Array, count: int, needles: jax.Array | int | None):
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

        def place(pair_of_slot, noise_key):
            """Puts drawn pairs into their slots, and noise into the other slots."""
            noise = jax.random.choice(noise_key, _NOISE, (*pair_of_slot.shape, self.width))
            there = (pair_of_slot < drawn)[..., None]
            index = jnp.minimum(pair_of_slot, most - 1)[..., None]
            return jnp.where(there, jnp.take_along_axis(pair, index, 1), noise), there

        slots, _ = place(_permutations(next(keys), count, self.places), next(keys))
        # Slots have random pairs, so asking the pairs in turn is another order.
        in_turn = jnp.broadcast_to(jnp.arange(self.queries), (count, self.queries))
        asked, there = place(in_turn, next(keys))
        answers = there & (jnp.arange(self.width) == self.digits)

        padding = self.length - (self.places + self.queries) * self.width
        head = jnp.broadcast_to(np.array([_BOS] + [_NOISE[0]] * padding), (count, 1 + padding))
        text = jnp.concatenate([head, slots.reshape(count, -1), asked.reshape(count, -1)], 1)
        before = self.length + 1 - self.asked_tokens
        return text.astype(jnp.int32), jnp.pad(answers.reshape(count, -1), ((0, 0), (before, 0)))

    def _draw_repeats(self, key: jax.Array, count: int):
        keys = jax.random.split(key, 4)
        low, high = _PERIODS
        period = jax.random.randint(keys[0], (count, 1), low, high + 1)
        least, most = (x.bit_length() - 1 for x in _SYMBOLS)
        different = 2 ** jax.random.randint(keys[1], (count, 1), least, most + 1)
        which = jax.random.randint(keys[2], (count, high), 0, different)
        symbols = jnp.asarray(_ALL)[_permutations(keys[3], count, len(_ALL))]
        text = jnp.take_along_axis(symbols, which, 1).astype(jnp.int32)
        place = jnp.arange(self.length + 1)
        return jnp.take_along_axis(text, place % period, 1), place > period

    def batch(self, text: jax.Array, answers: jax.Array) -> Batch:
        """Returns a training batch of the result of `draw`."""
        shape = text[:, 1:].shape
        return {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), shape),
            "weights": jnp.where(answers[:, 1:], 1.0, _OTHER_WEIGHT),
        }


def _permutations(key: jax.Array, count: int, size: int) -> jax.Array:
    """Returns a random order of the integers below `size` for each sequence, `[B,size]`."""
    return jax.random.uniform(key, (count, size)).argsort(1)
