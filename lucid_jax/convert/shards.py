"""Directories of safetensors files: each tensor read when asked for, each file written by itself.

Large models are cut into several files, with an index of which tensor is where.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by its name from here on
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from lucid_jax.config import ConfigError
from lucid_jax.runtime.workdir import write_json

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorDirectory:
    """The tensors of a directory, which stay on disk until they are read."""

    def __init__(self, directory: pathlib.Path):
        """Opens all files of `directory` and reads what is in them, but no tensor.

        Raises:
          ConfigError: there are no safetensors files, or one is missing or damaged.
        """
        self._files: dict[str, safetensors.safe_open] = {}
        for path in _files(directory):
            try:
                file = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type, as in `"BF16"`, and shape of every tensor, by name."""
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._files[name].get_tensor(name)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / _ONE_FILE).exists():
        return [directory / _ONE_FILE]
    index = directory / _INDEX
    if not index.exists():
        raise ConfigError(
            f"{directory} holds neither {_ONE_FILE} nor {_INDEX}; of other files,"
            " save_pretrained of transformers makes them"
        )
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{index} is no index of safetensors files: {error!r}") from error
    return [directory / name for name in sorted(names)]


def write_tensors(
    directory: pathlib.Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_bytes: int,
) -> None:
    """Writes tensors in order; those of one file are in memory at a time.

    Args:
      directory: gets the files, and their index if they are several.
      sizes: bytes of every tensor, by name.
      read: gives the tensor of a name.
      max_bytes: of a file, unless a tensor alone is larger.
    """
    files = _cut(sizes, max_bytes)
    where: dict[str, str] = {}
    for i, names in enumerate(files, 1):
        logging.info("writing file %d of %d", i, len(files))
        several = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        file = several if len(files) > 1 else _ONE_FILE
        _write_file(directory / file, names, read)
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(
            directory / _INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where},
        )


def _write_file(
    path: pathlib.Path, names: Sequence[str], read: Callable[[str], np.ndarray]
) -> None:
    # The library takes the memory of an array as it lies.
    tensors = {name: np.ascontiguousarray(read(name)) for name in names}
    # Readers of other libraries ask for this entry.
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    # The library lets nobody but the owner read what it writes.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _cut(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Runs of neighbouring names whose sizes add up to at most `max_bytes`."""
    runs: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not runs:
            runs.append([])
            room = max_bytes
        runs[-1].append(name)
        room -= size
    return runs
