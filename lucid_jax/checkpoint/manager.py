"""Checkpoints: all that a run needs to go on as if it had never stopped.

Orbax writes them, asynchronously, one directory a step, which appears under its
final name only when it is complete:

    <directory>/1000/state/   the arrays, under flat names such as `params.embed.kernel`
    <directory>/1000/record/  JSON, one file a process: see `checkpoint_record`

Nothing read back is trusted. Array files decode silently with a flipped byte in
them, and a lost chunk reads as zeros, so the record keeps a checksum of the bits
of every array. A checkpoint that fails the comparison is damaged: a run starts
from the one before. A sound checkpoint of another model is the user's mistake,
and an error.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lucid_jax.checkpoint.checksum import checksums
from lucid_jax.checkpoint.record import (
    Record,
    RecordArgs,
    RecordHandler,
    add_eval_loss,
    encode,
)
from lucid_jax.checkpoint.retention import LowestLossN, hide_orbax_chatter
from lucid_jax.config import CheckpointConfig, ConfigError

PyTree = Any
T = TypeVar("T")

_STATE = "state"
_RECORD = "record"
# How the names of parameters begin.
_PARAMS = "params."
# Of an array that is encoded at once, and of encoded arrays that are written at once: orbax
# otherwise holds all of them in memory before it writes the first.
_CHUNK_BYTES = 64 * 2**20
_FILE_BYTES = 256 * 2**20
# How many leaves an error message names.
_NAMED_LEAVES = 5
# Orbax, tensorstore and json raise nearly anything on files that are missing, cut
# short or garbage, down to a bare Exception. These are no fault of the files: an
# accelerator out of memory is a RuntimeError, a file server that does not answer an
# OSError, and tensorstore begins a ValueError with the status.
_NOT_DAMAGE = (RuntimeError, MemoryError, OSError)
_NOT_DAMAGE_STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE"
    "|UNKNOWN|INTERNAL): "
)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointError(RuntimeError):
    """No checkpoint can be restored from, or saved to, this place."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.save` was given at `step`; `data_state` is that of all processes."""

    step: int
    state: PyTree
    data_state: dict[str, Any]
    config: dict
    eval_loss: float | None


