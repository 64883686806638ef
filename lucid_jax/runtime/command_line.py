"""Parts of run.py's command line that are not needed to print its help."""

import itertools
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from lucid_jax.config import ConfigError
from lucid_jax.runtime.user_file import call_in_file

# The flags that only some modes read.
_FLAGS_OF_MODE = {
    "train": ("profile",),
    "eval": ("checkpoint", "tasks", "lengths", "samples", "sources"),
    "generate": (
        "checkpoint", "prompt", "prompt_file", "max_new_tokens", "temperature", "top_k", "top_p",
        "seed", "num_samples", "echo",
    ),
    "sweep": ("sweep", "trial"),
    "compile": ("topology",),
}  # fmt: skip


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
