"""Training texts for a model that retrieves: RULER's samples, and two denser kinds.

  python -m experiments.scored_model.samples --output=runs/ruler/train.jsonl --count=100000

An answer is eight bytes of a thousand, too few to learn from. So three kinds take turns: a short
random text that repeats; a sample whose other needles are asked too, again and again; and samples
as they are evaluated, by bytes, with a seed that no evaluation uses.
"""

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
# Bytes of a document without BOS and EOS.
_MOST_BYTES = LENGTH - 2


def document(index: int) -> str:
    """Returns a document, whose kind depends on its index."""
    rng, turn = random.Random(_SEED + index), index // 3
    if index % 3 == 0:
        return repeat(rng)
    if index % 3 == 1:
        return ask_again(_sample("ruler_niah_multikey_2", LENGTH - 256, turn), rng)
    return answer(_sample(*SETTINGS[turn % len(SETTINGS)], turn))


def repeat(rng: random.Random) -> str:
    """Repeats a random text of few or many different symbols."""
    symbols = rng.sample(_SYMBOLS, rng.choice((4, 8, 16, len(_SYMBOLS))))
    text = "".join(rng.choices(symbols, k=rng.randint(8, 64)))
    return (text * (_MOST_BYTES // len(text) + 1))[:_MOST_BYTES]


def answer(sample: Sample) -> str:
    """Returns a sample's prompt and answers."""
    space = "" if sample.prompt.endswith(" ") else " "
    return f"{sample.prompt}{space}{' '.join(sample.answers)}."


def ask_again(sample: Sample, rng: random.Random) -> str:
    """Returns prompt and answer, then all needles of the prompt in one order after another."""
    text, needles = answer(sample), _NEEDLE.findall(sample.prompt)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    flags = parser.parse_args(argv)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    # Forked processes would inherit jax's threads, which some word lists load.
    with (
        multiprocessing.get_context("spawn").Pool() as pool,
        flags.output.open("w") as lines,
    ):
        for text in pool.imap(document, range(flags.count), chunksize=256):
            lines.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
