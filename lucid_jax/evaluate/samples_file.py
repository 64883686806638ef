"""A file of evaluated samples, one JSON object a line, so that an evaluation can be resumed."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Self

from lucid_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Group:
    """Identifies the samples of one task at one length, answered by one model.

    `run` is a hash of all else that determines the samples and their answers: parameters, model,
    tokenizer and the texts that the task reads.
    """

    run: str
    task: str
    length: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer to sample `index` of a group and its scores, or why the sample was left out.

    The prompt is not kept, since `Task.sample` returns it again.
    """

    index: int
    step: int
    prediction: str = ""
    answers: tuple[str, ...] = ()
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""


class SamplesFile:
    """Reads and appends results; a last line that a kill cut short is dropped."""

    def __init__(self, path: pathlib.Path):
        """Opens or creates the file; raises ConfigError for a line that is no result."""
        self._results: dict[Group, dict[int, Result]] = {}
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            os.truncate(path, len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                self._keep(*_decode(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"line {number} of {path} is not the result of a sample: move the file away"
                ) from error
        self._file = path.open("a", encoding="utf-8")

    def add(self, group: Group, results: Iterable[Result]) -> None:
        """Appends results and flushes them, so that killing this process does not lose them."""
        for result in results:
            values = dataclasses.asdict(group) | dataclasses.asdict(result)
            self._file.write(json.dumps(values) + "\n")
            self._keep(group, result)
        self._file.flush()

    def results(self, group: Group) -> dict[int, Result]:
        """Returns the results of a group by index."""
        return self._results.get(group, {})

    def _keep(self, group: Group, result: Result) -> None:
        self._results.setdefault(group, {})[result.index] = result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _decode(line: bytes) -> tuple[Group, Result]:
    values = json.loads(line)
    names = [field.name for field in dataclasses.fields(Group)]
    group = Group(**{name: values.pop(name, None) for name in names})
    values["answers"] = tuple(values.get("answers", ()))
    return group, Result(**values)
