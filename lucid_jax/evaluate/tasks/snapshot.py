"""Benchmarks that the user brings: rows of files in a local folder, and prompts cut to fit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from lucid_jax.config import ConfigError
from lucid_jax.data.tokenizer import Tokenizer
from lucid_jax.evaluate.tasks.task import Budget

Row = dict[str, Any]


@functools.lru_cache(maxsize=2)
def read_rows(folder: str, task: str, split: str) -> tuple[Row, ...]:
    """The rows of one task of a benchmark, in the order of the files' names.

    Found anywhere below `folder`: `<task>.jsonl`, or the files `<split>*.jsonl` and
    `<split>*.parquet` of a folder `<task>`, as snapshots of datasets hubs have them.

    Raises:
      ConfigError: no such folder or files, or a file that cannot be read.
    """
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
    """The value of the first of `names` that the row has.

    Raises:
      ConfigError: it has none of them.
    """
    for name in names:
        if name in row:
            return row[name]
    raise ConfigError(f"no column {' or '.join(map(repr, names))}; there are {', '.join(row)}")


def truncate(prompt: str, new_tokens: int, budget: Budget, head: float) -> tuple[str, dict]:
    """`prompt`, cut to fit where it is too long, and what a sample's `meta` says of it.

    Args:
      prompt: the whole prompt.
      new_tokens: left free for the answer.
      budget: of the sample.
      head: the share of what is kept that comes from the beginning; the rest from the end.

    Raises:
      ConfigError: the length leaves no token for the prompt.
    """
    total = budget.count(prompt)
    room = budget.length - new_tokens
    kept, tokens = prompt, total
    # Decoded and encoded again, the ends may come to a few more tokens than were kept.
    keep = room - budget.check("", new_tokens)
    ids = budget.tokenizer.encode(prompt) if tokens > room else None
    while ids is not None and tokens > room:
        if keep <= 0:
            budget.check(prompt, new_tokens)
        kept = _ends(ids, keep, head, budget.tokenizer)
        tokens = budget.count(kept)
        keep -= max(tokens - room, 1)
    return kept, {"prompt_tokens": tokens, "truncated_tokens": total - tokens}


def _ends(ids: np.ndarray, keep: int, head: float, tokenizer: Tokenizer) -> str:
    first = int(keep * head)
    return tokenizer.decode(ids[:first]) + tokenizer.decode(ids[len(ids) - (keep - first) :])
