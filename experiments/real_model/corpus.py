"""Long documents of English and code from Debian packages, as tokens of SmolLM2.

  python -m experiments.real_model.corpus --output=runs/long_text \\
      --tokenizer=runs/smollm2/tokenizer.json

Downloads the packages of `packages.py` with apt, without installing them. Writes the texts of each
kind as JSON lines into the folders `train` and `heldout`, and their tokens, which a run reads from
`arrayrecord:runs/long_text/train-tokens` and `arrayrecord:runs/long_text/heldout-tokens`. One
folder in 64 is held out, whole. A paragraph that comes again is left out. `results/corpus.json` has
the versions of the packages and what each of them gave.
"""

import collections
import contextlib
import fileinput
import json
import pathlib
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import reporting
from experiments.language_modelling.corpus import fetch
from experiments.real_model.documents import Texts
from experiments.real_model.packages import PACKAGES
from lucid_jax.config import ConfigError
from lucid_jax.data.sources import SourceSpec, open_source
from lucid_jax.data.tokenize import tokenize

SPLITS = ("train", "heldout")
_HELD_OUT = 64
# Tokens of a document that fills a sequence of the stage.
_LONG = 16_384


def split_of(folder: str) -> str:
    """Returns the split of a folder's documents, which depends on its name alone."""
    return SPLITS[zlib.crc32(folder.encode()) % _HELD_OUT == 0]


def write_texts(packages: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the documents of both splits as JSON lines, with the package of each."""
    texts = Texts()
    for split in SPLITS:
        (output / split).mkdir(parents=True)
    for kind, members in PACKAGES.items():
        with contextlib.ExitStack() as stack:
            files = {
                split: stack.enter_context((output / split / f"{kind}.jsonl").open("w"))
                for split in SPLITS
            }
            for package in members:
                for folder, text in texts.documents(package, packages / package.name):
                    line = {"package": package.name, "text": text}
                    files[split_of(folder)].write(json.dumps(line) + "\n")
                print(package.name, flush=True)


def count(output: pathlib.Path, split: str) -> dict[str, collections.Counter[str]]:
    """Counts the documents, bytes and tokens of each package of a split."""
    tokens = open_source(SourceSpec.parse(f"arrayrecord:{output / split}-tokens"), "text")
    files = _lines(output, split).files()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with fileinput.input(files, encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            document, size = json.loads(line), len(tokens[i])
            counts[document["package"]] += collections.Counter(
                documents=1,
                bytes=len(document["text"].encode()),
                tokens=size,
                long_tokens=size if size >= _LONG else 0,
            )
    return counts


def _lines(output: pathlib.Path, split: str) -> SourceSpec:
    return SourceSpec.parse(f"jsonl:{output / split}")


def records(output: pathlib.Path, versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns a record for each package, and of held-out text its documents and tokens."""
    train, heldout = (count(output, split) for split in SPLITS)
    return [
        {
            "kind": kind,
            "package": package.name,
            "version": versions[package.name],
            **train[package.name],
            "heldout_documents": heldout[package.name]["documents"],
            "heldout_tokens": heldout[package.name]["tokens"],
        }
        for kind, packages in PACKAGES.items()
        for package in packages
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the kinds of text, in millions."""
    names = ("documents", "bytes", "tokens", "long_tokens", "heldout_documents", "heldout_tokens")
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for kinds in ([x["kind"] for x in records], ["all"] * len(records)):
        for record, kind in zip(records, kinds):
            sums[kind] += collections.Counter({name: record.get(name, 0) for name in names})
    rows = [
        (
            kind,
            f"{x['documents']:,}",
            f"{x['bytes'] / 1e6:.1f}",
            f"{x['tokens'] / 1e6:.1f}",
            f"{100 * x['long_tokens'] / x['tokens']:.0f}%",
            f"{x['heldout_documents']:,}",
            f"{x['heldout_tokens'] / 1e6:.2f}",
        )
        for kind, x in sums.items()
    ]
    header = (
        "text", "documents", "MB", "million tokens", f"in documents of {_LONG:,} or more",
        "documents held out", "million tokens held out",
    )  # fmt: skip
    return reporting.markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the corpus."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="as data.tokenizer")
    flags = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as directory:
            names = [package.name for kind in PACKAGES.values() for package in kind]
            versions = fetch(names, pathlib.Path(directory))
            write_texts(pathlib.Path(directory), flags.output)
        for split in SPLITS:
            tokenize(_lines(flags.output, split), flags.tokenizer, flags.output / f"{split}-tokens")
    except (ConfigError, FileExistsError) as error:
        parser.error(str(error))
    found = records(flags.output, versions)
    reporting.write_json(flags.out / "corpus.json", command=flags.command, records=found)
    print(table(found))


if __name__ == "__main__":
    main()
