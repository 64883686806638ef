"""The record of a checkpoint: everything but the contents of its arrays, as JSON.

Each process writes one file. A record has a checksum of every array, and its file has a
checksum of the record.
"""

import dataclasses
import json
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything in a checkpoint but the arrays. Only `data_state` differs between processes.

    Attributes:
      process_count: Number of processes that wrote the checkpoint.
      arrays: Dtype and shape of each array by its name, as `"float32[8,4]"`.
      checksums: Checksum of each array by its name.
      data_state: State of the data loader by shard.
      eval_loss: Evaluation loss at this step, None if it was not evaluated.
    """

    step: int
    process_count: int
    arrays: dict[str, str]
    checksums: dict[str, int]
    config: dict
    data_state: dict[str, Any]
    eval_loss: float | None


def encode(record: Record) -> str:
    """Returns the text of a record's file."""
    body = dataclasses.asdict(record)
    return json.dumps({"crc32": _crc32(body), "record": body}, indent=1)


def _decode(text: str) -> Record:
    content = json.loads(text)
    if content["crc32"] != _crc32(content["record"]):
        raise ValueError("the record does not have the checksum it was written with")
    return Record(**content["record"])


def _crc32(body: dict) -> int:
    return zlib.crc32(json.dumps(body).encode())


class RecordHandler(ocp.CheckpointHandler):
    """Writes the record of this process; reads those of all processes that wrote one."""

    def save(self, directory: epath.Path, args: "RecordArgs") -> None:
        """Writes the file of this process."""
        (directory / f"process_{jax.process_index()}.json").write_text(args.text)

    def restore(self, directory: epath.Path, args: None = None) -> Record:
        """Returns the record, with the data states of all processes merged.

        Raises:
          Exception: a file is missing, cut short or altered; the type varies.
        """
        records = [_decode(path.read_text()) for path in sorted(directory.glob("process_*.json"))]
        if not records or len(records) != records[0].process_count:
            raise FileNotFoundError(f"{directory} lacks files: it has {len(records)}")
        data_state = {shard: x for record in records for shard, x in record.data_state.items()}
        return dataclasses.replace(records[0], data_state=data_state)


@ocp.args.register_with_handler(RecordHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class RecordArgs(ocp.args.CheckpointArgs):
    """The argument that orbax passes to `RecordHandler.save`: the text from `encode`."""

    text: str


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` in order, by names such as `params.layers.0.kernel`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same name; a key with a dot in it?")
    return named


def describe_array(x: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Returns dtype and shape as `"float32[8,4]"`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
