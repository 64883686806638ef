"""Where the text of a haystack comes from: files of the user, or prose of our own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from typing import cast

from lucid_jax.config import ConfigError
from lucid_jax.data.files import find_files
from lucid_jax.data.sources import STDLIB, SourceSpec, open_source
from lucid_jax.evaluate.tasks.prose import SENTENCES, sentences

# Ends a sentence: a stop, perhaps a closing quote, then space before a capital; but not
# after the usual titles.
_BREAK = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    r"(?=[\"'“‘(]?[A-Z0-9])"
)
PROSE = "[prose]"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Paths of what benchmarks take from elsewhere; "" where the user has none.

    `essays` and `books` are written as `data.train` is, one source each: text files,
    folders, JSONL or Parquet with a column `text`. RULER's PaulGrahamEssays.json is
    `jsonl:PaulGrahamEssays.json`.
    """

    # RULER's haystacks: the first words of all documents in a row.
    essays: str = ""
    # The JSON files of SQuAD 2.0's and HotpotQA's (distractor) development sets.
    squad: str = ""
    hotpotqa: str = ""
    # BABILong's background: one book a document (PG19, test).
    books: str = ""
    # Folders that hold the benchmark's files, one for each of its tasks.
    longbench: str = ""
    scrolls: str = ""

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Sources:
        """Reads `name=path` entries, as in `essays=essays/`.

        Raises:
          ConfigError: an entry of another form, or of a name that is no field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        paths = {}
        for entry in entries:
            name, _, path = entry.partition("=")
            if name not in names or not path:
                raise ConfigError(
                    f"a source is NAME=PATH with a name of {', '.join(names)}; got {entry!r}"
                )
            paths[name] = path
        return cls(**paths)

    def fingerprint(self, name: str) -> str:
        """Identifies across machines what is at the path of a field: its files' content.

        It is the path itself where that is none, or `python-stdlib`.

        Args:
          name: of the field; "" gives "".
        """
        path = getattr(self, name) if name else ""
        if path in ("", STDLIB):
            return path
        if name in ("essays", "books"):
            path = SourceSpec.parse(path).path
        return _hash_files(os.path.abspath(os.path.expanduser(path)))


@functools.lru_cache(maxsize=8)
def _hash_files(path: str) -> str:
    digest = hashlib.sha256()
    for file in find_files(path):
        digest.update(f"{os.path.relpath(file, path)} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, in a row, with white space collapsed."""
    return _BREAK.split(" ".join(text.split()))


@functools.lru_cache(maxsize=2)
def essay_words(path: str) -> tuple[str, ...]:
    """The words of every document at `path`, in a row; of our prose if it is "".

    Raises:
      ConfigError: nothing there, or nothing but white space.
    """
    documents = open_books(path)
    words = tuple(word for i in range(len(documents)) for word in documents[i].split())
    if not words:
        raise ConfigError(f"no text in {path!r}")
    return words


@functools.lru_cache(maxsize=2)
def open_books(path: str) -> Sequence[str]:
    """The documents at `path`; our prose as one document if it is "".

    Raises:
      ConfigError: nothing there, or tokens instead of text.
    """
    if not path:
        return [" ".join(sentences(SENTENCES))]
    spec = SourceSpec.parse(path)
    if spec.kind == "arrayrecord":
        raise ConfigError(f"{path!r} holds tokens; a haystack takes text")
    return cast("Sequence[str]", open_source(spec, "text"))
