"""The scores of a model, in files to which every request adds."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from lucid_jax.evaluate.heat_map import draw_heat_map
from lucid_jax.evaluate.report import GroupReport, Score, to_markdown
from lucid_jax.runtime.workdir import read_json, write_json

_ENDINGS = ("json", "md", "png")


def write_scores(
    directory: pathlib.Path,
    title: str,
    values: dict[str, Any],
    reports: Sequence[GroupReport],
    trained_length: int,
) -> str:
    """Writes `scores.json`, `scores.md` and `scores.png`, with earlier scores of the same model.

    Those of another model are kept as `scores-step-<step>.*`, and restored when that model is
    scored again.

    Args:
      values: Other values for the JSON file: `model` identifies the model, `step` its checkpoint.
      reports: New scores, which replace earlier ones of the same tasks and lengths.

    Returns:
      The content of `scores.md`.
    """
    kept = _read(_path(directory, values["step"], "json"), values["model"])
    present = directory / "scores.json"
    if saved := read_json(present):
        if saved.get("model") == values["model"]:
            kept = _read(present, values["model"])
        else:
            for ending in _ENDINGS:
                file = directory / f"scores.{ending}"
                if file.exists():
                    file.replace(_path(directory, saved["step"], ending))
    merged = {(x.task, x.length): x for x in [*kept, *reports]}
    values = {**values, "tasks": [dataclasses.asdict(report) for report in merged.values()]}
    write_json(present, values)
    table = to_markdown(title, list(merged.values()), trained_length)
    (directory / "scores.md").write_text(table, encoding="utf-8")
    draw_heat_map(title, list(merged.values())).savefig(directory / "scores.png", dpi=120)
    return table


def _path(directory: pathlib.Path, step: int, ending: str) -> pathlib.Path:
    return directory / f"scores-step-{step}.{ending}"


def _read(file: pathlib.Path, model: str) -> list[GroupReport]:
    """Returns the scores in a file if they are the model's."""
    values = read_json(file) or {}
    if values.get("model") != model:
        return []
    return [
        GroupReport(**{**task, "scores": {k: Score(**v) for k, v in task["scores"].items()}})
        for task in values["tasks"]
    ]
