"""The prompt that a user gives, and how it is shown before its completion."""

import os
import pathlib
import sys
from typing import TextIO

from lucid_jax.config import ConfigError


def read_prompt(prompt: str | None, file: str | None, *, distributed: bool) -> str:
    """Returns the text of --prompt, else of --prompt_file, else of standard input.

    Raises:
      ConfigError: both are given, the text cannot be read, or a process of a `distributed` run
        would have to read its standard input, which the others do not have.
    """
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompt_file are both given")
    if prompt is not None:
        return prompt
    if file is None and distributed:
        raise ConfigError("--distributed needs --prompt or --prompt_file, the same everywhere")
    try:
        if file:
            return pathlib.Path(file).expanduser().read_text(encoding="utf-8")
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        source = f"--prompt_file={file}" if file else "standard input"
        raise ConfigError(f"{source} cannot be read: {error}") from error


def echo_of(prompt: str, echo: bool | None, stream: TextIO) -> str:
    """Returns what `stream` shows of a prompt: nothing, or the prompt, in colour on a terminal.

    None for `echo` shows it on a terminal only, and a variable NO_COLOR takes the colour away.
    """
    terminal = stream.isatty()
    if not (terminal if echo is None else echo):
        return ""
    return f"\x1b[36m{prompt}\x1b[0m" if terminal and not os.environ.get("NO_COLOR") else prompt
