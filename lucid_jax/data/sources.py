"""Random-access sources of documents, one class for each kind of file.

`source[i]` is document `i` of `len(source)`: a text, or, from files tokenised
beforehand, its tokens. Every source is picklable and safe to read from threads.
"""

from __future__ import annotations

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
from typing import Any, Protocol

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
# How much of a file is searched for line ends at a time.
_READ_BYTES = 1 << 24


class Source(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture: its kind, and an absolute path or pattern."""

    kind: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """Reads `kind:path`, a path whose ending tells the kind, or `python-stdlib`.

        A path that ends in a slash is a folder of text.

        Raises:
          ConfigError: an unknown kind, or a path that does not tell its kind.
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
                f" {', '.join(_KIND_OF_ENDING)} or, a folder of text, in /; or {STDLIB}"
            )
        return cls(kind, os.path.abspath(os.path.expanduser(path)))


def open_source(spec: SourceSpec, text_field: str) -> Source:
    """Opens a source; `text_field` is the column that jsonl and parquet read.

    Raises:
      ConfigError: nothing at the path, no document there, a file that is not of
        the kind, or no such column of strings.
    """
    source: Source
    match spec.kind:
        case "text":
            source = TextSource(find_files(spec.path))
        case "jsonl":
            source = JsonlSource(find_files(spec.path, ".jsonl"), text_field)
        case "parquet":
            source = ParquetSource(find_files(spec.path, ".parquet"), text_field)
        case "arrayrecord":
            source = ArrayRecordSource(spec.path)
        case _:
            assert spec.kind == STDLIB, spec
            source = TextSource(_stdlib_files())
    if len(source) == 0:
        raise ConfigError(f"{spec.kind} source {spec.path!r} has no documents")
    return source


class TextSource:
    """One document a file, as UTF-8; bytes that are not become U+FFFD."""

    def __init__(self, files: Sequence[Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return self._files[index].read_bytes().decode(errors="replace")


class JsonlSource:
    """One document a line: the string under `text_field` of a JSON object."""

    def __init__(self, files: Sequence[Path], text_field: str):
        self._files = files
        self._text_field = text_field
        self._lines = [_find_lines(file, file.stat().st_mtime_ns) for file in files]
        self._ends = list(itertools.accumulate(len(lines) for lines in self._lines))
        if len(self):
            self[0]  # Raises if the column is not there.

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        part, line = locate(self._ends, index)
        start, end = self._lines[part][line]
        # Opened anew: a shared file position would tie threads together.
        with self._files[part].open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            return _text_of_json(content, self._text_field)
        except ConfigError as error:
            number = _line_number(self._files[part], start)
            raise ConfigError(f"{self._files[part]}, line {number}: {error}") from error


class ParquetSource:
    """One document a row: the string in column `text_field`.

    A row costs the decoding of its row group, of which the last few are kept.
    Shuffled reading of more data than that is slow: tokenise it beforehand.
    """

    def __init__(self, files: Sequence[Path], text_field: str):
        self._text_field = text_field
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for file in files:
            with _open_parquet(file) as parquet:
                _check_text_column(file, parquet.schema_arrow, text_field)
                for group in range(parquet.num_row_groups):
                    self._groups.append((file, group))
                    sizes.append(parquet.metadata.row_group(group).num_rows)
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        part, row = locate(self._ends, index)
        return _read_row_group(*self._groups[part], self._text_field)[row].as_py() or ""


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Which part holds item `index` of several parts in a row, and where in it.

    Args:
      ends: running totals of the parts' lengths.
      index: below `ends[-1]`, or IndexError is raised by the caller's look-up.
    """
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


# The modification time is there to miss the cache once a file has changed.
@functools.lru_cache(maxsize=1024)
def _find_lines(file: Path, mtime_ns: int) -> np.ndarray:
    """Start and end of every line that is not blank, int64 [lines, 2]."""
    del mtime_ns
    breaks = []
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            breaks.append(size + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            size += len(chunk)
    starts = np.concatenate([[0], *(b + 1 for b in breaks)]).astype(np.int64)
    ends = np.append(starts[1:] - 1, size)
    # The shortest JSON object, {}, has two bytes; "\r" alone is a blank line too.
    filled = ends - starts >= 2
    return np.stack([starts[filled], ends[filled]], axis=1)


@functools.lru_cache(maxsize=8)
def _read_row_group(file: Path, group: int, column: str) -> Any:
    """One column of one row group: a `pyarrow.ChunkedArray` [rows]."""
    with _open_parquet(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(column)


@contextlib.contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong while it is open is a ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read as Parquet: {reason}") from error


def _check_text_column(file: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise ConfigError(f"{file}: {_no_column(column, schema.names)}")
    kind = schema.field(column).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(
        f(value_kind) for f in (types.is_string, types.is_large_string, types.is_string_view)
    ):
        raise ConfigError(f"{file}: column {column!r} must hold strings; it holds {kind}")


def _text_of_json(line: bytes, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError("not a line of JSON") from error
    if not isinstance(row, dict):
        raise ConfigError("not a JSON object")
    if column not in row:
        raise ConfigError(_no_column(column, row))
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise ConfigError(f"the text must be a string; got {type(text).__name__}")
    # JSON can spell lone surrogates, which no tokenizer takes.
    return text.encode(errors="replace").decode()


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r} (data.text_field); there are {', '.join(columns)}"


def _line_number(file: Path, start: int) -> int:
    """The number, from 1, of the line that begins at byte `start`."""
    number = 1
    with file.open("rb") as stream:
        while start > 0:
            chunk = stream.read(min(start, _READ_BYTES))
            number += chunk.count(b"\n")
            start -= len(chunk)
    return number


def _stdlib_files() -> list[Path]:
    """The standard library's own modules: no tests, no installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib"}
    return [
        file
        for file in find_files(str(root), ".py")
        if skipped.isdisjoint(file.relative_to(root).parts)
    ]
