"""Parquet files: one document a row."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lucid_jax.config import ConfigError
from lucid_jax.data.jsonl import no_column


@dataclasses.dataclass(frozen=True)
class ParquetRowGroup:
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


def open_row_groups(file: Path, column: str) -> list[ParquetRowGroup]:
    """Opens a file; raises ConfigError unless it is Parquet and has such a column of strings."""
    from pyarrow import types

    with _open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if column not in schema.names:
        raise ConfigError(f"{file}: {no_column(column, schema.names)}")
    kind = schema.field(column).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(test(value_kind) for test in is_text):
        raise ConfigError(f"{file}: column {column!r} must hold strings; it holds {kind}")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [ParquetRowGroup(file, i, column, size) for i, size in enumerate(sizes)]


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
