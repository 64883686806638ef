"""Documents, and sources of them by index.

`source[i]` is document `i` of `len(source)`. Every source is picklable and can be read from
several threads.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lucid_jax.config import ConfigError


class Completion(NamedTuple):
    """A prompt, and the text after it that alone is trained on."""

    prompt: str
    completion: str


# A text, a prompt with its completion, or tokens int32 [T] with special tokens included, where
# `~id` is a token of a prompt.
Document = str | Completion | np.ndarray


class BadDocumentError(ConfigError):
    """One document of a source cannot be read; the others may be sound."""


class Source(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class Selection:
    """The documents of `source` at `indices` [size], in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[int(self._indices[index])]


class Concatenation:
    """The documents of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        part = bisect.bisect_right(self._ends, index)
        return self._sources[part][index - (self._ends[part - 1] if part else 0)]
