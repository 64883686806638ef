"""BABILong's stories in generated prose, as sequences that the device draws.

A sequence is a story of `lucid_jax.evaluate.tasks.babi`, its facts in order at random places
between sentences of `prose`, then its question and the answer, which is one word:

    <s> The judge ... . Mary went to the kitchen . A quiet traveller ... Where is Mary ? kitchen

Tokens are words and punctuation marks. BABILong's instructions and examples, the same in every
prompt of a task, are left out. The host draws stories once; the device draws the prose and the
places of the facts anew for every sequence.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.evaluate.tasks.babi import STORIES, Story
from lucid_jax.evaluate.tasks.prose import SENTENCES, sentences
from lucid_jax.models.loss import Batch

# Holds all words.
VOCAB_SIZE = 384
_PADDING, _BOS = 0, 1
_WORD = re.compile(r"\w+|[^\w\s]")
# The shortest sentence of prose, as in BABILong.
_MIN_TOKENS = 10
_TRAIN_SEED, _EVAL_SEED, _EVAL_STORIES = 1, 10**6, 1000


class _Ids(dict[str, int]):
    """Gives texts ids in the order in which they first come."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))


@functools.cache
def _words() -> dict[str, int]:
    """Returns the token of every word, the same in every process."""
    stories = (story for kind in range(1, 6) for story in _draw_stories(kind, 500, seed=0))
    told = (text for x in stories for text in (*x.facts, x.question, x.answer))
    words = {word for text in (*sentences(SENTENCES), *told) for word in _WORD.findall(text)}
    return {word: i for i, word in enumerate(["<pad>", "<s>", *sorted(words)])}


def _encode(text: str) -> list[int]:
    return [_words()[word] for word in _WORD.findall(text)]


def decode(tokens: Iterable[int]) -> str:
    """Returns the words of tokens, with spaces between them."""
    words = list(_words())
    return " ".join(words[i] for i in tokens)


def _draw_stories(kind: int, count: int, seed: int) -> list[Story]:
    rng = np.random.default_rng([seed, kind])
    return [STORIES[f"qa{kind}"](rng) for _ in range(count)]


def most_frequent_answer(kind: int) -> float:
    """Returns the share of the most frequent answer among the stories of an evaluation."""
    answers = collections.Counter(x.answer for x in _draw_stories(kind, _EVAL_STORIES, _EVAL_SEED))
    return answers.most_common(1)[0][1] / _EVAL_STORIES


class _Tables(NamedTuple):
    """Sentences, and stories made of them.

    Attributes:
      tokens: Tokens of every sentence, padded `[X,W]`; the prose comes first.
      widths: Number of tokens of every sentence `[X]`.
      prose: Number of sentences of prose.
      facts: Sentences of every story in order, padded with −1 `[Y,F]`; kind after kind.
      questions: Sentence of every story's question `[Y]`.
      answers: Token of every story's answer `[Y]`.
      ends: Stories up to the end of every kind, from 0 `[kinds+1]`.
    """

    tokens: np.ndarray
    widths: np.ndarray
    prose: int
    facts: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    ends: np.ndarray

    @classmethod
    @functools.cache
    def draw(cls, kinds: tuple[int, ...], count: int, seed: int) -> _Tables:
        """Draws `count` stories of each kind."""
        ids = _Ids()
        long = [text for text in sentences(SENTENCES) if len(_encode(text)) >= _MIN_TOKENS]
        prose = len([ids[text] for text in long])
        stories = [story for kind in kinds for story in _draw_stories(kind, count, seed)]
        facts = _padded([[ids[fact] for fact in story.facts] for story in stories], -1)
        questions = np.array([ids[story.question] for story in stories])
        answers = np.array([_encode(story.answer)[0] for story in stories])
        tokens = [_encode(text) for text in ids]
        widths = np.array([len(x) for x in tokens])
        ends = count * np.arange(len(kinds) + 1)
        return cls(_padded(tokens, _PADDING), widths, prose, facts, questions, answers, ends)

    def fitting(self, most: int) -> _Tables:
        """Returns the tables without the stories that have more than `most` tokens."""
        widths = np.append(self.widths, 0)  # The width of a padded fact, −1.
        fits = widths[self.facts].sum(1) + widths[self.questions] <= most
        facts = self.facts[fits]
        return self._replace(
            facts=facts[:, (facts >= 0).any(0)],
            questions=self.questions[fits],
            answers=self.answers[fits],
            ends=np.append(0, fits.cumsum())[self.ends],
        )


