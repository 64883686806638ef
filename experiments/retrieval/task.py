"""Generated retrieval: key–value pairs hidden in noise, then asked in another order.

A row is text in bytes, so that the byte tokenizer reads it and `run.py` can evaluate what was
trained on it:

    BOS !7203Q #&(*%+ … !7204K … | !7204K !7203Q

Slots of one width come first, some of which hold a pair (a marker, the digits of the key, a
value) and the others noise; the last `queries` slots ask the pairs again, and the value there
is what a model has to tell. With few digits keys share most of them. With as many pairs as
slots, and one digit, this is associative recall.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.objective import Batch

_BOS = 256
_MARKER = ord("!")
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
      other_weight: Of the loss on all tokens that are no answers.
    """

    length: int
    digits: int
    alphabet: int
    needles: int
    queries: int = 32
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
        """Tokens of a slot."""
        return self.digits + 2

    @property
    def places(self) -> int:
        """Slots before the questions."""
        return self.length // self.width - self.queries

    @property
    def most_needles(self) -> int:
        """How many pairs a row can have."""
        return min(self.places, self.alphabet**self.digits)

    def batch(self, rng: jax.Array, rows: int) -> Batch:
        """Rows of the objective, `needles` of each drawn: weight 1 at answers.

        Args:
          rng: A random key.
          rows: How many (B).
        """
        return self.batch_and_answers(rng, rows)[0]

    def batch_and_answers(
        self, rng: jax.Array, rows: int, needles: jax.Array | None = None
    ) -> tuple[Batch, jax.Array]:
        """A batch as `batch` gives it, and which of its targets are answers, bool `[B,T]`.

        Args:
          rng: A random key.
          rows: How many (B).
          needles: Pairs of every row, int32 scalar; drawn for each row unless given.
        """
        text, answer = jax.vmap(lambda r: self._row(r, needles))(jax.random.split(rng, rows))
        shape = rows, self.length
        answer = answer[:, 1:]
        batch = {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), shape),
            "weights": jnp.where(answer, 1.0, self.other_weight),
        }
        return batch, answer

    def _row(self, rng: jax.Array, needles: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The text `[T+1]` and which of it are answers."""
        count_rng, key_rng, value_rng, place_rng, order_rng, noise_rng = jax.random.split(rng, 6)
        n, width = self.needles, self.width
        if needles is None:
            count = jnp.minimum(2 ** jax.random.randint(count_rng, (), 0, n.bit_length()), n)
        else:
            count = needles
        number = jax.random.choice(key_rng, self.alphabet**self.digits, (n,), replace=False)
        digit = number[:, None] // self.alphabet ** jnp.arange(self.digits)[::-1] % self.alphabet
        pairs = jnp.concatenate(
            [
                jnp.full((n, 1), _MARKER),
                jnp.asarray(_DIGITS)[digit],
                jax.random.choice(value_rng, jnp.asarray(_VALUES), (n, 1)),
            ],
            1,
        )
        slots = jax.random.choice(
            noise_rng, jnp.asarray(_NOISE), (self.places + self.queries, width)
        ).astype(jnp.int32)
        # Rows past the last slot are dropped: pairs beyond the count, questions beyond it.
        last = len(slots)
        place = jax.random.choice(place_rng, self.places, (n,), replace=False)
        slots = slots.at[jnp.where(jnp.arange(n) < count, place, last)].set(pairs, mode="drop")
        order = jnp.argsort(
            jnp.where(jnp.arange(n) < count, jax.random.uniform(order_rng, (n,)), 2)
        )
        asked = min(n, self.queries)
        is_asked = jnp.arange(asked) < count
        question = jnp.where(is_asked, self.places + jnp.arange(asked), last)
        slots = slots.at[question].set(pairs[order[:asked]], mode="drop")
        answer = jnp.zeros(slots.shape, bool).at[question, -1].set(True, mode="drop")
        front = self.length - slots.size
        head = jnp.full((front + 1,), _NOISE[0], jnp.int32).at[0].set(_BOS)
        return (
            jnp.concatenate([head, slots.reshape(-1).astype(jnp.int32)]),
            jnp.concatenate([jnp.zeros(front + 1, bool), answer.reshape(-1)]),
        )
