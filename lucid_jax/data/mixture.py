"""Weighted mixtures of sources, and which of their documents a split reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lucid_jax.config import ConfigError, DataConfig
from lucid_jax.data.sources import Document, Source, SourceSpec, locate, open_source

Split = Literal["train", "eval"]


def parse_mixture(text: str) -> tuple[tuple[SourceSpec, float], ...]:
    """Reads `source@weight, source@weight`, in the grammar of `DataConfig`.

    A path that has a comma cannot be written; one that has an `@` needs its
    weight written out. Weights count documents: a source of long ones gives more
    than its share of the tokens.

    Raises:
      ConfigError: a source of no known kind, or a weight that is not positive.
    """
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    return tuple(_parse_entry(entry) for entry in entries)


def _parse_entry(entry: str) -> tuple[SourceSpec, float]:
    source, at, weight_text = entry.rpartition("@")
    if not at:
        return SourceSpec.parse(entry), 1.0
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(f"the weight of {entry!r} must be a positive number; got {weight_text!r}")
    return SourceSpec.parse(source), weight


def open_mixture(config: DataConfig, split: Split) -> list[tuple[Source, float]]:
    """Opens the sources that a split reads, with their weights.

    With `holdout`, a source of `train` leaves out its held-out documents, and a
    source of `eval` that `train` also names, by the same path, has only those.

    Raises:
      ConfigError: `data.<split>` is empty or malformed, a source cannot be
        opened, or the holdout leaves one without a document.
    """
    specs = parse_mixture(config.train if split == "train" else config.eval)
    if not specs:
        raise ConfigError(f"data.{split} is empty: name a source, such as 'python-stdlib'")
    shared = {spec for spec, _ in parse_mixture(config.train)} if config.holdout > 0 else set()
    mixture: list[tuple[Source, float]] = []
    for spec, weight in specs:
        source = open_source(spec, config.text_field)
        if spec in shared:
            kept = np.flatnonzero(held_out(len(source), config.holdout) == (split == "eval"))
            if not kept.size:
                raise ConfigError(
                    f"data.holdout={config.holdout} leaves data.{split} none of the"
                    f" {len(source)} documents of {spec.path or spec.kind}"
                )
            source = Subset(source, kept)
        mixture.append((source, weight))
    return mixture


def describe_mixture(
    config: DataConfig, split: Split, mixture: Sequence[tuple[Source, float]]
) -> str:
    """What `open_mixture` has found, in one spelling: `kind:path@weight (n documents), …`."""
    specs = parse_mixture(config.train if split == "train" else config.eval)
    return ", ".join(
        f"{spec.kind}:{spec.path}@{weight:g} ({len(source)} documents)"
        for (spec, weight), (source, _) in zip(specs, mixture)
    )


def held_out(size: int, share: float) -> np.ndarray:
    """Which of `size` documents are held out, bool [size].

    Decided by the index alone: a source that grows keeps its choices, and a
    tokenised copy, which keeps the order, holds out the same documents.
    """
    # The SplitMix64 finaliser: neighbouring indices give independent bits.
    z = (np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53 < share


class Subset:
    """The documents of `source` at `indices` [size]."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self._source[int(self._indices[index])]


class Interleaved:
    """Every document of every source once, sources spread evenly over the whole.

    An evaluation that stops early has thus read the same share of each source.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        sizes = [len(source) for source in sources]
        self._ends = list(itertools.accumulate(sizes))
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        self._order = np.argsort(places, kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Document:
        part, document = locate(self._ends, int(self._order[index]))
        return self._sources[part][document]
