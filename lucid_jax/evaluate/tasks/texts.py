"""The texts of haystacks: files of the user, or generated prose."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Self, cast

from lucid_jax.config import ConfigError
from lucid_jax.data.files import find_files
from lucid_jax.data.sources import STDLIB, SourceSpec, open_source
from lucid_jax.evaluate.tasks.prose import SENTENCES, sentences

# The space between two sentences: after a stop and perhaps a closing quote, before a capital or
# digit, but not after the usual titles.
_BREAK = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    r"(?=[\"'“‘(]?[A-Z0-9])"
)
# Ends the name of a task on generated prose.
PROSE = "[prose]"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Paths of the texts that benchmarks take from elsewhere; "" for those the user lacks.

    `essays` and `books` are single sources in the syntax of `data.train`: text files, folders,
    JSONL or Parquet with a column `text`. RULER's PaulGrahamEssays.json is
    `jsonl:PaulGrahamEssays.json`.

    Attributes:
      essays: RULER's haystacks: the first words of all documents, one after the other.
      squad: The JSON file of SQuAD 2.0's development set.
      hotpotqa: The JSON file of HotpotQA's development set in the distractor setting.
      books: BABILong's background, with one book a document (PG19, test).
      longbench: A folder with LongBench's files, one for each task.
      scrolls: A folder with SCROLLS' files, one for each task.
    """

    essays: str = ""
    squad: str = ""
    hotpotqa: str = ""
    books: str = ""
    longbench: str = ""
    scrolls: str = ""

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Self:
        """Reads `name=path` entries, as in `essays=essays/`; raises ConfigError for others."""
        names = [field.name for field in dataclasses.fields(cls)]
        paths = {}
        for entry in entries:
            name, _, path = entry.partition("=")
            if name not in names or not path:
                raise ConfigError(
                    f"a source must be NAME=PATH, NAME one of {', '.join(names)}; got {entry!r}"
                )
            paths[name] = path
        return cls(**paths)

    def fingerprint(self, name: str) -> str:
        """Returns what identifies a source on any machine: a hash of its files.

        An empty path and `python-stdlib` are returned as they are, and "" for the name "".
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
    """Splits `text` into sentences and collapses white space."""
    return _BREAK.split(" ".join(text.split()))


@functools.lru_cache(maxsize=2)
def essay_words(path: str) -> tuple[str, ...]:
    """Returns the words of all documents at `path`, or of generated prose if it is "".

    Raises:
      ConfigError: there is nothing at `path`, or only white space.
    """
    documents = open_documents(path)
    words = tuple(word for i in range(len(documents)) for word in documents[i].split())
    if not words:
        raise ConfigError(f"no text in {path!r}")
    return words


@functools.lru_cache(maxsize=2)
def open_documents(path: str) -> Sequence[str]:
    """Returns the documents at `path`, or generated prose as one document if it is "".

    Raises:
      ConfigError: there is nothing at `path`, or it holds tokens instead of text.
    """
    if not path:
        return [" ".join(sentences(SENTENCES))]
    spec = SourceSpec.parse(path)
    if spec.kind == "arrayrecord":
        raise ConfigError(f"{path!r} holds tokens, but a haystack needs text")
    documents = open_source(spec, "text")
    if not isinstance(documents[0], str):
        raise ConfigError(f"{path!r} holds prompts and completions, but a haystack needs text")
    return cast("Sequence[str]", documents)
