"""Keys to measure: random ones, and those of trained models."""

import argparse
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from experiments import reporting
from experiments.activations import Trained, activations
from lucid_jax.data.tokenizer import encode_document, load_tokenizer

HEAD_DIM = 64
COSINES = (0.0, 0.3, 0.7, 0.9)

# Keys `[1,S,K,D]` by length, then by name.
KeySets = dict[int, dict[str, np.ndarray]]


def add_flags(parser: argparse.ArgumentParser, lengths: Sequence[int]) -> None:
    """Adds the flags that choose the keys."""
    parser.add_argument("--lengths", type=reporting.integers, default=lengths)
    parser.add_argument("--seeds", type=int, default=3, help="of random keys")
    parser.add_argument("--checkpoint", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--text", type=pathlib.Path, help="the text that trained models read")


def from_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> KeySets | None:
    """Returns the keys of the checkpoints that were given, or None if there were none."""
    if bool(flags.checkpoint) != bool(flags.text):
        parser.error("--checkpoint and --text go together")
    return trained_sets(flags.checkpoint, flags.text, flags.lengths) if flags.checkpoint else None


def random_keys(cosine: float, length: int, seeds: int) -> np.ndarray:
    """Returns normal keys of a mean cosine, float64 `[1,S,K,D]`, with one head a seed.

    They share a direction. The keys of a shorter length are the first keys of a longer one.
    """
    heads = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=HEAD_DIM)
        common *= np.sqrt(HEAD_DIM) / np.linalg.norm(common)
        own = rng.normal(size=(length, HEAD_DIM))
        heads.append(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own)
    return np.stack(heads, 1)[None]


def random_sets(lengths: Sequence[int], seeds: int) -> KeySets:
    """Returns random keys of every mean cosine."""
    return {
        length: {f"mean cosine {c:g}": random_keys(c, length, seeds) for c in COSINES}
        for length in lengths
    }


def trained_sets(
    workdirs: Sequence[pathlib.Path], text: pathlib.Path, lengths: Sequence[int]
) -> KeySets:
    """Returns the keys of every layer of trained models on the start of a text file.

    Names of the work directories become the models' names. Beyond the trained length, positions are
    new to a model. Raises ValueError if the text has too few tokens.
    """
    sets: KeySets = {length: {} for length in lengths}
    for workdir in workdirs:
        model = Trained.load(workdir)
        tokenizer = load_tokenizer(model.config.data.tokenizer)
        tokens = encode_document(tokenizer, text.read_text(errors="replace"))
        if len(tokens) < max(lengths):
            raise ValueError(f"{text} has {len(tokens)} tokens, fewer than {max(lengths)}")
        # Keys do not depend on later tokens, so one pass serves all lengths.
        batch = jnp.asarray(tokens[: max(lengths)])[None]
        k = activations(model.model, model.params, batch).k
        for length in lengths:
            for i, layer in enumerate(np.asarray(k[:, :, :length], np.float64)):
                sets[length][f"{workdir.name}, layer {i + 1}"] = layer
    return sets
