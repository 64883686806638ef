"""Finds and reads checkpoints, and tells damaged ones from those of another model.

Nothing read back is trusted: array files decode silently with a flipped byte in them, and
a lost chunk reads as zeros, so the arrays must have the checksums in the record. A
checkpoint that fails is damaged, and the one before it is read instead. A sound checkpoint
of another model is the user's mistake, and raises ConfigError.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lucid_jax.checkpoint.checksum import checksums
from lucid_jax.checkpoint.record import Record, RecordHandler, describe_array
from lucid_jax.config import ConfigError

T = TypeVar("T")

# The subdirectories of a step directory.
STATE = "state"
RECORD = "record"
# Prefix of the names of parameters.
PARAMS = "params."
# Number of leaves that an error message names.
_NAMED_LEAVES = 5
# Orbax, tensorstore and json raise nearly any type, even a bare Exception, for files that are
# missing, cut short or garbage. These are not damage: an accelerator out of memory raises
# RuntimeError, an unresponsive file server OSError, and tensorstore a ValueError that begins
# with the status.
_NOT_DAMAGE = (RuntimeError, MemoryError, OSError)
_NOT_DAMAGE_STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE"
    "|UNKNOWN|INTERNAL): "
)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, or none can be restored."""


def absolute_path(path: str | os.PathLike) -> epath.Path:
    """Returns the absolute path that orbax needs, with `~` expanded.

    Raises:
      ConfigError: the library that reads the bucket of a URL is not installed.
    """
    given = epath.Path(path).expanduser()
    if "://" in str(path):
        try:
            given.exists()
        except ImportError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    # `absolute` would prefix `gs://bucket` with the working directory.
    return given if given.is_absolute() else given.absolute()


def step_paths(directory: epath.Path) -> list[epath.Path]:
    """Returns the step directories of finished saves in `directory`, newest first."""
    if not directory.is_dir():
        return []
    found = ocp.path.step.standard_name_format().find_all(directory)
    return [item.path for item in sorted(found, key=lambda item: item.step, reverse=True)]


def eval_losses(paths: Sequence[epath.Path]) -> dict[epath.Path, float]:
    """Returns the evaluation losses of the checkpoints that have one."""
    losses = {}
    for path in paths:
        try:
            record = read_record(path)
        except CheckpointError as error:
            logging.warning("Checkpoint %s has no readable evaluation loss: %s", path, error)
            continue
        if record.eval_loss is not None:
            losses[path] = record.eval_loss
    return losses


def read_first_sound(
    paths: Sequence[epath.Path], read: Callable[[epath.Path], T]
) -> tuple[T, list[epath.Path]]:
    """Reads the first of `paths` that is not damaged.

    Returns:
      The result of `read`, and the damaged paths before it.

    Raises:
      CheckpointError: all are damaged.
    """
    damaged: list[epath.Path] = []
    for path in paths:
        try:
            return read(path), damaged
        except CheckpointError as error:
            logging.warning("Skipping damaged checkpoint %s: %s", path, error)
            damaged.append(path)
            last_error = error
    names = ", ".join(path.name for path in paths)
    raise CheckpointError(
        f"all checkpoints in {paths[0].parent} are damaged (steps {names}); the last because:"
        f" {last_error}. To start anew, move them away."
    ) from last_error


def read_checkpoint(
    path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct], prefix: str = ""
) -> tuple[Record, dict[str, jax.Array]]:
    """Reads the record and the arrays named in `abstract` from a step directory.

    Args:
      abstract: Shape, dtype and sharding of each array by its name.
      prefix: Only arrays whose names begin with it are compared with `abstract`.

    Raises:
      ConfigError: the saved names, shapes or dtypes are not those of `abstract`.
      CheckpointError: the checkpoint is damaged.
    """
    record = read_record(path)
    _check_fits(
        path,
        expected={name: describe_array(x) for name, x in abstract.items()},
        found={name: x for name, x in record.arrays.items() if name.startswith(prefix)},
    )
    arrays = _on_every_process(lambda: _read_arrays(path / STATE, abstract))
    wrong = [name for name, x in checksums(arrays).items() if x != record.checksums[name]]
    if wrong:
        raise CheckpointError(f"the saved and the restored bits differ in {_shorten(wrong)}")
    # Orbax may give several replicas on a host one buffer, which cannot be donated. The result
    # of a computation has its own. One leaf at a time, so that only one exists twice.
    for name in arrays:
        copy = jax.jit(jnp.copy, out_shardings=abstract[name].sharding)
        arrays[name] = copy(arrays[name])
    return record, arrays


def read_record(path: epath.Path) -> Record:
    """Reads the record in a step directory; raises CheckpointError if it is damaged."""
    return _on_every_process(lambda: RecordHandler().restore(path / RECORD))


def describe_differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Names the arrays whose descriptions differ; returns "" if all agree."""
    return _shorten(
        [
            f"{name} (expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')})"
            for name in {**expected, **found}
            if expected.get(name) != found.get(name)
        ]
    )


def _read_arrays(
    path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    # Orbax refuses an array as large as the limit, and may hold two copies of what it reads.
    largest = max((math.prod(x.shape) * x.dtype.itemsize for x in abstract.values()), default=0)
    # The handler is used without ocp.Checkpointer, whose barriers would leave the other
    # processes waiting for one that met a damaged file.
    restored = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9).restore(
        path,
        args=ocp.args.PyTreeRestore(
            item=dict(abstract),
            restore_args=ocp.checkpoint_utils.construct_restore_args(dict(abstract)),
            partial_restore=True,
        ),
    )
    return {name: restored[name] for name in abstract}


def _on_every_process(read: Callable[[], T]) -> T:
    """Calls `read` on every process; if it fails on one, all raise CheckpointError."""
    failure = None
    try:
        result = read()
    except Exception as error:
        if not _is_damage(error.__cause__ or error):
            raise
        failure = error
    if not multihost_utils.process_allgather(np.array(failure is None)).all():
        cause = _one_line(failure) if failure else "another process cannot read it"
        raise CheckpointError(cause) from failure
    return result


def _is_damage(error: BaseException) -> bool:
    if isinstance(error, _NOT_DAMAGE):
        return isinstance(error, _MISSING)
    return not _NOT_DAMAGE_STATUS.match(str(error))


def _one_line(error: Exception) -> str:
    # Tensorstore appends its whole specification to a message.
    line = str(error.__cause__ or error).partition("\n")[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {line}"


def _check_fits(path: epath.Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    if is_parameters_alone(found) and not is_parameters_alone(expected):
        raise ConfigError(
            f"checkpoint {path} holds parameters alone: start from them, in another work"
            " directory, with checkpoint.init_from"
        )
    if differences := describe_differences(expected, found):
        raise ConfigError(f"checkpoint {path} is of another model: {differences}")


def is_parameters_alone(names: Iterable[str]) -> bool:
    """Returns whether arrays of these names are parameters, without the rest of a state."""
    return all(name.startswith(PARAMS) for name in names)


def _shorten(items: Sequence[str]) -> str:
    more = len(items) - _NAMED_LEAVES
    return ", ".join(items[:_NAMED_LEAVES]) + (f" and {more} more" if more > 0 else "")
