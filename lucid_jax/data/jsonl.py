"""JSON lines: one document a line, a text or a prompt with its completion."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lucid_jax.data.documents import BadDocumentError, Completion
from lucid_jax.data.files import uncompressed_file

# Bytes of a file that are searched for line ends at a time.
_READ_BYTES = 1 << 24
_PROMPT, _COMPLETION = Completion._fields


class JsonlFile:
    """The documents of one file.

    A line is a JSON object with a string under `text_field`, or else strings under `prompt` and
    `completion`. Blank lines are no documents, and null is an empty text.
    """

    def __init__(self, file: Path, text_field: str):
        self._file = file
        self._text_field = text_field
        self._content = uncompressed_file(file)
        self._lines = _find_lines(self._content, self._content.stat().st_mtime_ns)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str | Completion:
        """Reads a line; raises BadDocumentError, with its number, if it is not as above."""
        start, end = self._lines[index]
        # The file is opened for each read, because threads would share its position.
        with self._content.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            return _parse_line(line, self._text_field)
        except BadDocumentError as error:
            number = _line_number(self._content, start)
            raise BadDocumentError(f"{self._file}, line {number}: {error}") from error


def no_column(column: str, columns: Iterable[str]) -> str:
    """Returns the message of a missing text column."""
    return f"no column {column!r} (data.text_field); there are {', '.join(columns)}"


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


def _parse_line(line: bytes, key: str) -> str | Completion:
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"byte {error.start} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadDocumentError("not a line of JSON") from error
    if not isinstance(values, dict):
        raise BadDocumentError("not a JSON object")
    if key in values:
        return _text("text", values[key])
    if _PROMPT in values and _COMPLETION in values:
        return Completion(*(_text(name, values[name]) for name in Completion._fields))
    raise BadDocumentError(no_column(key, values))


def _text(name: str, value: Any) -> str:
    text = "" if value is None else value
    if not isinstance(text, str):
        raise BadDocumentError(f"the {name} must be a string; got {type(text).__name__}")
    # JSON can spell lone surrogates, which no tokenizer accepts.
    return text.encode(errors="replace").decode()


# Every epoch meets the same bad lines.
@functools.lru_cache(maxsize=4096)
def _line_number(file: Path, start: int) -> int:
    """Returns the number, from 1, of the line that begins at byte `start`."""
    number = 1
    with file.open("rb") as stream:
        while start > 0:
            chunk = stream.read(min(start, _READ_BYTES))
            number += chunk.count(b"\n")
            start -= len(chunk)
    return number
