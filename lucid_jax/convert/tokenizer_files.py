"""Finds and copies the tokenizer files of a model."""

import pathlib
import shutil

# Names that `load_tokenizer` reads, in order of preference.
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
# Files that transformers stores next to the tokenizer.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def find_tokenizer(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the tokenizer file in a directory, or None."""
    files = (directory / name for name in (_JSON, _SENTENCEPIECE))
    return next((file for file in files if file.exists()), None)


def copy_tokenizer(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies a tokenizer file and its companions, under the names that transformers expects."""
    shutil.copyfile(file, directory / (_JSON if file.suffix == ".json" else _SENTENCEPIECE))
    for name in _COMPANIONS:
        if (file.parent / name).exists():
            shutil.copyfile(file.parent / name, directory / name)
