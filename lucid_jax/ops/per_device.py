"""Ops inside sharded programs: each device runs the op on its own shards.

JAX types carry a mesh in two ways. Along explicit mesh axes, which `jax.make_mesh` makes since
jax 0.12, the type of an array says how it is sharded; within `jax.shard_map` it says over which
axes the array varies. A loop whose carry starts at zero, a kernel and a library would have to name
both. Instead an op runs in a region where types carry no mesh, and so does its gradient: sequences
and heads do not interact, so no device needs what another one has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_MeshAxes = str | tuple[str, ...]
# Query heads are sharded with the KV heads that they read.
_SHARDED_AS = {"B": "B", "H": "H", "K": "H"}


def per_device(op: Callable, axes: tuple, out_axes: Any, *arguments: Any) -> Any:
    """Returns `op(*arguments)`, computed and differentiated by each device on its own shards.

    Args:
      op: A function of arrays, pytrees of arrays and None.
      axes: The axes of each argument, such as "BSKD", in a pytree of the same structure. Arrays
        may be sharded along B and along their heads, H or K. Query heads may be sharded among
        more devices than there are KV heads, unless the result has an axis K.
      out_axes: The axes of the result, in a pytree of its structure.
      *arguments: What `op` takes.

    Raises:
      ValueError: an array that is sharded along another axis, arrays that are not sharded alike,
        or heads that the devices do not divide.
    """
    leaves, tree = jax.tree.flatten(arguments)
    named = jax.tree.map(
        lambda x, name: x if x is None else name, arguments, axes, is_leaf=lambda x: x is None
    )
    names = jax.tree.leaves(named)
    types = [jax.typeof(x) for x in leaves]
    explicit = [t.sharding.mesh for t in types if t.sharding.mesh.explicit_axes]
    varying = frozenset().union(*(t.manual_axis_type.varying for t in types))
    if explicit:
        mesh, sharded = explicit[0], _shardings(names, leaves)
        specs = [_spec(name, sharded) for name in names]
        devices = math.prod(mesh.shape[axis] for axis in _flat(sharded.get("H", ())))
        for i, (name, x, spec) in enumerate(zip(names, leaves, specs)):
            x = _repeat_kv_heads(name, x, devices)
            leaves[i] = jax.sharding.reshard(x, jax.NamedSharding(mesh, spec))
        out_spec = jax.tree.map(lambda name: _spec(name, sharded), out_axes)
        region = _Region(mesh, sum(map(_flat, sharded.values()), ()), varying)
    elif varying:
        specs, out_spec = [PartitionSpec()] * len(leaves), PartitionSpec()
        region = _Region(jax.sharding.get_abstract_mesh(), (), varying)
    else:
        return op(*arguments)

    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def split(values: Sequence) -> tuple[list, list]:
        floats = [x for x, f in zip(values, is_float) if f]
        return floats, [x for x, f in zip(values, is_float) if not f]

    def run(floats: Sequence, others: Sequence) -> Any:
        rest = iter(floats), iter(others)
        return op(*jax.tree.unflatten(tree, [next(rest[0] if f else rest[1]) for f in is_float]))

    shards = [region.shard(x, spec) for x, spec in zip(leaves, specs)]
    call = _Call(run, region, split(specs), out_spec, split(shards))
    return _run(call, *split([region.vary(x) for x in leaves]))


def _flat(mesh_axes: _MeshAxes) -> tuple[str, ...]:
    return mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)


class _Region(NamedTuple):
    """The devices that run an op.

    Attributes:
      mesh: The mesh of the arrays.
      sharded: The explicit mesh axes that shard any of the arrays.
      varying: The manual mesh axes over which they vary.
    """

    mesh: jax.sharding.AbstractMesh
    sharded: tuple[str, ...]
    varying: frozenset[str]

    @property
    def stacked(self) -> PartitionSpec:
        """The spec of arrays of which each device has its own, stacked along a first axis."""
        return PartitionSpec(self.sharded or None)

    def shard(self, x: jax.Array, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of a device's shard of `x`."""
        shape = x.shape
        if self.sharded:
            shape = jax.NamedSharding(self.mesh, spec).shard_shape(shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def run(self, f: Callable, in_specs: Any, out_specs: Any, *arrays: Any) -> Any:
        """Returns `f(*arrays)`, where the types of arrays carry no mesh."""
        options: dict[str, Any] = {}
        if len(self.mesh.explicit_axes) < len(self.mesh.axis_names):
            options["axis_names"] = set(self.mesh.explicit_axes)

        def enter(*arrays):
            # An operation drops the axes over which the type of its operand varies.
            return f(*jax.tree.map(lambda x: x[None][0], arrays) if self.varying else arrays)

        def run(*arrays):
            return jax.shard_map(
                enter, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False,
                **options,
            )(*arrays)  # fmt: skip

        def run_mapped(size, mapped, *arrays):
            """Runs a mapped axis, which may be sharded too, as the first axis of all arrays."""
            leaves, is_mapped = jax.tree.leaves(arrays), jax.tree.leaves(mapped)
            specs = (jax.typeof(x).sharding.spec[0] for x, m in zip(leaves, is_mapped) if m)
            axis = next((spec for spec in specs if spec is not None), None)

            def with_axis(x, is_mapped):
                return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))

            def with_spec(specs):
                return jax.tree.map(lambda spec: PartitionSpec(axis, *spec), specs)

            out = self.run(
                jax.vmap(f), with_spec(in_specs), with_spec(out_specs),
                *jax.tree.map(with_axis, arrays, tuple(mapped)),
            )  # fmt: skip
            return out, jax.tree.map(lambda _: True, out)

        if self.mesh.explicit_axes:
            run = jax.custom_batching.custom_vmap(run)
            run.def_vmap(run_mapped)

        return jax.tree.map(self.vary, run(*arrays))

    def vary(self, x: jax.Array) -> jax.Array:
        """Marks `x` as varying over the manual axes, along which its gradient is then summed."""
        axes = self.varying - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(axes), to="varying")


