"""Weighted mixtures of sources, and the holdout that separates training from evaluation."""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lucid_jax.config import ConfigError, DataConfig
from lucid_jax.data.documents import BadDocumentError, Concatenation, Selection, Source
from lucid_jax.data.sources import SourceSpec, open_source

Split = Literal["train", "eval"]

# Documents of a source that its checksum covers.
_SAMPLE = 8


class Component(NamedTuple):
    """One source of a mixture, opened."""

    spec: SourceSpec
    weight: float
    source: Source


def parse_mixture(text: str) -> tuple[tuple[SourceSpec, float], ...]:
    """Parses `source@weight, source@weight`, the format that `DataConfig` describes.

    A path cannot contain a comma; a path that contains an `@` needs an explicit weight.

    Raises:
      ConfigError: a source's kind is unknown, or a weight is not positive.
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


def open_mixture(config: DataConfig, split: Split) -> list[Component]:
    """Opens the sources of a split.

    With a holdout, a source of `train` lacks its held-out documents, and a source of `eval`
    with the same path as one of `train` has only those.

    Raises:
      ConfigError: `data.<split>` is empty or malformed, a source cannot be opened, or the
        holdout leaves a source without documents.
    """
    entries = parse_mixture(config.train if split == "train" else config.eval)
    if not entries:
        raise ConfigError(f"data.{split} is empty: name a source, such as 'python-stdlib'")
    divided = {spec for spec, _ in parse_mixture(config.train)} if config.holdout > 0 else set()
    mixture = []
    for spec, weight in entries:
        source = open_source(spec, config.text_field)
        if spec in divided:
            kept = np.flatnonzero(held_out(len(source), config.holdout) == (split == "eval"))
            if not kept.size:
                raise ConfigError(
                    f"data.holdout={config.holdout} leaves data.{split} none of the"
                    f" {len(source)} documents of {spec.name}"
                )
            source = Selection(source, kept)
        mixture.append(Component(spec, weight, source))
    return mixture


def describe_mixture(mixture: Sequence[Component]) -> str:
    """Returns `kind:name@weight (n documents), …`, which does not depend on folders."""
    return ", ".join(
        f"{spec.kind}:{Path(spec.path).name}@{weight:g} ({len(source)} documents)"
        for spec, weight, source in mixture
    )


def without_folders(description: str) -> str:
    """Turns a description of earlier versions, with whole paths, into `describe_mixture`'s."""
    # A path has no comma, and its kind no slash.
    return re.sub(r"(^|, )([^/:,]+):[^,]*/", r"\1\2:", description)


def sample_checksums(mixture: Sequence[Component]) -> list[str]:
    """Returns for each source a checksum of a few documents, the first and the last among them."""
    return [_sample_checksum(source) for _, _, source in mixture]


def _sample_checksum(source: Source) -> str:
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist():
        content = _content(source, index)
        # The length keeps the ends of documents apart.
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()[:16]


def _content(source: Source, index: int) -> bytes:
    try:
        document = source[index]
    except BadDocumentError:
        return b""
    if isinstance(document, np.ndarray):
        return document.tobytes()
    # A NUL does not occur in text.
    return "\0".join([document] if isinstance(document, str) else document).encode()


def held_out(size: int, share: float) -> np.ndarray:
    """Returns which of `size` documents are held out, bool [size].

    The index alone decides, so a source that grows keeps its choices, and a tokenised copy,
    which keeps the order, holds out the same documents.
    """
    # The finaliser of SplitMix64 gives independent bits for neighbouring indices.
    z = (np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53 < share


def interleave(sources: Sequence[Source]) -> Source:
    """Returns every document of every source once, each source spread evenly over the whole.

    An evaluation that stops early has then read the same share of each source.
    """
    places = np.concatenate([(np.arange(len(x)) + 0.5) / len(x) for x in sources])
    return Selection(Concatenation(sources), np.argsort(places, kind="stable"))
