"""A record of the device and the software versions that a result was measured with."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence

import jax


def environment(packages: Sequence[str] = ()) -> dict[str, object]:
    """Returns the device, the date, and the versions of jax, numpy and `packages`."""
    names = ("jax", "jaxlib", "numpy", *packages)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "date": datetime.date.today().isoformat(),
    }
