"""Random-access sources of documents.

`source[i]` is document `i` of `len(source)`: a text, or the tokens of a tokenised document.
Every source is picklable and can be read from several threads.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.arrayrecord import ArrayRecordSource
from lucid_jax.data.files import find_files

# A text, or tokens int32 [T] with special tokens included.
Document = str | np.ndarray

STDLIB = "python-stdlib"
_KINDS_WITH_PATH = ("text", "jsonl", "parquet", "arrayrecord")
_KIND_OF_ENDING = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".array_record": "arrayrecord",
}
# Bytes of a file that are searched for line ends at a time.
_READ_BYTES = 1 << 24


class Source(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


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
        """Parses `kind:path`, a path whose ending tells the kind, or `python-stdlib`.

        A path that ends in a slash is a folder of text.

        Raises:
          ConfigError: the kind is unknown, or the path does not tell it.
        """
        if text == STDLIB:
            return cls(STDLIB)
        kind, colon, path = text.partition(":")
        if not colon:
            folder = "text" if text.endswith("/") else ""
            kind, path = _KIND_OF_ENDING.get(Path(text).suffix, folder), text
        if kind not in _KINDS_WITH_PATH or not path:
            raise ConfigError(
                f"source {text!r} has no known kind: write kind:path with a kind of"
                f" {', '.join(_KINDS_WITH_PATH)}; a path that ends in"
                f" {', '.join(_KIND_OF_ENDING)} or, for a folder of text, in /; or {STDLIB}"
            )
        return cls(kind, os.path.abspath(os.path.expanduser(path)))


def open_source(spec: SourceSpec, text_field: str) -> Source:
    """Opens a source; jsonl and parquet sources have the text in key or column `text_field`.

    Raises:
      ConfigError: nothing is at the path, there are no documents, a file is not of the kind,
        or it has no such key or column of strings.
    """
    source: Source
    match spec.kind:
        case "text":
            source = TextSource(find_files(spec.path))
        case "jsonl":
            files = find_files(spec.path, ".jsonl")
            source = Concatenation([_JsonlFile(file, text_field) for file in files])
        case "parquet":
            files = find_files(spec.path, ".parquet")
            groups = [_open_row_groups(file, text_field) for file in files]
            source = Concatenation(list(itertools.chain(*groups)))
        case "arrayrecord":
            source = ArrayRecordSource(spec.path)
        case _:
            assert spec.kind == STDLIB, spec
            source = TextSource(_stdlib_files())
    if len(source) == 0:
        raise ConfigError(f"{spec.kind} source {spec.path!r} has no documents")
    if spec.kind == "jsonl":
        source[0]  # Raises if the key is missing.
    return source


class TextSource:
    """One document a file, decoded as UTF-8 with invalid bytes replaced by U+FFFD."""

    def __init__(self, files: Sequence[Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return self._files[index].read_bytes().decode(errors="replace")


class Selection:
    """The documents of `source` at `indices` [size], in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self._source[int(self._indices[index])]


class Concatenation:
    """The documents of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        part = bisect.bisect_right(self._ends, index)
        return self._sources[part][index - (self._ends[part - 1] if part else 0)]


class _JsonlFile:
    """One document a line: the string under `text_field` of a JSON object."""

    def __init__(self, file: Path, text_field: str):
        self._file = file
        self._text_field = text_field
        self._lines = _find_lines(file, file.stat().st_mtime_ns)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        start, end = self._lines[index]
        # The file is opened for each read, because threads would share its position.
        with self._file.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            return _parse_line(content, self._text_field)
        except ConfigError as error:
            number = _line_number(self._file, start)
            raise ConfigError(f"{self._file}, line {number}: {error}") from error


# The modification time is an argument so that a changed file misses the cache.
@functools.lru_cache(maxsize=1024)
def _find_lines(file: Path, mtime_ns: int) -> np.ndarray:
    """Returns the start and end of every line that is not blank, int64 [lines, 2]."""
    del mtime_ns
    breaks = []
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            breaks.append(size + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            size += len(chunk)
    starts = np.concatenate([[0], *(b + 1 for b in breaks)]).astype(np.int64)
    ends = np.append(starts[1:] - 1, size)
    lines = np.stack([starts, ends], axis=1)[ends > starts]
    if not len(lines):
        return lines
    content = np.memmap(file, np.uint8, "r")
    # Objects begin with a brace, so that few lines are looked at.
    filled = np.ones(len(lines), bool)
    for i in np.flatnonzero(np.isin(content[lines[:, 0]], np.frombuffer(b" \t\r", np.uint8))):
        filled[i] = bool(content[slice(*lines[i])].tobytes().strip())
    return lines[filled]


def _parse_line(line: bytes, key: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError("not a line of JSON") from error
    if not isinstance(values, dict):
        raise ConfigError("not a JSON object")
    if key not in values:
        raise ConfigError(_no_column(key, values))
    text = "" if values[key] is None else values[key]
    if not isinstance(text, str):
        raise ConfigError(f"the text must be a string; got {type(text).__name__}")
    # JSON can spell lone surrogates, which no tokenizer accepts.
    return text.encode(errors="replace").decode()


def _line_number(file: Path, start: int) -> int:
    """Returns the number, from 1, of the line that begins at byte `start`."""
    number = 1
    with file.open("rb") as stream:
        while start > 0:
            chunk = stream.read(min(start, _READ_BYTES))
            number += chunk.count(b"\n")
            start -= len(chunk)
    return number


@dataclasses.dataclass(frozen=True)
class _ParquetRowGroup:
    """One document a row: the string in `column`.

    Reading a row decodes its whole group; the last few groups are cached. Shuffled reading of
    more groups than that is slow, so tokenise such data beforehand.
    """

    file: Path
    group: int
    column: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        return _read_column(self.file, self.group, self.column)[index].as_py() or ""


def _open_row_groups(file: Path, column: str) -> list[_ParquetRowGroup]:
    from pyarrow import types

    with _open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if column not in schema.names:
        raise ConfigError(f"{file}: {_no_column(column, schema.names)}")
    kind = schema.field(column).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(test(value_kind) for test in is_text):
        raise ConfigError(f"{file}: column {column!r} must hold strings; it holds {kind}")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [_ParquetRowGroup(file, i, column, size) for i, size in enumerate(sizes)]


@functools.lru_cache(maxsize=8)
def _read_column(file: Path, group: int, column: str) -> Any:
    """Returns one column of one row group, a `pyarrow.ChunkedArray` [rows]."""
    with _open_parquet(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(column)


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    """Yields a `pyarrow.parquet.ParquetFile`; turns errors while it is open into ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read as Parquet: {reason}") from error


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r} (data.text_field); there are {', '.join(columns)}"


def _stdlib_files() -> list[Path]:
    """Returns the modules of the standard library, without tests and installed packages."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}
    return find_files(sysconfig.get_path("stdlib"), ".py", skip)
