"""Runs Python files written by users (configurations, sweeps), with one-line errors."""

import inspect
import os
import pathlib
import runpy
import sys
import traceback
from typing import Any

from lucid_jax.config import ConfigError
from lucid_jax.runtime.shipped import locate


def call_in_file(path: str | os.PathLike, name: str, *arguments: Any) -> Any:
    """Runs a Python file and returns the result of its function `name(*arguments)`.

    The file may import modules from its own folder.

    Raises:
      ConfigError: the file or the function does not exist, the function takes other arguments,
        or the code raises; the message then has the file and line.
    """
    path = locate(path)
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"no file {str(path)!r}")
    folder = str(pathlib.Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        function = runpy.run_path(str(path)).get(name)
        if not callable(function):
            raise ConfigError(f"defines no function {name}()")
        signature = inspect.signature(function)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            given = ", ".join(map(repr, arguments)) or "nothing"
            raise ConfigError(f"{name}{signature} was given {given}: {error}") from error
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        raise ConfigError(_describe(error, str(path))) from error
    finally:
        sys.path.remove(folder)


def _describe(error: Exception, path: str) -> str:
    """Returns the file's last line in the traceback, the error's type and its first line."""
    if isinstance(error, SyntaxError):
        where, message = f"{error.filename}:{error.lineno}", error.msg
    else:
        lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        message = str(error).partition("\n")[0]
    return f"{where}: {type(error).__name__}: {message}"