class Checkpointer:
    """Saves and restores the state of a run in `directory`, which it alone writes to.

    Every process of the run makes the same calls in the same order.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
        """Opens `directory`, creating it if need be and clearing it of unfinished saves."""
        hide_orbax_chatter()
        self._directory = _absolute(directory)
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        losses = _eval_losses(_step_paths(self._directory))
        # By step; `save` adds to it, for the policy to read.
        self._eval_losses = {int(path.name): loss for path, loss in losses.items()}
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(self._config.keep_last),
                        LowestLossN(self._config.keep_best, self._eval_losses),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data_state: dict[str, Any],
        config: dict,
        eval_loss: float | None,
    ) -> None:
        """Starts writing checkpoint `step`, and does nothing if there is one already.

        Returns once the buffers of `state` may be donated or overwritten; the
        writing goes on behind. An error there is raised by the next call.

        Args:
          step: number of the checkpoint, not below that of any other one here.
          state: pytree of jax.Array, of any shapes, dtypes and shardings.
          data_state: JSON values, by shard of the data; a process gives its own shards.
          config: JSON values, the same on every process.
          eval_loss: decides what is kept as best; None or NaN is never best.

        Raises:
          CheckpointError: there is a checkpoint of a later step: this run did not
            start from it, and must not mix with it.
        """
        steps = self._manager.all_steps()
        if step in steps:
            logging.info("Checkpoint %d is there already; not saved again", step)
            return
        if steps and step < max(steps):
            raise CheckpointError(
                f"cannot save step {step}: {self._directory} holds the later step {max(steps)}"
            )
        arrays = _named(state)
        record = Record(
            step=step,
            process_count=jax.process_count(),
            arrays={name: _describe(x) for name, x in arrays.items()},
            checksums=checksums(arrays),
            config=config,
            data_state=data_state,
            eval_loss=None if eval_loss is None or math.isnan(eval_loss) else eval_loss,
        )
        if record.eval_loss is not None:
            self._eval_losses[step] = record.eval_loss
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.PyTreeSave(
                        arrays,
                        dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)),
                        ocdbt_target_data_file_size=_FILE_BYTES,
                    ),
                    _RECORD: RecordArgs(encode(record)),
                }
            ),
            force=True,
        )

    def add_eval_loss(self, step: int, loss: float) -> None:
        """Gives checkpoint `step`, saved without one, its evaluation loss; NaN is none."""
        if math.isnan(loss):
            return
        self._eval_losses[step] = loss
        if jax.process_index() == 0:
            add_eval_loss(self._directory / str(step) / _RECORD, loss)

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """Restores the newest checkpoint that is not damaged; None if there is none at all.

        A damaged one is logged and, once a sound one is found, renamed to
        `<step>.damaged`, so that its step can be saved again.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the structure of the
            saved state. The arrays come back with its shardings, on whatever mesh
            these are, and may be donated.

        Raises:
          ConfigError: the checkpoint holds other leaves, shapes or dtypes.
          CheckpointError: there are checkpoints and all are damaged.
        """
        self._manager.wait_until_finished()
        paths = _step_paths(self._directory)
        if not paths:
            return None
        abstract = _named(abstract_state)
        (record, arrays), damaged = _first_sound(paths, lambda path: _read(path, abstract))
        if damaged:
            self._set_aside(damaged)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values())
        return Restored(record.step, state, record.data_state, record.config, record.eval_loss)

    def _set_aside(self, paths: Sequence[epath.Path]) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            for path in paths:
                target = path.with_name(f"{path.name}.damaged")
                while target.exists():
                    target = target.with_name(f"{target.name}.damaged")
                path.rename(target)
        multihost_utils.sync_global_devices("lucid_jax.checkpoint.manager.set_aside")
        # The manager keeps the steps it found when it was opened.
        self._manager = self._open()

    def close(self) -> None:
        """Waits for pending writes and raises the error of one that failed."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


def checkpoint_directory(workdir: str | os.PathLike) -> epath.Path:
    """Where the checkpoints of a run are, below its work directory."""
    return epath.Path(workdir) / "checkpoints"


def restore_params(
    path: str | os.PathLike, abstract_params: PyTree, *, best: bool = False
) -> tuple[int, PyTree, dict]:
    """Restores only the `params` of a saved state; writes nothing, so that a run may go on.

    Args:
      path: a work directory or a directory of a `Checkpointer`, whose newest sound
        checkpoint is taken, or the directory of one step.
      abstract_params: pytree of jax.ShapeDtypeStruct with the shardings wanted; without
        one, an array goes to the default device.
      best: take the sound checkpoint of lowest evaluation loss, not the newest.

    Returns:
      The step, the parameters, and the configuration that they were saved with.

    Raises:
      ConfigError: the checkpoint holds other parameters, shapes or dtypes.
      CheckpointError: no checkpoint is there, none with an evaluation loss if
        `best`, or all are damaged.
    """
    hide_orbax_chatter()
    abstract = _named({"params": abstract_params})
    (record, arrays), _ = _first_sound(
        _candidates(path, best), lambda path: _read(path, abstract, _PARAMS)
    )
    params = jax.tree.unflatten(jax.tree.structure(abstract_params), arrays.values())
    return record.step, params, record.config


def saved_config(path: str | os.PathLike) -> dict:
    """The configuration that the newest checkpoint in `path` was saved with.

    Args:
      path: as in `restore_params`.

    Raises:
      CheckpointError: no checkpoint is there, or the records of all are damaged.
    """
    record, _ = _first_sound(_candidates(path), _read_record)
    return record.config


def _candidates(path: str | os.PathLike, best: bool = False) -> list[epath.Path]:
    """The step directories that `path` means, those to be tried first in front; not empty."""
    directory = _absolute(path)
    if checkpoint_directory(directory).exists():
        directory = checkpoint_directory(directory)
    paths = [directory] if (directory / _STATE).exists() else _step_paths(directory)
    if best:
        losses = _eval_losses(paths)
        paths = sorted(losses, key=losses.__getitem__)
    if not paths:
        raise CheckpointError(
            f"no checkpoint{' with an evaluation loss' if best else ''} in {directory}"
        )
    return paths


