"""Writes the tokens of part of a source into one ArrayRecord file, in one of several processes."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import threading
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lucid_jax.config import ConfigError
from lucid_jax.data.bad_lines import BadLines
from lucid_jax.data.documents import Source
from lucid_jax.data.tokenizer import Tokenizer, encode_document, load_tokenizer
from lucid_jax.runtime.workdir import write_json


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Holds what all processes that write shards share.

    Attributes:
      name: The source's, for messages.
      dtype: Of a token in the files; unsigned ones hold no prompts.
      on_bad_line: As in `DataConfig`; a skipped document becomes an empty one, so that the
        others keep their numbers.
      stop: Set to end all processes early.
      counts: Documents and tokens written so far, of all processes.
    """

    source: Source
    name: str
    tokenizer: str
    dtype: str
    on_bad_line: str
    stop: Event
    counts: SynchronizedArray


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents `start` to `stop - 1`, their file, and the file for what `write_shard` found."""

    start: int
    stop: int
    file: Path
    result_file: Path

    def result(self) -> tuple[int, list[str]] | None:
        """Returns the tokens and the messages of skipped documents, or None if unfinished."""
        if not self.result_file.exists():
            return None
        result = json.loads(self.result_file.read_text())
        return result["tokens"], result["skipped"]


_started: tuple[ShardWriter, Tokenizer] | None = None
# Documents between two additions to the counts that all processes share.
_COUNTED = 64


def start_writer(writer: ShardWriter) -> None:
    """Prepares this process, or thread, for `write_shard`."""
    global _started
    _started = writer, load_tokenizer(writer.tokenizer)
    if parent := multiprocessing.parent_process():
        # A killed parent cannot tell its children to end.
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


def write_shard(shard: Shard) -> None:
    """Writes the file of a shard and then its result; returns without them if told to stop.

    Raises:
      ConfigError: a bad document is not to be skipped, a prompt is where none is expected, or the
        file cannot be written.
    """
    assert _started is not None
    try:
        _write(shard, *_started)
    except RuntimeError as error:
        # ArrayRecord raises no narrower class, for instance for a full disk.
        raise ConfigError(f"{shard.file} cannot be written: {error}") from error
    finally:
        if not shard.result():
            _started[0].stop.set()


def _write(shard: Shard, writer: ShardWriter, tokenizer: Tokenizer) -> None:
    bad_lines = BadLines(writer.name, writer.on_bad_line)
    dtype = np.dtype(writer.dtype).newbyteorder("<")
    total = counted = 0
    partial = shard.file.with_suffix(f".partial-{os.getpid()}")
    # Groups of one, because reading a record decompresses its whole group.
    with contextlib.closing(ArrayRecordWriter(str(partial), "group_size:1")) as file:
        for index in range(shard.start, shard.stop):
            if writer.stop.is_set():
                return
            document = bad_lines.read(writer.source, index)
            empty = np.zeros(0, np.int32)
            tokens = empty if document is None else encode_document(tokenizer, document)
            if dtype.kind == "u" and (tokens < 0).any():
                raise ConfigError(
                    f"document {index} of {writer.name} is a prompt with a completion, but the"
                    " first is a text: tokenise them apart"
                )
            file.write(tokens.astype(dtype).tobytes())
            total += len(tokens)
            number = index + 1 - shard.start
            if number % _COUNTED == 0 or index + 1 == shard.stop:
                with writer.counts.get_lock():
                    writer.counts[0] += (number - 1) % _COUNTED + 1
                    writer.counts[1] += total - counted
                counted = total
    partial.replace(shard.file)
    write_json(shard.result_file, {"tokens": total, "skipped": bad_lines.found()})