class _Call(NamedTuple):
    """A function of float arrays and of others, and where it runs.

    Attributes:
      f: The function.
      region: The devices.
      in_specs: The specs of both arguments.
      out_specs: The specs of the result.
      shards: The shapes and dtypes of both arguments on one device.
    """

    f: Callable
    region: _Region
    in_specs: tuple[Sequence, Sequence]
    out_specs: Any
    shards: tuple[Sequence, Sequence]

    def linearize(self, floats: Sequence, others: Sequence) -> tuple[Any, Callable]:
        """Returns the result, and the function that pulls its cotangent back."""
        return jax.vjp(lambda floats: self.f(floats, others), floats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, floats: Sequence, others: Sequence) -> Any:
    return call.region.run(call.f, call.in_specs, call.out_specs, floats, others)


def _run_fwd(call: _Call, floats: Sequence, others: Sequence) -> tuple[Any, Any]:
    def forward(floats, others):
        out, pull_back = call.linearize(floats, others)
        return out, [x[None] for x in jax.tree.leaves(pull_back)]

    out_specs = call.out_specs, call.region.stacked
    return call.region.run(forward, call.in_specs, out_specs, floats, others)


def _run_bwd(call: _Call, residuals: Sequence, out_bar: Any) -> tuple[Any, None]:
    def backward(residuals, out_bar):
        # Traced again, because the function has types of the mesh that it was traced under.
        _, pull_back = jax.eval_shape(call.linearize, *call.shards)
        return jax.tree.unflatten(jax.tree.structure(pull_back), [x[0] for x in residuals])(out_bar)

    in_specs = call.region.stacked, call.out_specs
    (floats_bar,) = call.region.run(backward, in_specs, (call.in_specs[0],), residuals, out_bar)
    return floats_bar, None


_run.defvjp(_run_fwd, _run_bwd)


def _shardings(names: Sequence[str], leaves: Sequence) -> dict[str, _MeshAxes]:
    """Returns the mesh axes that shard sequences ("B") and heads ("H") of any of the arrays."""
    sharded: dict[str, _MeshAxes] = {}
    for name, x in zip(names, leaves):
        for axis, mesh_axes in zip(name, jax.typeof(x).sharding.spec):
            if mesh_axes is None:
                continue
            if axis not in _SHARDED_AS:
                raise ValueError(
                    f"an array [{','.join(name)}] can be sharded along B and its heads; got {axis}"
                    f" over {mesh_axes!r} (lucid_jax.parallel shards sequences)"
                )
            known = sharded.setdefault(_SHARDED_AS[axis], mesh_axes)
            if known != mesh_axes:
                raise ValueError(
                    f"all arrays must be sharded alike along {axis}; got {known!r}, {mesh_axes!r}"
                )
    return sharded


def _spec(name: str, sharded: dict[str, _MeshAxes]) -> PartitionSpec:
    return PartitionSpec(*(sharded.get(_SHARDED_AS.get(axis, "")) for axis in name))


def _repeat_kv_heads(name: str, x: jax.Array, devices: int) -> jax.Array:
    """Gives each of the devices that share a KV head its own copy."""
    if "K" not in name or x.shape[name.index("K")] % devices == 0:
        return x
    axis = name.index("K")
    if devices % x.shape[axis]:
        raise ValueError(
            f"{devices} devices that shard the heads must divide K or be a multiple of it; got"
            f" K={x.shape[axis]}"
        )
    return jnp.repeat(x, devices // x.shape[axis], axis)
