"""Reads the rows of benchmarks that the user keeps in a local folder."""

import functools
import json
from pathlib import Path
from typing import Any

from lucid_jax.config import ConfigError

Row = dict[str, Any]


@functools.lru_cache(maxsize=2)
def read_rows(benchmark: str, task: str, split: str, folder: str) -> tuple[Row, ...]:
    """Reads the rows of one task, in the order of the files' names.

    Anywhere below `folder`, which `benchmark` names in `Sources`, is `<task>.jsonl`, or a folder
    `<task>` with files `<split>*.jsonl` and `<split>*.parquet`, as in snapshots of hubs.

    Raises:
      ConfigError: there is no such folder or file, or a file cannot be read.
    """
    if not folder:
        raise ConfigError(
            f"{benchmark}_{task} needs the path of a folder with the benchmark's files,"
            f" as in {benchmark}=data/{benchmark}"
        )
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"no folder {folder!r}")
    files = sorted(root.rglob(f"{task}.jsonl")) or sorted(
        file for ending in ("jsonl", "parquet") for file in root.rglob(f"{task}/{split}*.{ending}")
    )
    if not files:
        raise ConfigError(
            f"no {task}.jsonl, {task}/{split}*.jsonl or {task}/{split}*.parquet below {folder!r}"
        )
    rows = tuple(row for file in files for row in _read(file))
    if not rows:
        raise ConfigError(f"no rows in {', '.join(map(str, files))}")
    return rows


def _read(file: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_table(file).to_pylist()
        lines = file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from error


def column(row: Row, *names: str) -> Any:
    """Returns the value of the first of `names` that the row has; raises ConfigError if none."""
    for name in names:
        if name in row:
            return row[name]
    raise ConfigError(f"no column {' or '.join(map(repr, names))}; there are {', '.join(row)}")
