"""Metrics files: JSON, one object a line, and TensorBoard events."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorboardX

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to the TensorBoard event files of a work directory.

    On opening it drops the lines of steps after `resume_step`, which a killed run logged
    after its last checkpoint, so that a curve has every step once.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int):
        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [line for line in read_metrics(directory) if line["step"] <= resume_step]
        # Atomic, so that a kill here does not lose the history.
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._lines = path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers and lists of numbers by name; TensorBoard gets a curve an entry."""
        # JSON has no NaN or infinity, so these become strings.
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
        """Writes out what is buffered and closes the files."""
        self._lines.close()
        self._events.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` up to one that was cut short; [] without the file."""
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
