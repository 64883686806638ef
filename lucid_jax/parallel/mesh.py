"""The device mesh, and the rules from logical axes to mesh axes.

Parameters and activations name their axes by meaning; only this file maps them to devices.
Nothing is global: a `Layout` is made once and passed down.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lucid_jax.config import MESH_AXES, Config, ConfigError, MeshConfig
from lucid_jax.parallel.stripes import Stripes

_RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "sequence": "context",
    # Parameters: fsdp axes are gathered before use, tensor axes stay sharded in the product.
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding of logical axes over a mesh with the axes of `MESH_AXES`.

    Where `context` shards sequences, their blocks have `stripe` tokens.
    """

    mesh: Mesh
    stripe: int

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Maps logical axes to mesh axes; None and names without a rule are replicated."""
        return PartitionSpec(*(_RULES.get(axis) if axis else None for axis in axes))

    def mesh_axis(self, axis: str) -> str | None:
        """Returns the mesh axis that shards a logical axis, None if it is not sharded."""
        name = _RULES.get(axis)
        assert name is None or isinstance(name, str), axis
        return name if name and self.mesh.shape[name] > 1 else None

    def stripes(self, length: int) -> Stripes:
        """Returns the order of the tokens of a sequence of this length."""
        return Stripes(length, self.mesh.shape["context"], self.stripe)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Fixes the sharding of an activation under jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def shard_map(
        self,
        f: Callable,
        in_axes: tuple[Any, ...],
        out_axes: Any,
    ) -> Callable:
        """Maps `f` over the shards of its arguments, each described by its logical axes.

        The axes of a tree of arrays are a tree of tuples, or one tuple for all of its arrays.
        """

        def specs(axes: Any) -> Any:
            return jax.tree.map(lambda names: self.spec(*names), axes, is_leaf=_are_names)

        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=specs(in_axes),
            out_specs=specs(out_axes),
            # The check has no rule for loops with data-dependent trip counts.
            check_vma=False,
        )


def _are_names(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(name is None or isinstance(name, str) for name in axes)


def make_layout(config: Config, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Makes a mesh of the configured shape, by default of all devices of all processes.

    Raises:
      ConfigError: the mesh does not fit the devices, or does not divide the model or the batch.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _resolve(config.mesh, len(devices))
    split = dict(zip(MESH_AXES, sizes))
    model = config.model
    batch_shards = split["data"] * split["fsdp"]
    # A pair of heads stays on one device.
    paired = "differential" in model.layer_kinds
    for name, value, axes, parts in (
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", split["tensor"]),
        ("pairs of KV heads", model.num_kv_heads // 2 if paired else 0, "mesh.tensor",
         split["tensor"]),
        ("model.mlp_dim", model.mlp_dim, "mesh.tensor", split["tensor"]),
        ("model.vocab_size", model.vocab_size, "mesh.tensor", split["tensor"]),
        ("model.embed_dim", model.embed_dim, "mesh.fsdp", split["fsdp"]),
        ("batch_size / accumulation", config.batch_size // config.accumulation,
         "mesh.data × mesh.fsdp", batch_shards),
    ):  # fmt: skip
        if value % parts:
            raise ConfigError(f"{axes} = {parts} does not divide {name} = {value}")
    _check_stripes(config, split)
    mesh = Mesh(arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    layout = Layout(mesh, config.mesh.stripe)
    length = config.data.sequence_length
    size = layout.stripes(length).size
    if size > 1.1 * length:
        logging.warning(
            "sequences of %d tokens are padded to %d, a multiple of mesh.context × mesh.stripe"
            " = %d",
            length, size, split["context"] * config.mesh.stripe,
        )  # fmt: skip
    return layout


def arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices as an array, with neighbours of a torus along its last axes."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # No product of the axes of the torus has the size of an axis of the mesh.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _check_stripes(config: Config, split: dict[str, int]) -> None:
    """Raises where sequences are sharded in stripes and the implementation has none."""
    implementation, stripe = config.model.implementation, config.mesh.stripe
    heads = config.model.num_kv_heads // split["tensor"]
    if heads % split["context"] == 0:
        return  # Every device gets whole sequences of some heads.
    for field, value, whole in (
        ("implementation", implementation, ("reference", "mosaic_gpu")),
        ("positions", config.model.positions, ("path",)),
    ):
        if value in whole:
            raise ConfigError(
                f"model.{field}={value!r} needs mesh.context = {split['context']} to divide"
                f" model.num_kv_heads / mesh.tensor = {heads}"
            )
    if implementation in ("triton", "mosaic_tpu") and stripe % 128:
        raise ConfigError(
            f"model.implementation={implementation!r} needs a mesh.stripe that 128 divides;"
            f" got {stripe}"
        )


def _resolve(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes, with -1 replaced by the devices that are left."""
    fixed = math.prod(n for n in config.sizes if n != -1)
    sizes = tuple(devices // fixed if n == -1 else n for n in config.sizes)
    if math.prod(sizes) != devices:
        expected = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, config.sizes))
        raise ConfigError(f"a mesh of {expected} does not fit {devices} devices")
    return sizes
