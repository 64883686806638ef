"""The interface of a benchmark task, and the builder that fits its samples to a length."""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.tokenizer import Tokenizer

# A fitted prompt may leave this share of its room unused: each try tokenizes a whole prompt, and
# filling the last few tokens takes as many tries as filling all others.
_SLACK = 1 / 256


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its reference answers.

    Attributes:
      stop: Texts that end an answer.
      meta: What scores need besides the answers, and counts for the report: always
        `prompt_tokens` (with the BOS token), and `truncated_tokens` in tasks that cut texts.
    """

    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """A task of a benchmark: builds samples and scores answers.

    Attributes:
      name: The name in results. It ends in `[prose]` if generated text replaces a text or
        questions that the benchmark takes from elsewhere.
      metric: The score that the benchmark publishes.
      size: The number of samples; None if they are generated without end.
      source: The field of `Sources` that samples are read from; "" if they are generated.
    """

    name: str
    metric: str
    size: int | None = None
    source: str = ""

    def sample(self, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
        """Returns sample `index` of `seed`, the same in any order and in any process.

        The BOS token, the prompt and `max_new_tokens` together are at most `length` tokens.

        Raises:
          ConfigError: `length` is too small for the task, or there is no such sample.
        """
        if index < 0 or (self.size is not None and index >= self.size):
            raise ConfigError(f"{self.name} has no sample {index}; it has {self.size or 'any'}")
        return self._build(SampleBuilder(self.name, tokenizer, length, seed, index))

    @abc.abstractmethod
    def _build(self, builder: "SampleBuilder") -> Sample:
        """Builds sample `builder.index`."""

    @abc.abstractmethod
    def score(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Returns the scores, in [0, 1], of a generated answer by name."""

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Combines the scores of at least one sample into those of the task: their means."""
        return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


class SampleBuilder:
    """Provides the random draws of one sample and fits its prompt to a length."""

    def __init__(self, task: str, tokenizer: Tokenizer, length: int, seed: int, index: int):
        self.tokenizer, self.length, self.index = tokenizer, length, index
        self._task, self._seed = task, seed

    def generator(self, purpose: str = "") -> np.random.Generator:
        """Returns a generator seeded by the seed, task, length, index and `purpose` alone."""
        # Not hash(), which differs between processes.
        digest = hashlib.sha256(f"{self._task}/{purpose}".encode()).digest()
        words = np.frombuffer(digest, np.uint32).tolist()
        entropy = [self._seed, self.index, self.length, *words]
        return np.random.default_rng(np.random.SeedSequence(entropy))

    def count(self, prompt: str) -> int:
        """Returns the tokens of a prompt, including the BOS token."""
        return len(self.tokenizer.encode(prompt)) + (self.tokenizer.bos_id is not None)

    def check(self, prompt: str, max_new_tokens: int) -> int:
        """Returns the tokens of `prompt`; raises ConfigError if it leaves the answer no room."""
        tokens = self.count(prompt)
        if tokens + max_new_tokens > self.length:
            raise ConfigError(
                f"{self._task} does not fit in {self.length} tokens: this sample takes at least"
                f" {tokens} for the prompt and {max_new_tokens} for the answer"
            )
        return tokens

    def fit(
        self,
        render: Callable[[int], str],
        answers: tuple[str, ...],
        max_new_tokens: int,
        smallest: int,
        largest: int,
        **meta: Any,
    ) -> Sample:
        """Builds the sample whose prompt has the largest size that fits, up to the slack.

        Args:
          render: Returns the prompt of a size from `smallest` to `largest`, always the same one.
          answers, max_new_tokens: As in `Sample`.
          smallest, largest: The range of sizes.
          **meta: More entries of `Sample.meta`.

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
            # Every fourth step bisects, in case tokens are far from proportional to sizes.
            size = _next_size(low, high, largest, jump, bisect=step % 4 == 0)
            prompt = render(size)
            size_tokens = self.count(prompt)
            if size_tokens > room:
                high, high_tokens = size, size_tokens
            else:
                slope = (size_tokens - tokens) / (size - low)
                low, best, tokens = size, prompt, size_tokens
        return Sample(best, answers, max_new_tokens, meta={"prompt_tokens": tokens, **meta})

    def truncate(
        self,
        prompt: str,
        answers: tuple[str, ...],
        max_new_tokens: int,
        *,
        head: float,
        stop: tuple[str, ...] = (),
        **meta: Any,
    ) -> Sample:
        """Builds a sample from a given prompt, which is cut if it is too long.

        Args:
          answers, max_new_tokens, stop: As in `Sample`.
          head: The share of the kept tokens taken from the beginning; the rest are from the end.
          **meta: More entries of `Sample.meta`.

        Raises:
          ConfigError: the length leaves no token for the prompt.
        """
        room = self.length - max_new_tokens
        special_tokens = self.check("", max_new_tokens)
        ids = self.tokenizer.encode(prompt)
        total = tokens = special_tokens + len(ids)
        keep = room - special_tokens
        # Decoded and encoded again, the kept tokens may become a few more.
        while tokens > room:
            if keep <= 0:
                self.check(prompt, max_new_tokens)  # Raises.
            first = int(keep * head)
            parts = ids[:first], ids[len(ids) - (keep - first) :]
            prompt = "".join(map(self.tokenizer.decode, parts))
            tokens = self.count(prompt)
            keep -= max(tokens - room, 1)
        counts = {"prompt_tokens": tokens, "truncated_tokens": total - tokens}
        return Sample(prompt, answers, max_new_tokens, stop, {**counts, **meta})


def _next_size(low: int, high: int | None, largest: int, jump: int, bisect: bool) -> int:
    """Returns a size above `low` and below `high`, which is None while every size has fitted."""
    if high is None:
        return min(low + min(max(jump, 1), 16 * (low + 16)), largest)
    return (low + high) // 2 if bisect else min(max(low + jump, low + 1), high - 1)
