"""Tokenised documents: ArrayRecord files, with a metadata file in each folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import grain
import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.files import find_files

ENDING = ".array_record"
METADATA_FILE = "metadata.json"


@dataclasses.dataclass(frozen=True)
class TokensMetadata:
    """The content of `metadata.json`, which describes the ArrayRecord files of its folder."""

    # "uint16", "uint32" or, for prompts with completions, "int32"; a record holds the
    # little-endian tokens of one document.
    dtype: str
    vocab_size: int
    documents: int
    tokens: int
    # The tokenizer's file name, for error messages, and its fingerprint, for checks.
    tokenizer: str
    tokenizer_fingerprint: str

    def write(self, folder: Path) -> None:
        """Writes the metadata file into `folder`."""
        (folder / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the metadata file of `folder`; raises ConfigError unless `write` wrote it."""
        metadata = folder / METADATA_FILE
        try:
            return cls(**json.loads(metadata.read_text()))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{metadata} is missing: ArrayRecord files must come from lucid_jax.data.tokenize"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{metadata} was not written by lucid_jax.data.tokenize") from error


class ArrayRecordSource:
    """One document a record: its tokens, int32 [T], as `encode_document` returns them."""

    def __init__(self, path: str):
        """Opens ArrayRecord files: one file, all below a folder, or those of a glob.

        Raises:
          ConfigError: there are no files, one is not an ArrayRecord file, a folder lacks its
            metadata or some of its records, or two folders come from different tokenizers.
        """
        files = find_files(path, ENDING)
        folders = {
            folder: TokensMetadata.read(folder) for folder in sorted({f.parent for f in files})
        }
        _check_one_tokenizer(folders)
        for folder, metadata in folders.items():
            _check_complete(folder, metadata)
        # One tokenizer has one vocabulary size, which decides the dtype.
        (dtype,) = {metadata.dtype for metadata in folders.values()}
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._records = _open(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)


def _check_one_tokenizer(folders: Mapping[Path, TokensMetadata]) -> None:
    (folder, metadata), *others = folders.items()
    for other_folder, other in others:
        if other.tokenizer_fingerprint != metadata.tokenizer_fingerprint:
            raise ConfigError(
                f"a source must be the tokens of one tokenizer: {folder} was written with"
                f" {metadata.tokenizer!r} ({metadata.vocab_size} tokens), {other_folder} with"
                f" {other.tokenizer!r} ({other.vocab_size} tokens)"
            )


def _check_complete(folder: Path, metadata: TokensMetadata) -> None:
    """Counts the documents of all files in the folder, even if only some are to be read."""
    documents = len(_open(sorted(folder.glob(f"[!.]*{ENDING}"))))
    if documents != metadata.documents:
        raise ConfigError(
            f"{folder} holds {documents} documents, but its {METADATA_FILE} says"
            f" {metadata.documents}: files are missing"
        )


def _open(files: Sequence[Path]) -> grain.sources.ArrayRecordDataSource:
    try:
        return grain.sources.ArrayRecordDataSource([str(file) for file in files])
    except RuntimeError as error:
        raise ConfigError(
            f"{files[0]} or a file beside it is not an ArrayRecord file: {error}"
        ) from error
