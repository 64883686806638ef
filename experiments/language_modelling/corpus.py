"""English technical text from Debian's documentation packages, in pieces of two lengths.

  python -m experiments.language_modelling.corpus --output=runs/debian

Downloads the packages with apt without installing them (`--packages=DIR` takes packages unpacked
there instead), reads their plain text, trains a byte-level BPE tokenizer, and writes tokens for
`data.train=arrayrecord:runs/debian/train-2048`. The files of one folder, one after another, are a
document, which is cut into pieces of the longer length; one piece in 32 is held out. The shorter
pieces are the longer ones cut again, so that no text is both trained on and held out. Takes three
minutes on two cores.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import pathlib
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence

import tokenizers

from lucid_jax.data.sources import SourceSpec
from lucid_jax.data.tokenize import tokenize

PACKAGES = (
    "linux-doc-6.1", "python3.11-doc", "perl-doc", "llvm-15-doc", "ghc-doc", "sagemath-doc",
    "python-pandas-doc", "git-doc", "nodejs-doc", "cmake-doc", "python-sympy-doc",
    "debian-policy", "sphinx-doc",
)  # fmt: skip
_ENDINGS = (".rst", ".rst.txt", ".txt", ".pod", ".md")
_VOCABULARY = 8192
LENGTHS = (2048, 16384)
_HELD_OUT = 32


def fetch(packages: Sequence[str], directory: pathlib.Path) -> dict[str, str]:
    """Downloads packages and unpacks each below `directory`, in a folder of its name.

    Returns:
      The version of each package.
    """
    subprocess.run(["apt-get", "download", *packages], cwd=directory, check=True)
    versions = {}
    for archive in directory.glob("*.deb"):
        name, version, _ = archive.name.split("_")
        versions[name] = urllib.parse.unquote(version)
        subprocess.run(["dpkg-deb", "-x", archive, directory / name], check=True)
        archive.unlink()
    return versions


def documents(directory: pathlib.Path) -> Iterator[str]:
    """Yields the text of every folder below `directory`, without files that were seen before."""
    seen: set[bytes] = set()
    folders = sorted({path.parent for path in directory.rglob("*") if _is_text(path)})
    for folder in folders:
        texts = []
        for path in sorted(filter(_is_text, folder.iterdir())):
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            text = content.decode(errors="replace")
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                texts.append(text)
        if texts:
            yield "\n\n".join(texts)


def _is_text(path: pathlib.Path) -> bool:
    return path.name.removesuffix(".gz").endswith(_ENDINGS) and path.is_file()


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer that opens documents with <s>, closes them with </s>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut(tokenizer: tokenizers.Tokenizer, text: str, length: int) -> list[str]:
    """Cuts a text into pieces of `length` tokens, <s> and </s> included; the last is shorter."""
    offsets = tokenizer.encode(text).offsets
    step = length - 2
    starts = [0, *(offsets[i][0] for i in range(step, len(offsets), step)), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(starts)]


def write(texts: Sequence[str], output: pathlib.Path, vocabulary: int, lengths: Sequence[int]):
    """Writes the tokenizer, and for each length the tokens of train and held-out pieces."""
    output.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, vocabulary)
    path = output / "tokenizer.json"
    tokenizer.save(str(path))
    longest = max(lengths)
    pieces = [piece for text in texts for piece in cut(tokenizer, text, longest)]
    splits = {
        "train": [x for i, x in enumerate(pieces) if i % _HELD_OUT],
        "heldout": pieces[::_HELD_OUT],
    }
    for (split, whole), length in itertools.product(splits.items(), lengths):
        again = [p for x in whole for p in cut(tokenizer, x, length)] if length < longest else whole
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as lines:
            for text in filter(None, again):
                lines.write(json.dumps({"text": text}) + "\n")
            lines.flush()
            source = SourceSpec.parse(lines.name)
            tokenize(source, str(path), output / f"{split}-{length}", shards=1, text_field="text")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--packages", type=pathlib.Path)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        if not flags.packages:
            fetch(PACKAGES, pathlib.Path(directory))
        texts = list(documents(flags.packages or pathlib.Path(directory)))
    print(f"{sum(map(len, texts)):,} characters in {len(texts):,} documents", flush=True)
    write(texts, flags.output, _VOCABULARY, LENGTHS)


if __name__ == "__main__":
    main()
