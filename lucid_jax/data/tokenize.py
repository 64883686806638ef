"""Tokenises a source into ArrayRecord files, so that training does not have to.

    python -m lucid_jax.data.tokenize --input=jsonl:corpus/ --tokenizer=tokenizer.json \\
        --output=corpus-tokens

It uses every core, and the same command goes on after a kill. Then train with
data.train=arrayrecord:corpus-tokens and the same data.tokenizer. Documents keep their order, so
data.holdout keeps out the same ones as in the original source; one that cannot be read becomes
an empty one.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lucid_jax.config import BAD_LINE_ACTIONS, ConfigError
from lucid_jax.data.arrayrecord import ENDING, TokensMetadata
from lucid_jax.data.bad_lines import describe_skipped
from lucid_jax.data.documents import Completion
from lucid_jax.data.shard_writer import Shard, ShardWriter, start_writer, write_shard
from lucid_jax.data.sources import SourceSpec, open_source
from lucid_jax.data.tokenizer import fingerprint, load_tokenizer
from lucid_jax.runtime.progress import Progress
from lucid_jax.runtime.workdir import write_json

# Bytes of a source that become a file, by default, and that are worth a process.
_SHARD_BYTES = 1 << 27
_PROCESS_BYTES = 1 << 24


def tokenize(
    source_spec: SourceSpec,
    tokenizer_spec: str,
    output: Path,
    *,
    text_field: str = "text",
    on_bad_line: str = "skip",
    shards: int | None = None,
    processes: int | None = None,
) -> TokensMetadata:
    """Writes the tokens of a source to `output`, which appears once it is complete.

    Until then `<output>.unfinished` has the finished files; the same call goes on with them after
    a kill, and removes those of another call.

    Args:
      shards: The number of files, each of consecutive documents; by default one per 128 MB of the
        source.
      processes: The number of processes, but no more than missing files; by default one per core,
        and at most one per 16 MB of the source.

    Returns:
      The content of the metadata file.

    Raises:
      ConfigError: `output` exists or is being written, or the source is tokenised already or
        cannot be read.
    """
    if source_spec.kind == "arrayrecord":
        raise ConfigError(f"{source_spec.path} is already tokenised")
    if output.exists():
        raise ConfigError(f"{output} already exists: remove it or choose another output")
    tokenizer = load_tokenizer(tokenizer_spec)
    source = open_source(source_spec, text_field)
    statuses = [(str(file), file.stat()) for file in source_spec.files()]
    size = sum(status.st_size for _, status in statuses)
    shards = shards or -(-size // _SHARD_BYTES) or 1
    request = {
        "files": [[name, status.st_size, status.st_mtime_ns] for name, status in statuses],
        "tokenizer": fingerprint(tokenizer_spec),
        "text_field": text_field,
        "on_bad_line": on_bad_line,
        "shards": shards,
    }
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    if isinstance(source[0], Completion):
        # The tokens of prompts are negative.
        dtype = "int32"
    context = multiprocessing.get_context("spawn")
    writer = ShardWriter(
        source=source,
        name=source_spec.name,
        tokenizer=tokenizer_spec,
        dtype=dtype,
        on_bad_line=on_bad_line,
        stop=context.Event(),
        counts=context.Array("q", 2),
    )
    with _unfinished(output, request) as directory:
        tokens_directory = directory / "tokens"
        tokens_directory.mkdir(exist_ok=True)
        bounds = [len(source) * shard // shards for shard in range(shards + 1)]
        parts = [
            Shard(
                start, stop,
                tokens_directory / f"tokens-{shard:05d}-of-{shards:05d}{ENDING}",
                directory / f"{shard:05d}.json",
            )
            for shard, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]  # fmt: skip
        missing = [part for part in parts if not part.result()]
        if len(missing) < shards:
            _say(f"{shards - len(missing)} of {shards} files are there already")
        processes = processes or min(os.cpu_count() or 1, -(-size // _PROCESS_BYTES) or 1)
        _write(writer, missing, min(processes, len(missing)))
        for leftover in tokens_directory.glob("*.partial-*"):
            leftover.unlink()
        results = [result for part in parts if (result := part.result())]
        metadata = TokensMetadata(
            dtype=writer.dtype,
            vocab_size=tokenizer.vocab_size,
            documents=len(source),
            tokens=sum(tokens for tokens, _ in results),
            tokenizer=Path(tokenizer_spec).name,
            tokenizer_fingerprint=fingerprint(tokenizer_spec),
        )
        metadata.write(tokens_directory)
        tokens_directory.rename(output)
    found = [message for _, messages in results for message in messages]
    if skipped := describe_skipped(source_spec.name, found):
        _say(skipped)
    return metadata


@contextlib.contextmanager
def _unfinished(output: Path, request: dict[str, Any]) -> Iterator[Path]:
    """Yields the directory of an unfinished request, and removes it if the block succeeds.

    What it holds of another request is removed first. Raises ConfigError if another process is
    in this block.
    """
    directory = output.with_name(f"{output.name}.unfinished")
    directory.mkdir(parents=True, exist_ok=True)
    # The lock of a killed process is released, and the file is then empty or sound.
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing {output}") from error
        saved = directory / "request.json"
        if not saved.exists() or json.loads(saved.read_text()) != request:
            for path in directory.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(saved, request)
        yield directory
        shutil.rmtree(directory)


def _write(writer: ShardWriter, shards: Sequence[Shard], processes: int) -> None:
    """Writes shards in several processes; an interruption ends those first."""
    if not shards:
        return
    executor: futures.Executor
    if processes == 1:
        executor = futures.ThreadPoolExecutor(1, initializer=start_writer, initargs=(writer,))
    else:
        executor = futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), start_writer, (writer,)
        )
    documents = sum(shard.stop - shard.start for shard in shards)
    progress, counted = Progress("tokenising", documents, "documents", _say), 0
    with executor:
        # Ctrl-C reaches every process of a terminal: the new ones inherit that it is blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pending = {executor.submit(write_shard, shard) for shard in shards}
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while pending:
                done, pending = futures.wait(pending, timeout=1)
                for future in done:
                    future.result()
                total, tokens = writer.counts[:]
                if total > counted:
                    progress.add(total - counted, note=f", {tokens:,} tokens")
                counted = total
        except BrokenProcessPool as error:
            raise ConfigError(
                "a process was killed, perhaps for its memory; the same command goes on, perhaps"
                " with fewer --processes"
            ) from error
        finally:
            writer.stop.set()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; user errors exit with one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m lucid_jax.data.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        help="a source as in data.train, such as text:books/ or corpus.jsonl",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="as data.tokenizer: 'bytes', a tokenizers .json file or a SentencePiece model",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="the folder to create; it must not exist"
    )
    parser.add_argument(
        "--shards", type=int, help="number of files to write (default: one per 128 MB of the input)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="number of processes, each of which writes a file at a time (default: one per core)",
    )
    parser.add_argument(
        "--on_bad_line",
        choices=BAD_LINE_ACTIONS,
        default="skip",
        help="what to do with a document that cannot be read, as data.on_bad_line (default: skip)",
    )
    parser.add_argument(
        "--text_field",
        default="text",
        help="key or column that holds the text in jsonl and parquet sources (default: text)",
    )
    arguments = parser.parse_args(argv)
    for name in ("shards", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be positive; got {value}")
    try:
        tokenize(
            SourceSpec.parse(arguments.input),
            arguments.tokenizer,
            arguments.output,
            text_field=arguments.text_field,
            on_bad_line=arguments.on_bad_line,
            shards=arguments.shards,
            processes=arguments.processes,
        )
    except (ConfigError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on\n")
    print(f"data.train=arrayrecord:{arguments.output}")


if __name__ == "__main__":
    main()