def _padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows))), value, np.int16)
    for row, values in zip(table, rows):
        row[: len(values)] = values
    return table


@dataclasses.dataclass(frozen=True)
class Stories:
    """A distribution of sequences; those shorter than T are padded at the end.

    A case is the number of a task, as in qa1.
    """

    length: int  # The most tokens of a sequence, without the answer (T).
    shortest: int  # The fewest in training, where lengths are uniform.
    cases: tuple[int, ...] = (1, 2, 3, 4, 5)
    count: int = 20_000  # Stories of each task to train on.

    @property
    def asked_tokens(self) -> int:
        """See `Task`."""
        return self.length

    @property
    def curve_cases(self) -> tuple[int, ...]:
        """See `Task`."""
        return self.cases

    def at_length(self, length: int) -> Stories:
        """See `Task`."""
        return dataclasses.replace(self, length=length)

    def draw(
        self, key: jax.Array, count: int, case: jax.Array | int | None = None, /
    ) -> tuple[jax.Array, jax.Array]:
        """See `Task`; a case has stories that are held out of training, and full lengths."""
        held_out = case is not None
        drawn = (_EVAL_STORIES, _EVAL_SEED) if held_out else (self.count, _TRAIN_SEED)
        tables = _Tables.draw(self.cases, *drawn).fitting(self.length - 1)
        keys = jax.random.split(key, 4)
        if case is None:
            kind = jax.random.randint(keys[0], (count,), 0, len(self.cases))
        else:
            kind = jnp.searchsorted(jnp.array(self.cases), case)
        ends = jnp.asarray(tables.ends)
        story = jax.random.randint(keys[1], (count,), ends[kind], ends[kind + 1])
        shortest = self.length if held_out else self.shortest
        length = jax.random.randint(keys[2], (count,), shortest, self.length + 1)
        write = jax.vmap(functools.partial(self._write, tables))
        return write(jax.random.split(keys[3], count), story, length)

    def _write(
        self, tables: _Tables, key: jax.Array, story: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Writes a story: `length` tokens and the answer, padded `[T+1]`, and the answer's mask."""
        prose_key, place_key = jax.random.split(key)
        tokens, widths = jnp.asarray(tables.tokens), jnp.asarray(tables.widths)
        facts = jnp.asarray(tables.facts)[story].astype(jnp.int32)
        question = jnp.asarray(tables.questions)[story]
        fact_widths = jnp.where(facts < 0, 0, widths[facts])
        room = jnp.maximum(length - 1 - fact_widths.sum() - widths[question], 0)

        most = self.length // _MIN_TOKENS + 1
        prose = jax.random.randint(prose_key, (most,), 0, tables.prose)
        # The sentence that reaches the end is cut, as in BABILong.
        begins = jnp.cumsum(widths[prose]) - widths[prose]
        prose_widths = jnp.clip(room - begins, 0, widths[prose])
        places = jax.random.randint(place_key, facts.shape, 0, (prose_widths > 0).sum() + 1)
        # Facts come before the sentence of their place, and what pads a story at the end.
        places = jnp.sort(jnp.where(facts < 0, most + 1, places))
        order = jnp.append(places, jnp.arange(most) + 0.5).argsort(stable=True)

        pieces = jnp.append(jnp.append(facts, prose)[order], question)
        ends = jnp.cumsum(
            jnp.append(jnp.append(fact_widths, prose_widths)[order], widths[question])
        )
        at = jnp.arange(self.length)
        piece = jnp.searchsorted(ends, at, side="right")
        begin = jnp.append(0, ends)[piece]
        text = jnp.where(at < ends[-1], tokens[pieces[piece], at - begin], _PADDING)
        text = jnp.append(_BOS, text.astype(jnp.int32))
        answers = jnp.arange(self.length + 1) == ends[-1] + 1
        return jnp.where(answers, jnp.asarray(tables.answers)[story], text), answers

    def batch(self, text: jax.Array, answers: jax.Array) -> Batch:
        """See `Task`; an answer weighs as much as all other tokens of a sequence of length T."""
        shape = text[:, 1:].shape
        others = jnp.where(text[:, 1:] == _PADDING, 0, 1 / self.length)
        return {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": jnp.ones(shape, jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), shape),
            "weights": jnp.where(answers[:, 1:], 1, others),
        }
