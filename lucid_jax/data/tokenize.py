"""Tokenises a source into ArrayRecord files, so that training does not have to.

    python -m lucid_jax.data.tokenize --input=jsonl:corpus/ --tokenizer=tokenizer.json \\
        --output=corpus-tokens --shards=16

Then train with data.train=arrayrecord:corpus-tokens and the same data.tokenizer. Documents
keep their order, so data.holdout keeps out the same ones as in the original source.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lucid_jax.config import ConfigError
from lucid_jax.data.arrayrecord import ENDING, TokensMetadata
from lucid_jax.data.sources import SourceSpec, open_source
from lucid_jax.data.tokenizer import encode_document, fingerprint, load_tokenizer
from lucid_jax.runtime.progress import Progress
from lucid_jax.runtime.workdir import new_directory


def tokenize(
    source_spec: SourceSpec, tokenizer_spec: str, output: Path, *, shards: int, text_field: str
) -> TokensMetadata:
    """Writes the tokens of a source to `output`, which appears once it is complete.

    Each of the `shards` files holds consecutive documents. Returns the content of the metadata
    file.

    Raises:
      ConfigError: `output` exists, or the source is tokenised already or cannot be read.
    """
    if source_spec.kind == "arrayrecord":
        raise ConfigError(f"{source_spec.path} is already tokenised")
    tokenizer = load_tokenizer(tokenizer_spec)
    source = open_source(source_spec, text_field)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    progress = Progress(
        "tokenising", len(source), "documents", functools.partial(print, file=sys.stderr)
    )
    total_tokens = 0
    with new_directory(output) as unfinished:
        bounds = [len(source) * shard // shards for shard in range(shards + 1)]
        for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
            file = unfinished / f"tokens-{shard:05d}-of-{shards:05d}{ENDING}"
            # Groups of one, because reading a record decompresses its whole group.
            with contextlib.closing(ArrayRecordWriter(str(file), "group_size:1")) as writer:
                for index in range(start, stop):
                    tokens = encode_document(tokenizer, source[index])
                    writer.write(tokens.astype(dtype).tobytes())
                    total_tokens += len(tokens)
                    progress.add(note=f", {total_tokens:,} tokens")
        metadata = TokensMetadata(
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            documents=len(source),
            tokens=total_tokens,
            tokenizer=Path(tokenizer_spec).name,
            tokenizer_fingerprint=fingerprint(tokenizer_spec),
        )
        metadata.write(unfinished)
    return metadata


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors exit with one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m lucid_jax.data.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        help="a source as in data.train, such as text:books/ or corpus.jsonl",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="as data.tokenizer: 'bytes', a tokenizers .json file or a SentencePiece model",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="the folder to create; it must not exist"
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=1,
        help="number of files to write, for instance one a gigabyte (default: 1)",
    )
    parser.add_argument(
        "--text_field",
        default="text",
        help="key or column that holds the text in jsonl and parquet sources (default: text)",
    )
    arguments = parser.parse_args(argv)
    if arguments.shards < 1:
        parser.error(f"--shards must be positive; got {arguments.shards}")
    try:
        tokenize(
            SourceSpec.parse(arguments.input),
            arguments.tokenizer,
            arguments.output,
            shards=arguments.shards,
            text_field=arguments.text_field,
        )
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"data.train=arrayrecord:{arguments.output}")


if __name__ == "__main__":
    main()
