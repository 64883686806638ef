"""Python files that a user writes, configurations and sweeps: their mistakes in one line."""

from __future__ import annotations

import inspect
import os
import pathlib
import runpy
import traceback
from typing import Any

from lucid_jax.config import ConfigError


def call_in_file(path: str | os.PathLike, function: str, *arguments: Any) -> Any:
    """Runs a Python file, then `function(*arguments)` of it, and gives what that returns.

    Raises:
      ConfigError: there is no such file, or function in it, the function takes other
        arguments, or something raises; then the message has its file and line.
    """
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"no file {str(path)!r}")
    try:
        found = runpy.run_path(str(path)).get(function)
        if not callable(found):
            raise ConfigError(f"defines no function {function}()")
        signature = inspect.signature(found)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            given = ", ".join(map(repr, arguments)) or "nothing"
            raise ConfigError(f"{function}{signature} was given {given}: {error}") from error
        return found(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        raise ConfigError(_describe(error, str(path))) from error


def _describe(error: Exception, path: str) -> str:
    """The line of the file that led to the error, its type and first line of its message."""
    if isinstance(error, SyntaxError):
        where, message = f"{error.filename}:{error.lineno}", error.msg
    else:
        lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        message = str(error).partition("\n")[0]
    return f"{where}: {type(error).__name__}: {message}"