def _absolute(path: str | os.PathLike) -> epath.Path:
    # Orbax refuses relative paths, and `absolute` would make one of `gs://bucket`.
    given = epath.Path(path).expanduser()
    return given if given.is_absolute() else given.absolute()


def _step_paths(directory: epath.Path) -> list[epath.Path]:
    """The committed step directories in `directory`, newest first."""
    if not directory.is_dir():
        return []
    found = ocp.path.step.standard_name_format().find_all(directory)
    return [item.path for item in sorted(found, key=lambda item: item.step, reverse=True)]


# Reading.


def _first_sound(
    paths: Sequence[epath.Path], read: Callable[[epath.Path], T]
) -> tuple[T, list[epath.Path]]:
    """Reads the first of `paths` that is not damaged; returns the damaged ones before it too."""
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


def _read(
    path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct], scope: str = ""
) -> tuple[Record, dict[str, jax.Array]]:
    """Reads the arrays named in `abstract` from a step directory.

    Raises:
      ConfigError: those are not the leaves, shapes and dtypes saved under `scope`.
      CheckpointError: the checkpoint is damaged.
    """
    record = _read_record(path)
    _check_fits(
        path,
        expected={name: _describe(x) for name, x in abstract.items()},
        found={name: x for name, x in record.arrays.items() if name.startswith(scope)},
    )
    arrays = _on_every_process(lambda: _read_arrays(path / _STATE, abstract))
    wrong = [name for name, x in checksums(arrays).items() if x != record.checksums[name]]
    if wrong:
        raise CheckpointError(f"the saved and the restored bits differ in {_shorten(wrong)}")
    # Orbax may give the replicas of a host one buffer, which is then silently not
    # donated. What a computation returns is its own. One leaf at a time, so that no
    # more than one exists twice.
    for name in arrays:
        copy = jax.jit(jnp.copy, out_shardings=abstract[name].sharding)
        arrays[name] = copy(arrays[name])
    return record, arrays


def _read_record(path: epath.Path) -> Record:
    return _on_every_process(lambda: RecordHandler().restore(path / _RECORD))


def _read_arrays(
    path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    # Orbax may hold two copies of what it reads at a time. It refuses an array of the limit.
    largest = max((math.prod(x.shape) * x.dtype.itemsize for x in abstract.values()), default=0)
    # The handler, without a Checkpointer around it: the barriers of the latter would
    # leave the other processes waiting for one that met a damaged file.
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
    alone, wanted_alone = (
        all(name.startswith(_PARAMS) for name in names) for names in (found, expected)
    )
    if alone and not wanted_alone:
        raise ConfigError(
            f"checkpoint {path} holds parameters alone: start from them, in another work"
            " directory, with checkpoint.init_from"
        )
    if differences := describe_differences(expected, found):
        raise ConfigError(f"checkpoint {path} is of another model: {differences}")


def describe_differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The arrays, by name, whose descriptions differ; empty if none do."""
    return _shorten(
        [
            f"{name} (expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')})"
            for name in {**expected, **found}
            if expected.get(name) != found.get(name)
        ]
    )


def _shorten(items: Sequence[str]) -> str:
    more = len(items) - _NAMED_LEAVES
    return ", ".join(items[:_NAMED_LEAVES]) + (f" and {more} more" if more > 0 else "")


def _eval_losses(paths: Sequence[epath.Path]) -> dict[epath.Path, float]:
    """The evaluation losses of those checkpoints that have one."""
    losses = {}
    for path in paths:
        try:
            record = _read_record(path)
        except CheckpointError as error:
            logging.warning("Checkpoint %s has no readable evaluation loss: %s", path, error)
            continue
        if record.eval_loss is not None:
            losses[path] = record.eval_loss
    return losses


# Names of leaves.


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` in order, by names such as `params.layers.0.kernel`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same name; a key with a dot in it?")
    return named


def _describe(x: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
