"""The configurations that the package carries, for users without a clone."""

import os
import pathlib
import sys
import types

_ROOT = pathlib.Path(__file__).resolve().parents[1] / "shipped"


def locate(path: str | os.PathLike) -> str | os.PathLike:
    """Returns the path of a user's file, or of the shipped one if a user has no `configs/…` there.

    The file can import modules of `configs`: a user's own, and the shipped ones where they are not
    shadowed. A shipped file imports shipped ones in any case.
    """
    own = pathlib.Path(path)
    shipped = _ROOT / own
    if own.is_file() or own.parts[:1] != ("configs",) or not shipped.is_file():
        if str(_ROOT) not in sys.path:
            sys.path.append(str(_ROOT))
        return path
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules["configs"] = package = types.ModuleType("configs")
    package.__path__ = [str(_ROOT / "configs")]
    return shipped
