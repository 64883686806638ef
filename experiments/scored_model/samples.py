"""Texts to train a model on that retrieves: RULER's samples, and two denser kinds before them.

  python -m experiments.scored_model.samples --output=runs/ruler/train.jsonl --count=100000

An answer is eight bytes of a thousand, too few to learn from. So three kinds take turns: a short
random text that repeats, which nearly every byte of tells; a sample whose other needles are asked
too, again and again; and samples as they are evaluated. They are those of
`lucid_jax.evaluate.tasks` by bytes, under a seed that no evaluation has. A minute or two for
100,000 on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import random
import re
import string
from collections.abc import Sequence

from lucid_jax.data.tokenizer import ByteTokenizer
from lucid_jax.evaluate.tasks import get_task
from lucid_jax.evaluate.tasks.task import Sample

LENGTH = 1024
# Names and lengths of the tasks. Some do not fit in fewer bytes.
SETTINGS = tuple(
    (f"ruler_niah_{name}", length)
    for length, names in (
        (640, ("single_1", "single_2", "multikey_2")),
        (768, ("single_1", "single_2", "multikey_1", "multikey_2")),
        (LENGTH, ("single_1", "single_2", "multikey_1", "multikey_2", "multivalue")),
    )
    for name in names
)
_SEED = 20_000_000
_NEEDLE = re.compile(r"for ([\w-]+) is: (\d+)\.")
_SYMBOLS = string.ascii_lowercase + string.digits
# Of a document without its ends.
_MOST_BYTES = LENGTH - 2


def document(index: int) -> str:
    """Document `index`, of the kind whose turn it is."""
    rng, turn = random.Random(_SEED + index), index // 3
    if index % 3 == 0:
        return repeated(rng)
    if index % 3 == 1:
        return asked_again(_sample("ruler_niah_multikey_2", LENGTH - 256, turn), rng)
    return answered(_sample(*SETTINGS[turn % len(SETTINGS)], turn))


def repeated(rng: random.Random) -> str:
    """A random text of few or many different symbols, over and over."""
    symbols = rng.sample(_SYMBOLS, rng.choice((4, 8, 16, len(_SYMBOLS))))
    text = "".join(rng.choices(symbols, k=rng.randint(8, 64)))
    return (text * (_MOST_BYTES // len(text) + 1))[:_MOST_BYTES]


def answered(sample: Sample) -> str:
    """Prompt and answers."""
    space = "" if sample.prompt.endswith(" ") else " "
    return f"{sample.prompt}{space}{' '.join(sample.answers)}."


def asked_again(sample: Sample, rng: random.Random) -> str:
    """Prompt and answer, then all needles of the prompt, and so on in another order."""
    text, needles = answered(sample), _NEEDLE.findall(sample.prompt)
    while True:
        for key, number in rng.sample(needles, len(needles)):
            more = (
                f" The special magic number for {key} mentioned in the provided text is {number}."
            )
            if len(text) + len(more) > _MOST_BYTES:
                return text
            text += more


def _sample(name: str, length: int, index: int) -> Sample:
    return get_task(name).sample(ByteTokenizer(), length, _SEED, index)


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
