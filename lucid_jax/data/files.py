"""The files that a path, folder or glob names."""

import glob
import os
from collections.abc import Container
from pathlib import Path

from lucid_jax.config import ConfigError


def find_files(path: str, ending: str = "", skip: Container[str] = ()) -> list[Path]:
    """Returns the files that `path` names: a file, those below a folder at any depth, or a glob's.

    Args:
      ending: what the names of files below a folder must end with.
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
        problem = f"no {ending or 'visible'} files below the folder {path!r}"
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise ConfigError(problem)
    return files
