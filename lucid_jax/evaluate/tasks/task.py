"""What a task is: samples fitted to a length, and scores of what a model answers."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.tokenizer import Tokenizer

# A fitted prompt may leave this share of its budget unused: each try costs the tokenization
# of a whole prompt, and the last few tokens cost as many tries as all before them.
_SLACK = 1 / 256


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question to a model.

    `meta` holds what scoring needs besides the answers, and what a report counts: always
    `prompt_tokens` (with the token that opens a document), and `truncated_tokens` in tasks
    that cut a text to fit.
    """

    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """Samples and scores of one benchmark task.

    Attributes:
      name: as results show it. Ends in `[prose]` where text of our own stands in for
        a text or questions that the benchmark takes from elsewhere.
      metric: which of the scores its benchmark publishes.
      size: how many samples there are; None where they are generated, without end.
      source: the field of `Sources` that its samples come from; "" where all is generated.
    """

    name: str
    metric: str
    size: int | None = None
    source: str = ""

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        """Sample `index` of `seed`, the same in any order and in any process.

        Its prompt, the token that opens a document and `max_new_tokens` together are at
        most `length` tokens of `tokenizer`.

        Raises:
          ConfigError: `length` is too small for the task, or there is no such sample.
        """
        if index < 0 or (self.size is not None and index >= self.size):
            raise ConfigError(f"{self.name} has no sample {index}; it has {self.size or 'any'}")
        return self._sample(Budget(tokenizer, length, self.name), (seed, index))

    @abc.abstractmethod
    def _sample(self, budget: Budget, key: tuple[int, int]) -> Sample:
        """The sample of `key`, which is (seed, index)."""

    @abc.abstractmethod
    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Scores in [0, 1] of what a model wrote after the prompt of `sample`, by name."""

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The scores of a task from those of its samples (at least one): their means."""
        return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


class Budget:
    """How many tokens a sample of one length may take, and the draws that belong to it."""

    def __init__(self, tokenizer: Tokenizer, length: int, task: str):
        self.tokenizer = tokenizer
        self.length = length
        self._task = task

    def count(self, prompt: str) -> int:
        """Tokens of a prompt as a model gets it: with the one that opens a document."""
        return len(self.tokenizer.encode(prompt)) + (self.tokenizer.bos_id is not None)

    def generator(self, key: tuple[int, int], purpose: str = "") -> np.random.Generator:
        """A generator of (seed, task, length, index) alone, and of `purpose` within a sample."""
        # Not hash(): it differs from process to process.
        digest = hashlib.sha256(f"{self._task}/{purpose}".encode()).digest()
        words = np.frombuffer(digest, np.uint32).tolist()
        return np.random.default_rng(np.random.SeedSequence([*key, self.length, *words]))

    def check(self, prompt: str, max_new_tokens: int) -> int:
        """The tokens of `prompt`.

        Raises:
          ConfigError: with the answer they are more than the length.
        """
        tokens = self.count(prompt)
        if tokens + max_new_tokens > self.length:
            raise ConfigError(
                f"{self._task} does not fit in {self.length} tokens: this sample takes at least"
                f" {tokens} for the prompt and {max_new_tokens} for the answer"
            )
        return tokens

    def fit(
        self, render: Callable[[int], str], max_new_tokens: int, smallest: int, largest: int
    ) -> tuple[str, int]:
        """The prompt of the largest size that fits, to within the slack, and its tokens.

        Args:
          render: the prompt of a size; a size must always give the same prompt.
          max_new_tokens: left free for the answer.
          smallest, largest: sizes that `render` takes.

        Raises:
          ConfigError: not even the smallest size fits.
        """
        room = self.length - max_new_tokens
        slack = int(room * _SLACK)
        low, best = smallest, render(smallest)
        tokens = self.check(best, max_new_tokens)
        high, high_tokens, slope = None, 0, 0.0
        for step in itertools.count(1):
            if tokens >= room - slack or low == largest or high == low + 1:
                break
            if high is not None:
                slope = (high_tokens - tokens) / (high - low)
            jump = int((room - slack // 2 - tokens) / slope) if slope > 0 else 16
            # Halving guards against sizes to which tokens are far from proportional.
            size = _next_size(low, high, largest, jump, halve=step % 4 == 0)
            prompt = render(size)
            size_tokens = self.count(prompt)
            if size_tokens > room:
                high, high_tokens = size, size_tokens
            else:
                slope = (size_tokens - tokens) / (size - low)
                low, best, tokens = size, prompt, size_tokens
        return best, tokens


def _next_size(low: int, high: int | None, largest: int, jump: int, halve: bool) -> int:
    """A size above `low` and below `high`, which is None while every size has fitted."""
    if high is None:
        return min(low + min(max(jump, 1), 16 * (low + 16)), largest)
    return (low + high) // 2 if halve else min(max(low + jump, low + 1), high - 1)
