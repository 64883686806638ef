"""Log lines: JSON, one object a line, and TensorBoard events beside it."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorboardX

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard event files of a work directory.

    Lines of steps that a killed run had logged after its last checkpoint are dropped
    when it resumes, so that a curve has every step once; with `evaluates`, so are
    evaluations of that checkpoint, as it is going to have one.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int, evaluates: bool = False):
        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        kept = [
            line
            for line in read_metrics(directory)
            if line["step"] < resume_step
            or (line["step"] == resume_step and not (evaluates and "eval_loss" in line))
        ]
        # Written aside and renamed: a kill here must not lose the history.
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self._path)
        self._lines = self._path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers and lists of numbers under their names; lists one curve an entry."""
        # JSON has no NaN: a value that is not finite becomes its name.
        clean = {name: _json_value(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **clean}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for i, entry in enumerate(value):
                    self._events.add_scalar(f"{name}/{i:02d}", entry, step)
            else:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        self._lines.close()
        self._events.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that was cut short; [] if no file."""
    path = pathlib.Path(workdir) / METRICS_FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
