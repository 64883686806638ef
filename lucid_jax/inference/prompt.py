"""The prompt that a user gives on the command line, in a file or on standard input."""

import pathlib
import sys

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
