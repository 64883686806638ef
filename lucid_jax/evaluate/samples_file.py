"""Finished samples, one JSON object a line: what an interrupted evaluation need not do again."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import types
from collections.abc import Iterable
from typing import Any

from lucid_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Group:
    """Whose samples belong together: a task at a length, asked of one model in one way.

    `run` identifies all that determines them beside the other fields: parameters, model,
    tokenizer and the texts that the task reads.
    """

    run: str
    task: str
    length: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of sample `index` of a group: scores by name, or why it was left out.

    The prompt is not kept: `Task.sample` gives it again.
    """

    index: int
    step: int
    prediction: str = ""
    answers: tuple[str, ...] = ()
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""


class SamplesFile:
    """Reads a file of results and appends to it; a line that a kill has cut is dropped."""

    def __init__(self, path: pathlib.Path):
        """Opens the file, made if it is not there.

        Raises:
          ConfigError: a line that this class has not written.
        """
        self._results: dict[Group, dict[int, Result]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._keep(*_decode(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"line {number} of {path} is no result of a sample: move the file away"
                ) from error
        self._lines = path.open("a", encoding="utf-8")

    def add(self, group: Group, results: Iterable[Result]) -> None:
        """Appends results, which are then safe from a kill of this process."""
        for result in results:
            values = dataclasses.asdict(group) | dataclasses.asdict(result)
            self._lines.write(json.dumps(values) + "\n")
            self._keep(group, result)
        self._lines.flush()

    def results(self, group: Group) -> dict[int, Result]:
        """Those of a group, by index."""
        return self._results.get(group, {})

    def _keep(self, group: Group, result: Result) -> None:
        self._results.setdefault(group, {})[result.index] = result

    def __enter__(self) -> SamplesFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._lines.close()


def _decode(line: bytes) -> tuple[Group, Result]:
    values = json.loads(line)
    names = [field.name for field in dataclasses.fields(Group)]
    group = Group(**{name: values.pop(name, None) for name in names})
    values["answers"] = tuple(values.get("answers", ()))
    return group, Result(**values)
