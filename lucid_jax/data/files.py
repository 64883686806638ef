"""The files that a path, folder or glob names, and what compressed ones hold."""

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from absl import logging

from lucid_jax.config import ConfigError
from lucid_jax.data.documents import BadDocumentError
from lucid_jax.runtime.workdir import user_cache

# pyarrow's names of the compressions, by the endings of files.
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_files(
    path: str, ending: str | tuple[str, ...] = "", skip: Container[str] = ()
) -> list[Path]:
    """Returns the files that `path` names: a file, those below a folder at any depth, or a glob's.

    Args:
      ending: what the names of files below a folder must end with, or several of it.
      skip: names of folders below a folder that are not searched.

    Returns:
      At least one file, sorted, so that every machine numbers documents alike. Hidden files
      and folders below a folder are left out.

    Raises:
      ConfigError: nothing matches `path`, or no such file is below the folder.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        files = [Path(name) for name in glob.glob(path, recursive=True)]
        problem = f"no such file, folder or pattern: {path!r}"
    else:
        files = []
        for folder, folders, names in os.walk(root):
            folders[:] = (x for x in folders if not x.startswith(".") and x not in skip)
            files += (
                Path(folder, x) for x in names if x.endswith(ending) and not x.startswith(".")
            )
        endings = ending if isinstance(ending, str) else ", ".join(ending)
        problem = f"no {endings or 'visible'} files below the folder {path!r}"
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise ConfigError(problem)
    return files


def without_compression(name: str) -> str:
    """Returns a file's name without the ending of a compression that is read here."""
    stem, ending = os.path.splitext(name)
    return stem if ending in _COMPRESSIONS else name


def read_file(file: Path) -> bytes:
    """Returns the content of a file, decompressed if it ends in .gz or .zst.

    Raises:
      BadDocumentError: the file is not compressed as its name says, or is cut short.
    """
    if file.suffix not in _COMPRESSIONS:
        return file.read_bytes()
    with _open_compressed(file) as stream:
        try:
            return stream.read()
        except OSError as error:
            raise BadDocumentError(f"{file} cannot be decompressed: {error}") from error


def uncompressed_file(file: Path) -> Path:
    """Returns `file`, or a copy of its content in the user's cache if it ends in .gz or .zst.

    A compressed file can only be read from its start. The copy is made once, and anew for a file
    of another size or time of change.

    Raises:
      ConfigError: the file is not compressed as its name says, or the copy cannot be written.
    """
    if file.suffix not in _COMPRESSIONS:
        return file
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = user_cache() / "uncompressed"
    copy = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{file.stem}"
    if copy.exists():
        return copy
    logging.info("decompressing %s to %s", file, copy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed once complete, so that a kill leaves no half, and processes do not meet.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
            try:
                with _open_compressed(file) as stream:
                    shutil.copyfileobj(stream, partial, 1 << 24)
                partial.flush()
                os.replace(partial.name, copy)
            except BaseException:
                os.unlink(partial.name)
                raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be decompressed into {folder}: {error}") from error
    return copy


def _open_compressed(file: Path) -> Any:
    """Returns the decompressed stream, a context."""
    import pyarrow as pa

    return pa.input_stream(str(file), compression=_COMPRESSIONS[file.suffix])
