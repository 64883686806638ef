"""Generated samples of retrieval in long text, as prompts and completions.

  python -m experiments.real_model.retrieval --output=runs/long_text/retrieval.jsonl \\
      --texts=jsonl:runs/long_text/train/documentation.jsonl \\
      --tokenizer=runs/smollm2/tokenizer.json
  python -m lucid_jax.data.tokenize --input=runs/long_text/retrieval.jsonl \\
      --tokenizer=runs/smollm2/tokenizer.json --output=runs/long_text/retrieval-tokens

There are two kinds, both in the background of `--texts`. Needles have RULER's form, with keys and
values that its tasks do not have, and one or several keys are asked. Stories are BABILong's qa1 to
qa5, with a seed that no evaluation uses.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.paper_tables.training_data import completions
from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.evaluate.tasks import get_task
from lucid_jax.evaluate.tasks.ruler_niah import (
    NEEDLE,
    SINGLE_TEMPLATE,
    TEMPLATE,
    enumerate_keys,
    hide_in_essay,
)
from lucid_jax.evaluate.tasks.task import SampleBuilder
from lucid_jax.evaluate.tasks.texts import Sources, open_documents

LENGTHS = (2048, 4096, 8192, 16384)
_STORIES = tuple(f"qa{n}" for n in range(1, 6))
_SEED = 40_000_000
# Between which binary logarithms those of the lengths of needles are uniform.
_LOG2_LENGTHS = (10, 14)
# Needles that an essay of RULER's holds at most, and tokens for one at least.
_MAX_NEEDLES, _TOKENS_PER_NEEDLE = 40, 64
# Keys are two of these words; RULER's are an adjective and a noun of other lists.
FIRST = (
    "annealed", "bevelled", "braided", "brindled", "burnished", "coppiced", "crenellated",
    "dovetailed", "embossed", "fluted", "fretted", "gabled", "gilded", "glazed", "hammered",
    "inlaid", "knurled", "lacquered", "limed", "mitred", "mortised", "pleated", "quilted",
    "riveted", "scalloped", "slatted", "smelted", "soldered", "stippled", "tufted", "varnished",
    "wattled",
)  # fmt: skip
SECOND = (
    "adze", "alembic", "awl", "bellwether", "billhook", "bobbin", "bodkin", "bollard", "capstan",
    "cistern", "dibber", "ewer", "firkin", "flagon", "gantry", "gimlet", "gnomon", "halyard", "hod",
    "kiln", "orrery", "penstock", "pestle", "pinion", "sextant", "sluice", "spindle", "spokeshave",
    "tankard", "thwart", "trivet", "windlass",
)  # fmt: skip
_LETTERS = np.array(list("abcdefghjkmnpqrstuvwxyz23456789"))


def needles(texts: Sequence[str], tokenizer: Tokenizer, index: int) -> dict[str, str]:
    """Returns sample `index`: up to 16 keys of one to three values, of which up to 6 are asked."""
    start = np.random.default_rng([_SEED, index])
    length = int(2 ** start.uniform(*_LOG2_LENGTHS))
    builder = SampleBuilder("needles", tokenizer, length, _SEED, index)
    rng = builder.generator()
    v = int(rng.choice((1, 1, 1, 2, 3)))
    most = min(_MAX_NEEDLES, length // _TOKENS_PER_NEEDLE) // v
    k = int(rng.integers(1, min(16, most) + 1))
    q = int(rng.integers(1, min(k, 6) + 1)) if rng.integers(2) else 1
    kind = str(rng.choice(("codes", "passwords", "words")))
    pairs = _pairs(rng, k if kind != "words" else k + k * v)
    keys, values = pairs[:k], pairs[k:] or _values(rng, kind, k * v)
    needles = [
        NEEDLE.format(kind=kind, key=keys[i // v], value=values[i])
        for i in rng.permutation(k * v).tolist()
    ]
    asked = rng.choice(k, q, replace=False).tolist()
    answers = tuple(value for i in asked for value in values[i * v : (i + 1) * v])
    template = TEMPLATE
    if len(answers) == 1:
        kind, template = kind.removesuffix("s"), SINGLE_TEMPLATE
    words = tuple(texts[int(rng.integers(len(texts)))].split())
    first = int(rng.integers(len(words)))
    essay = words[first:] + words[:first]

    def render(size: int) -> str:
        context = hide_in_essay(needles, essay, size, builder.generator("layout"))
        return template.format(
            context=context, query=enumerate_keys([keys[i] for i in asked]), kind=kind
        )

    room = len(tokenizer.encode(", ".join(answers))) + 2
    sample = builder.fit(render, answers, room, 1, 2 * length)
    return {"prompt": sample.prompt, "completion": f" {', '.join(answers)}"}


def _pairs(rng: np.random.Generator, count: int) -> list[str]:
    numbers = rng.choice(len(FIRST) * len(SECOND), count, replace=False).tolist()
    return [f"{FIRST[n // len(SECOND)]}-{SECOND[n % len(SECOND)]}" for n in numbers]


def _values(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    """Draws codes of nine digits or passwords of eight characters."""
    if kind == "codes":
        return [str(n) for n in rng.integers(10**8, 10**9, count)]
    return ["".join(rng.choice(_LETTERS, 8)) for _ in range(count)]


def stories(texts: str, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, str]]:
    """Yields `count` samples of each task of BABILong at each length."""
    tasks = [get_task(f"babilong_{name}", Sources(books=texts)) for name in _STORIES]
    for length in LENGTHS:
        yield from completions(tasks, tokenizer, length, range(count))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--texts", required=True, help="background, a source as of data.train")
    parser.add_argument("--tokenizer", required=True, help="as data.tokenizer")
    parser.add_argument("--needles", type=int, default=2000, help="samples of needles")
    parser.add_argument(
        "--stories", type=int, default=50, help="samples of each story task at each length"
    )
    flags = parser.parse_args(argv)
    try:
        tokenizer, texts = load_tokenizer(flags.tokenizer), open_documents(flags.texts)
        with flags.output.open("w") as lines:
            for index in range(flags.needles):
                lines.write(json.dumps(needles(texts, tokenizer, index)) + "\n")
            for line in stories(flags.texts, tokenizer, flags.stories):
                lines.write(json.dumps(line) + "\n")
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
