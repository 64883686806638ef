"""Reads and writes directories of safetensors files, one tensor or file in memory at a time.

A large model is split into several files, and an index says which file holds each tensor.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from lucid_jax.config import ConfigError
from lucid_jax.runtime.workdir import write_json

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorDirectory:
    """The tensors of a directory; each stays on disk until it is read."""

    def __init__(self, directory: pathlib.Path):
        """Opens all files of `directory`; raises ConfigError if one is missing or damaged."""
        self._directory = directory
        self._files: dict[str, safetensors.safe_open] = {}
        for path in _files(directory):
            try:
                file = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns the dtype, such as `"BF16"`, and shape of every tensor by name."""
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor; raises ConfigError unless all its numbers are finite."""
        return require_finite(self._directory, name, self._files[name].get_tensor(name))


def require_finite(where: str | os.PathLike, name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns `tensor`; raises ConfigError, which names `where` it is, at a NaN or infinity."""
    wrong = ~np.isfinite(tensor)
    if wrong.any():
        index = np.unravel_index(wrong.argmax(), tensor.shape)
        raise ConfigError(
            f"{where}: tensor {name} must be finite; {wrong.sum()} of its {tensor.size} numbers are"
            f" not: {tensor[index]} at {list(map(int, index))}"
        )
    return tensor


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / _ONE_FILE).exists():
        return [directory / _ONE_FILE]
    index = directory / _INDEX
    if not index.exists():
        raise ConfigError(
            f"{directory} holds neither {_ONE_FILE} nor {_INDEX}; to convert other formats, load"
            " the model in transformers and call save_pretrained"
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
    """Writes tensors in order; memory holds the tensors of one file at a time.

    Args:
      directory: Where the files go, and their index if there are several.
      sizes: The bytes of every tensor, by name.
      max_bytes: The most bytes of a file, unless a single tensor is larger.
    """
    files = _split(sizes, max_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files, 1):
        logging.info("writing file %d of %d", i, len(files))
        file = _ONE_FILE
        if len(files) > 1:
            file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / file, names, read)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(
            directory / _INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )


def _write_file(
    path: pathlib.Path, names: Sequence[str], read: Callable[[str], np.ndarray]
) -> None:
    # safetensors writes an array's memory as it is, whatever its strides.
    tensors = {name: np.ascontiguousarray(read(name)) for name in names}
    # Other libraries expect this entry.
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes its files readable by the owner alone.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Splits the names, in order, into groups of at most `max_bytes`."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    return groups
