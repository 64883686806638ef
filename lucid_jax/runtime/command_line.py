"""Parts of run.py's command line that are not needed to print its help."""

import codecs
import io
import itertools
import logging as py_logging
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import ConfigDict

from lucid_jax.config import ConfigError
from lucid_jax.runtime.compilation_cache import enable_compilation_cache
from lucid_jax.runtime.user_file import call_in_file

_LOOKALIKES = {"–": "-", "—": "-", "×": "x", "·": "|", "…": "...", "±": "+-"}

# The flags that only some modes read.
_FLAGS_OF_MODE = {
    "train": ("profile", "overwrite"),
    "eval": ("checkpoint", "tasks", "lengths", "samples", "sources"),
    "generate": (
        "checkpoint", "prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "top_p",
        "seed", "num_samples", "echo",
    ),
    "sweep": ("sweep", "trial"),
    "compile": ("topology",),
}  # fmt: skip


def set_up_process() -> None:
    """Sets up the output, signals and compilation of a process that run.py was started as."""
    codecs.register_error("lookalike", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Terminals without Unicode get other signs instead of an error.
            stream.reconfigure(errors="lookalike")
    logging.get_absl_handler().setFormatter(None)
    # At INFO, jax names every platform that this machine does not have.
    py_logging.getLogger("jax").setLevel(py_logging.WARNING)
    # Until training itself handles both, SIGTERM ends a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    enable_compilation_cache()


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_LOOKALIKES.get(sign, "?") for sign in text), error.end


def default_workdir(config: str, sweep: str | None) -> str:
    """Returns `runs/` and the names of a configuration file, its argument and a sweep."""
    path, *argument = config.split(":", 1)
    names = [_file_name(path), *argument, *([_file_name(sweep)] if sweep else [])]
    return f"runs/{'-'.join(names)}"


def _file_name(path: str) -> str:
    file = pathlib.Path(path).absolute()
    # Every converted model has a config.py.
    return file.parent.name if file.stem == "config" else file.stem


def resume_command(argv: Sequence[str]) -> str:
    """Returns the command with the overrides that a run needs when it resumes."""
    script, *arguments = argv
    # An installed package runs its own copy.
    is_shipped = pathlib.Path(script).parent.name == "shipped"
    command = shlex.join([*(["lucid-jax-run"] if is_shipped else ["python", script]), *arguments])
    return re.sub(r" --?(profile[= ]\S+|overwrite(=\S+)?)", "", command)


def parse_integer(argument: str | int) -> int:
    """Returns the integer that a --config override gives, as in 1000 or 1e3."""
    try:
        # The flag's own default is an integer already.
        return argument if isinstance(argument, int) else int(argument, 0)
    except ValueError:
        if not float(argument).is_integer():
            raise
        return int(float(argument))


def load_config(argument: str) -> ConfigDict:
    """Returns the result of `get_config` in a file; `argument` is --config's, `FILE[:TEXT]`.

    Raises:
      ConfigError: there is no such file or function, it raises, or the result is no ConfigDict.
    """
    path, *arguments = argument.split(":", 1)
    config = call_in_file(path, "get_config", *arguments)
    if isinstance(config, ConfigDict):
        return config
    kind = type(config).__name__
    raise ConfigError(f"{path}: get_config() must return a ConfigDict; got {kind}")


def check_flags(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a flag that --mode or --tasks does not read, or a stray argument."""
    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r}; flags start with --")
    for name in itertools.chain(*_FLAGS_OF_MODE.values()):
        if values[name].present and name not in _FLAGS_OF_MODE[values.mode]:
            modes = [mode for mode, names in _FLAGS_OF_MODE.items() if name in names]
            allowed = " or ".join(f"--mode={mode}" for mode in modes)
            raise ConfigError(f"--{name} is for {allowed}; got --mode={values.mode}")
    for name in ("lengths", "samples", "sources"):
        if values[name].present and values.tasks == ["loss"]:
            raise ConfigError(f"--{name} is for tasks other than loss; got --tasks=loss")
