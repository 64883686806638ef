"""Saves the state of a run and restores it, so that the run goes on as if never stopped.

Orbax writes checkpoints asynchronously, one directory a step, which gets its final name only
when it is complete:

    <directory>/1000/state/   the arrays, by flat names such as `params.embed.kernel`
    <directory>/1000/record/  JSON, one file a process: see `checkpoint/record.py`
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lucid_jax.checkpoint.checksum import checksums
from lucid_jax.checkpoint.reader import (
    RECORD,
    STATE,
    CheckpointError,
    absolute_path,
    eval_losses,
    read_checkpoint,
    read_first_sound,
    step_paths,
)
from lucid_jax.checkpoint.record import Record, RecordArgs, describe_array, encode, named_leaves
from lucid_jax.checkpoint.retention import LowestLossN, hide_orbax_chatter
from lucid_jax.config import CheckpointConfig, Config
from lucid_jax.runtime.workdir import save_config

PyTree = Any

# Limits on the bytes that orbax encodes, and writes, at one time. Without them it holds all
# encoded arrays in memory before it writes the first.
_CHUNK_BYTES = 64 * 2**20
_FILE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Restored:
    """The arguments that `Checkpointer.save` had at `step`; `data_state` is of all processes."""

    step: int
    state: PyTree
    data_state: dict[str, Any]
    config: dict
    eval_loss: float | None


class Checkpointer:
    """Saves and restores the state of a run in `directory`, to which nothing else writes.

    Every process of the run makes the same calls in the same order. Use it as a context: the
    end waits for pending writes and raises the error of one that failed.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
        """Creates `directory` if needed and removes unfinished saves from it."""
        hide_orbax_chatter()
        self._directory = absolute_path(directory)
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        losses = eval_losses(step_paths(self._directory))
        # By step; `save` adds to it and the preservation policy reads it.
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
        """Starts to write checkpoint `step`; does nothing if it exists.

        Returns once the buffers of `state` may be donated or overwritten; the writing continues
        in the background. The next call raises the error of a write that failed.

        Args:
          step: Number of the checkpoint, not below that of any other one here.
          state: Pytree of jax.Array, of any shapes, dtypes and shardings.
          data_state: JSON values by shard of the data; each process gives its own shards.
          config: JSON values, the same on every process.
          eval_loss: Ranks the best checkpoints; None or NaN is never best.

        Raises:
          CheckpointError: there is a checkpoint of a later step, so this run did not start
            from it and must not mix with it.
        """
        steps = self._manager.all_steps()
        if step in steps:
            logging.info("Checkpoint %d is there already; not saved again", step)
            return
        if steps and step < max(steps):
            raise CheckpointError(
                f"cannot save step {step}: {self._directory} holds the later step {max(steps)}"
            )
        arrays = named_leaves(state)
        record = Record(
            step=step,
            process_count=jax.process_count(),
            arrays={name: describe_array(x) for name, x in arrays.items()},
            checksums=checksums(arrays),
            config=config,
            data_state=data_state,
            eval_loss=None if eval_loss is None or math.isnan(eval_loss) else eval_loss,
        )
        if record.eval_loss is not None:
            self._eval_losses[step] = record.eval_loss
        items = {
            STATE: ocp.args.PyTreeSave(
                arrays,
                dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)),
                ocdbt_target_data_file_size=_FILE_BYTES,
            ),
            RECORD: RecordArgs(encode(record)),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """Restores the newest checkpoint that is not damaged; returns None if there is none.

        Damaged ones are logged and, once a sound one is found, renamed to `<step>.damaged`, so
        that their steps can be saved again.

        Args:
          abstract_state: Pytree of jax.ShapeDtypeStruct with the structure of the saved state.
            The arrays are restored to its shardings, on any mesh, and may be donated.

        Raises:
          ConfigError: the checkpoint holds other leaves, shapes or dtypes.
          CheckpointError: there are checkpoints and all are damaged.
        """
        self._manager.wait_until_finished()
        paths = step_paths(self._directory)
        if not paths:
            return None
        abstract = named_leaves(abstract_state)
        (record, arrays), damaged = read_first_sound(
            paths, lambda path: read_checkpoint(path, abstract)
        )
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
        # A manager keeps the list of steps that it found when it was opened.
        self._manager = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()


def checkpoint_directory(workdir: str | os.PathLike) -> epath.Path:
    """Returns the directory of a run's checkpoints, below its work directory."""
    return epath.Path(workdir) / "checkpoints"


def save_params(workdir: pathlib.Path, config: Config, step: int, params: PyTree) -> None:
    """Makes a work directory with one checkpoint that holds parameters alone.

    Other runs evaluate it, generate with it, or start from it with `checkpoint.init_from`.
    """
    with Checkpointer(checkpoint_directory(workdir), config.checkpoint) as checkpointer:
        checkpointer.save(
            step, {"params": params}, data_state={}, config=config.to_dict(), eval_loss=None
        )
    save_config(workdir, config)
