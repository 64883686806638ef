"""The device that a call is compiled for, which need not be one of this machine."""

from __future__ import annotations

import jax


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: of the mesh that the call is traced under, else the default.

    A program can be compiled for a mesh of devices that are described but not there
    (`jax.experimental.topologies`); the default backend says nothing of those.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Such as `"NVIDIA H200"`: likewise."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
