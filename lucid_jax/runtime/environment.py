"""On what a number was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence

import jax


def environment(packages: Sequence[str] = ()) -> dict[str, object]:
    """Device, versions and date, as they are written beside results.

    Args:
      packages: Whose versions are told beside those of jax and numpy.
    """
    names = ("jax", "jaxlib", "numpy", *packages)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "date": datetime.date.today().isoformat(),
    }
