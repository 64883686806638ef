"""The flags, Markdown tables and result files that experiments share."""

import argparse
import functools
import importlib.machinery
import json
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def make_parser(
    spec: importlib.machinery.ModuleSpec, doc: str | None, argv: Sequence[str] | None
) -> argparse.ArgumentParser:
    """Returns a parser of a module's command, from its `__spec__`, `__doc__` and arguments.

    Its flags have `out`, where results go, and `command`, to be saved with them.
    """
    prog = f"python -m {spec.name}"
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = pathlib.Path(str(spec.origin)).parent / "results"
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where results go")
    arguments = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command=" ".join([prog, *map(shlex.quote, arguments)]))
    return parser


def integers(text: str) -> tuple[int, ...]:
    """Parses `512,1024`."""
    return tuple(map(int, text.split(",")))


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def rounded(x: Any, digits: int = 6) -> Any:
    """Returns `x` as JSON can hold it, its floats rounded to so many significant digits."""
    if isinstance(x, Mapping):
        return {str(name): rounded(value, digits) for name, value in x.items()}
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def write_json(path: pathlib.Path, **result: Any) -> None:
    """Writes results, rounded, with one record of a list on each line."""
    dump = functools.partial(json.dumps, ensure_ascii=False)
    fields = []
    for name, value in rounded(result).items():
        text = dump(value)
        if isinstance(value, list) and any(isinstance(x, dict) for x in value):
            text = "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        fields.append(f" {dump(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")
