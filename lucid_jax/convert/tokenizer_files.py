"""The tokenizer of a model travels with it."""

from __future__ import annotations

import pathlib
import shutil

# As `load_tokenizer` takes them, the first that is there.
_NAMES = ("tokenizer.json", "tokenizer.model")
# What transformers keeps beside them.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def find_tokenizer(directory: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer file in a directory; None if there is none."""
    return next((directory / name for name in _NAMES if (directory / name).exists()), None)


def copy_tokenizer(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies a tokenizer file and its companions, under the names that are looked for."""
    json_name, other_name = _NAMES
    shutil.copyfile(file, directory / (json_name if file.suffix == ".json" else other_name))
    for name in _COMPANIONS:
        if (file.parent / name).exists():
            shutil.copyfile(file.parent / name, directory / name)
