"""Metrics files: JSON, one object a line, and TensorBoard events."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lucid_jax.runtime.workdir import set_aside

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to the TensorBoard event files of a work directory.

    On opening it drops the lines of steps after `resume_step`, which a killed run logged
    after its last checkpoint, so that a curve has every step once. A file with a damaged line
    is set aside.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int):
        path = pathlib.Path(workdir) / METRICS_FILE
        lines, damaged = _read_lines(path)
        kept = [line for line in lines if line["step"] <= resume_step]
        # Atomic, so that a kill here does not lose the history.
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if damaged:
            set_aside(path, "has damaged lines")
        partial.replace(path)
        self._lines = path.open("a")
        events = pathlib.Path(workdir) / "tensorboard"
        events.mkdir(exist_ok=True)
        # Not tensorboardX.SummaryWriter, whose flush leaves events in the queue of a thread. The
        # suffix keeps runs that start in the same second apart.
        self._events = EventsWriter(str(events / "events"), f".{time.time_ns()}")
        # TensorBoard then hides what a killed run wrote after its last checkpoint.
        self._add_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers and lists of numbers by name; TensorBoard gets a curve an entry."""
        # JSON has no NaN or infinity, so these become strings.
        clean = {name: _json_value(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **clean}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            entries = {name: value}
            if isinstance(value, list):
                entries = {f"{name}/{i:02d}": entry for i, entry in enumerate(value)}
            for tag, entry in entries.items():
                self._add_event(step, summary=scalar(tag, entry))
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._events.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` that are whole; [] without the file."""
    return _read_lines(pathlib.Path(workdir) / METRICS_FILE)[0]


def _read_lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], bool]:
    """Returns the whole lines, and whether others but the last, which a kill may cut, are not."""
    lines, damaged = [], False
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(_parse(text))
        except ValueError:
            damaged |= number < len(texts)
    return lines, damaged


def _parse(text: bytes) -> dict[str, Any]:
    line = json.loads(text)
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("not the metrics of a step")
    return line


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
