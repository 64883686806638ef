"""Documents tokenised beforehand: ArrayRecord files beside a metadata file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import grain
import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.files import find_files

ENDING = ".array_record"
_METADATA_FILE = "metadata.json"


@dataclasses.dataclass(frozen=True)
class TokensMetadata:
    """What `metadata.json` says of the ArrayRecord files in its folder."""

    # "uint16" or "uint32"; a record is the little-endian tokens of one document.
    dtype: str
    vocab_size: int
    documents: int
    tokens: int
    # The tokenizer's file name, for people, and its fingerprint, for checks.
    tokenizer: str
    tokenizer_fingerprint: str

    def write(self, folder: Path) -> None:
        """Writes the file into `folder`."""
        (folder / _METADATA_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def beside(cls, path: str) -> TokensMetadata:
        """Reads the file of the folder that holds the ArrayRecord files of `path`.

        Raises:
          ConfigError: no ArrayRecord files, no metadata beside them, or metadata
            that `write` has not written.
        """
        metadata = find_files(path, ENDING)[0].with_name(_METADATA_FILE)
        try:
            return cls(**json.loads(metadata.read_text()))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{metadata} is missing: ArrayRecord files must come from lucid_jax.data.tokenize"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{metadata} was not written by lucid_jax.data.tokenize") from error


class ArrayRecordSource:
    """One document a record: its tokens, int32 [T], special tokens included."""

    def __init__(self, path: str):
        """Opens a folder, file or glob of ArrayRecord files.

        Raises:
          ConfigError: no files, no metadata beside them, or a folder that lacks
            some of its records.
        """
        files = find_files(path, ENDING)
        self.metadata = TokensMetadata.beside(path)
        self._dtype = np.dtype(self.metadata.dtype).newbyteorder("<")
        self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        if Path(path).is_dir() and len(self) != self.metadata.documents:
            raise ConfigError(
                f"{path} holds {len(self)} documents, but its {_METADATA_FILE} says"
                f" {self.metadata.documents}: files are missing"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)
