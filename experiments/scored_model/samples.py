"""Samples of RULER's retrieval tasks with their answers, as documents to train on.

  python -m experiments.scored_model.samples --output=runs/ruler/train.jsonl --count=100000

Prompts are those of `lucid_jax.evaluate.tasks` by bytes, under a seed that no evaluation has;
tasks and lengths take turns. A minute or two for 100,000 on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
from collections.abc import Sequence

from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.evaluate.tasks import get_task

# Those of several needles do not fit in 768 bytes.
SETTINGS = tuple(
    (f"ruler_niah_{name}", length)
    for length, names in (
        (768, ("single_1", "single_2", "multikey_2")),
        (1024, ("single_1", "single_2", "multikey_1", "multikey_2", "multivalue")),
    )
    for name in names
)
_SEED = 20_000_000


def document(index: int) -> str:
    """Prompt and answers of sample `index`, of the task and length whose turn it is."""
    name, length = SETTINGS[index % len(SETTINGS)]
    sample = get_task(name).sample(ByteTokenizer(), length, _SEED, index)
    space = "" if sample.prompt.endswith(" ") else " "
    return f"{sample.prompt}{space}{' '.join(sample.answers)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # Forked processes inherit the threads of jax, which some lists of words load.
    with (
        multiprocessing.get_context("spawn").Pool() as pool,
        options.output.open("w") as lines,
    ):
        for text in pool.imap(document, range(options.count), chunksize=256):
            lines.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
