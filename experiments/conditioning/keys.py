"""Keys to measure: random ones, and those of trained models."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.activations import Trained, activations
from lucid_jax.data.tokenizer import encode_document, load_tokenizer

WIDTH = 64
COSINES = (0.0, 0.3, 0.7, 0.9)


def random_keys(cosine: float, length: int, seeds: int) -> np.ndarray:
    """Normal keys that share a direction, float64 `[1,S,K,D]`, a head a seed.

    Those of a shorter length are the first of a longer one.

    Args:
      cosine: The mean cosine of two keys.
      length: S.
      seeds: How many (K).
    """
    heads = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=WIDTH)
        common *= np.sqrt(WIDTH) / np.linalg.norm(common)
        own = rng.normal(size=(length, WIDTH))
        heads.append(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own)
    return np.stack(heads, 1)[None]


def random_sets(length: int, seeds: int) -> dict[str, np.ndarray]:
    """Keys of every cosine, by name."""
    return {f"mean cosine {c:g}": random_keys(c, length, seeds) for c in COSINES}


def trained_sets(
    workdirs: Sequence[pathlib.Path], text: pathlib.Path, lengths: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Keys `[1,S,K,D]` of every layer of trained models on the start of a text, by length.

    Args:
      workdirs: Of runs; each by the name of its directory.
      text: A file, one document.
      lengths: S; beyond the length trained at, positions are new to the model.

    Raises:
      ValueError: the text has fewer tokens.
      CheckpointError: a run without a sound checkpoint.
    """
    sets: dict[int, dict[str, np.ndarray]] = {length: {} for length in lengths}
    for workdir in workdirs:
        model = Trained.load(workdir)
        tokenizer = load_tokenizer(model.config.data.tokenizer)
        tokens = encode_document(tokenizer, text.read_text(errors="replace"))
        if len(tokens) < max(lengths):
            raise ValueError(f"{text} has {len(tokens)} tokens, fewer than {max(lengths)}")
        # A longer row changes nothing before it, so one pass serves all lengths.
        rows = jnp.asarray(tokens[: max(lengths)])[None]
        k = jax.jit(activations, static_argnums=0)(model.model, model.params, rows).k
        for length in lengths:
            sets[length] |= _layers(workdir.name, np.asarray(k[:, :, :length], np.float64))
    return sets


def _layers(name: str, k: np.ndarray) -> Mapping[str, np.ndarray]:
    return {f"{name}, layer {i + 1}": layer for i, layer in enumerate(k)}
