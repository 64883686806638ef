"""The record of a checkpoint: all of it but its arrays, as JSON, one file a process.

A checksum of each array is in it, and a checksum of the record in its file.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


@dataclasses.dataclass(frozen=True)
class Record:
    """All of a checkpoint but its arrays. Processes differ in `data_state` only.

    An `eval_loss` that came later is in that of process 0 alone.
    """

    step: int
    process_count: int
    # By name of the array: "float32[8,4]", and its checksum.
    arrays: dict[str, str]
    checksums: dict[str, int]
    config: dict
    data_state: dict[str, Any]
    eval_loss: float | None


def encode(record: Record) -> str:
    """The text of its file, with a checksum."""
    body = dataclasses.asdict(record)
    return json.dumps({"crc32": _crc32(body), "record": body}, indent=1)


def add_eval_loss(directory: epath.Path, loss: float) -> None:
    """Writes a loss into the record in `directory`, which at any moment is whole."""
    path = directory / _file(0)
    partial = path.with_suffix(".partial")
    partial.write_text(encode(dataclasses.replace(_decode(path.read_text()), eval_loss=loss)))
    partial.replace(path)


def _file(process: int) -> str:
    return f"process_{process}.json"


def _decode(text: str) -> Record:
    content = json.loads(text)
    if content["crc32"] != _crc32(content["record"]):
        raise ValueError("the record does not have the checksum it was written with")
    return Record(**content["record"])


def _crc32(body: dict) -> int:
    return zlib.crc32(json.dumps(body).encode())


class RecordHandler(ocp.CheckpointHandler):
    """Each process writes its own record; all records are read, on however many processes."""

    def save(self, directory: epath.Path, args: RecordArgs) -> None:
        """Writes the file of this process."""
        (directory / _file(jax.process_index())).write_text(args.text)

    def restore(self, directory: epath.Path, args: None = None) -> Record:
        """The record, with the data state of all processes together.

        Raises:
          Exception: of any kind, on files that are missing, cut short or altered.
        """
        records = [_decode(path.read_text()) for path in sorted(directory.glob("process_*.json"))]
        if not records or len(records) != records[0].process_count:
            raise FileNotFoundError(f"{directory} lacks files: {len(records)} are left")
        data_state = {shard: x for record in records for shard, x in record.data_state.items()}
        return dataclasses.replace(records[0], data_state=data_state)


@ocp.args.register_with_handler(RecordHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class RecordArgs(ocp.args.CheckpointArgs):
    """What orbax passes to `RecordHandler.save`: the text of `encode`."""

    text: str
