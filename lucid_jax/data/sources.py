"""The sources that `data.train` and `data.eval` name."""

import dataclasses
import itertools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.arrayrecord import ENDING, METADATA_FILE, ArrayRecordSource
from lucid_jax.data.documents import BadDocumentError, Concatenation, Source
from lucid_jax.data.files import find_files, read_file, without_compression
from lucid_jax.data.jsonl import JsonlFile
from lucid_jax.data.parquet import open_row_groups

STDLIB = "python-stdlib"
_KINDS_WITH_PATH = ("text", "jsonl", "parquet", "arrayrecord")
_KIND_OF_ENDING = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ENDING: "arrayrecord",
}
# The endings of the files that a folder of a kind is searched for; text may have any.
_FOLDER_ENDINGS: dict[str, str | tuple[str, ...]] = {
    "text": "",
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": ".parquet",
    "arrayrecord": ENDING,
}
# Files of a source whose first document is read when it is opened, at most.
_TRIED_FILES = 100


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """The kind of a source, and its absolute path or glob pattern."""

    kind: str
    path: str = ""

    @property
    def name(self) -> str:
        """The path, or the kind of a source that has none."""
        return self.path or self.kind

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `kind:path`, a path whose ending tells the kind, a folder, or `python-stdlib`.

        The files of a folder tell its kind: text, unless their endings say otherwise.

        Raises:
          ConfigError: the kind is unknown, the path does not tell it, or a folder's files are of
            several kinds.
        """
        if text == STDLIB:
            return cls(STDLIB)
        kind, colon, path = text.partition(":")
        if not colon:
            kind, path = _kind_of_name(text) or _kind_of_folder(text), text
        if kind not in _KINDS_WITH_PATH or not path:
            raise ConfigError(
                f"source {text!r} has no known kind: write kind:path with a kind of"
                f" {', '.join(_KINDS_WITH_PATH)}; a folder; a path that ends in"
                f" {', '.join(_KIND_OF_ENDING)} (text and jsonl also with .gz or .zst); or"
                f" {STDLIB}"
            )
        return cls(kind, os.path.abspath(os.path.expanduser(path)))

    def files(self) -> list[Path]:
        """Returns the files of the source, as `find_files`."""
        if self.kind == STDLIB:
            # The modules of the standard library, without tests and installed packages.
            skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}
            return find_files(sysconfig.get_path("stdlib"), ".py", skip)
        return find_files(self.path, _FOLDER_ENDINGS[self.kind])


def _kind_of_name(name: str) -> str:
    """Returns the kind that a file's ending tells, or ""."""
    plain = without_compression(name)
    kind = _KIND_OF_ENDING.get(Path(plain).suffix, "")
    return kind if plain == name or kind in ("text", "jsonl") else ""


def _kind_of_folder(path: str) -> str:
    """Returns the one kind of a folder's files; "text" for a missing one; "" without a folder."""
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        return "text" if path.endswith("/") else ""
    files = find_files(folder)
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(_kind_of_name(file.name) or "text", file)
    if "arrayrecord" in found and all(
        file.name == METADATA_FILE for file in files if not _kind_of_name(file.name)
    ):
        found.pop("text", None)
    if len(found) > 1:
        names = ", ".join(f"{kind} ({os.path.relpath(x, folder)})" for kind, x in found.items())
        raise ConfigError(
            f"the folder {path!r} holds files of several kinds: {names}; to read one of them"
            f" alone, write kind:path, as in {min(found)}:{path}"
        )
    return next(iter(found))


def open_source(spec: SourceSpec, text_field: str) -> Source:
    """Opens a source; jsonl and parquet sources have the text in key or column `text_field`.

    Reads the first document of the files, of a hundred of them if there are more.

    Raises:
      ConfigError: nothing is at the path, there are no documents, a file is not of the kind,
        or it has no such key or column of strings.
    """
    files = spec.files()
    tried = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, _TRIED_FILES).astype(int))]
    source: Source
    match spec.kind:
        case "jsonl":
            lines = {file: JsonlFile(file, text_field) for file in files}
            for documents in (lines[file] for file in tried):
                if len(documents):
                    documents[0]
            source = Concatenation(list(lines.values()))
        case "parquet":
            groups = [open_row_groups(file, text_field) for file in files]
            source = Concatenation(list(itertools.chain(*groups)))
        case "arrayrecord":
            source = ArrayRecordSource(spec.path)
        case _:
            for file in tried:
                _read_text(file)
            source = TextSource(files)
    if len(source) == 0:
        raise ConfigError(f"{spec.kind} source {spec.path!r} has no documents")
    return source


class TextSource:
    """One document a file, in UTF-8."""

    def __init__(self, files: Sequence[Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return _read_text(self._files[index])


def _read_text(file: Path) -> str:
    content = read_file(file)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadDocumentError(
            f"{file} is not text in UTF-8: byte {error.start} is 0x{content[error.start]:02x}"
        ) from error
    if (position := content.find(0)) >= 0:
        raise BadDocumentError(f"{file} is not text but binary: byte {position} is 0")
    return text
