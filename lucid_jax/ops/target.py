"""The device that a call is compiled for, which need not be in this machine.

A program can be compiled for a mesh of devices that are described but not there
(`jax.experimental.topologies`), so the mesh that a call is traced under comes first.
"""

from __future__ import annotations

import jax


def platform() -> str:
    """Returns `"cpu"`, `"gpu"` or `"tpu"`, by the current mesh or else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Returns the kind of device, such as `"NVIDIA H200"`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def core_count() -> int:
    """Returns the number of multiprocessors of the GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.num_cores if device else jax.devices()[0].core_count
