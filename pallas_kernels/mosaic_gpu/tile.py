"""Helpers of the kernels: sizes of tiles, buffers in shared memory, and groups of warps.

Two groups of four warps compute 64 rows each, a third one copies. The groups that compute wait for
a buffer to be full, the one that copies for it to be free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of a block, columns of a tile, and groups of warps that compute.
ROWS, COLUMNS, GROUPS = 128, 64, 2
# Rows of a group, and tiles of columns in a block.
HALF, TILES = ROWS // GROUPS, ROWS // COLUMNS
# The exponent of the least power of two that is a normal number with a normal inverse.
SMALLEST_POWER = -126
# Registers of a thread that computes and of one that copies; 65,536 are shared by all.
_COMPUTING, _COPYING = 232, 40


def buffer(*shape: int, dtype: jax.typing.DTypeLike) -> Any:
    """Returns the type of a buffer whose rows matrix units read."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(count: int, arrivals: int = 1) -> plgpu.Barrier:
    """Returns the type of a barrier for each of `count` buffers."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def rows_of(group: jax.Array) -> Any:
    """Returns the rows of a block that a group of warps computes."""
    return pl.ds(group * HALF, HALF)


def dot_rows(a: Any, b: Any) -> jax.Array:
    """Returns `a bᵀ` in float32, of rows in shared memory."""

    def multiply(total):
        plgpu.wgmma(total, a, b.transpose((1, 0)))
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def same_segment(
    ref: Any, b: Any, row: jax.Array, column: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Returns which rows and columns are of one segment, from ids `[B,S]` in global memory."""
    load: Any = plgpu.load  # The type is that of jax 0.10, which these kernels do not take.

    def ids(start, axis):
        rows = pl.ds(start, shape[axis])
        found = load(ref.at[b, rows], layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
        return jax.lax.broadcast_in_dim(found, shape, (axis,))

    # The limit only makes equal rows and columns two loads, because one load has one layout.
    return ids(row, 0) == ids(jnp.minimum(column, ref.shape[1] - shape[1]), 1)


def power(e: jax.Array) -> jax.Array:
    """Returns `2^e` in float32, for exponents from −126 to 126; others are taken as these."""
    return jnp.exp2(jnp.clip(e, SMALLEST_POWER, -SMALLEST_POWER).astype(jnp.float32))


def add_product(total: jax.Array, a: Any, b: Any, interpret: Any) -> jax.Array:
    """Returns `total + a b`, when it is complete."""
    if not interpret:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))

    # The interpreter takes no accumulator that starts from a value.
    def multiply(product):
        plgpu.wgmma(product, a, b)
        return product[...]

    rows, columns = total.shape
    return total + pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))


def store(ref: Any, x: jax.Array) -> None:
    """Stores registers in global memory."""
    if hasattr(plgpu, "store"):
        # jax 0.12 takes a store of half sectors only where it is told so.
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def store_sizes(x: jax.Array, ref: Any) -> None:
    """Stores the size of the largest finite entry of each row of `x [R/2,W]`, float32, as bits."""
    size = jnp.abs(x)
    bits = jax.lax.bitcast_convert_type(jnp.where(size < jnp.inf, size, 0.0), jnp.int32)
    ref[...] = jnp.max(bits, axis=1)


def load_exponent(ref: Any) -> jax.Array:
    """Returns the least e such that no stored size reaches `2^e`; −126 for sizes of 0."""
    # In this layout every warp holds all entries. A reduction across warps would use memory that
    # both groups share. Numbers that are not negative are ordered as their bits are.
    load: Any = plgpu.load  # The type is that of jax 0.10, which these kernels do not take.
    bits = load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
    return (jnp.max(bits) >> 23) + SMALLEST_POWER


def operand(x: jax.Array, scratch: Any) -> Any:
    """Returns `x` as the left operand of a product.

    The interpreter takes no operand from registers, so that there it goes through a buffer.
    """
    if scratch is None:
        return x
    scratch[...] = x
    plgpu.commit_smem()
    return scratch


def wait_for(semaphore: Any, value: jax.Array) -> None:
    """Waits for so many signals of other programs, whose copies later copies can then read."""
    plgpu.semaphore_wait(semaphore, value, decrement=False, memory_scope="gpu")
    _order_copies()


@plgpu.inline_mgpu()
def _order_copies(_) -> None:
    # The wait is not ordered with copies by the copy engine, which is another proxy in PTX's terms.
    mosaic: Any = utils  # jax 0.10, which has other names, does not take these kernels.
    mosaic.inline_ptx("fence.proxy.async.global;", has_side_effects=True)


def run(
    body: Callable[..., None],
    out_shape: Any,
    grid: tuple[int, ...],
    scratch: Sequence,
    interpret: Any,
    name: str,
) -> Callable[..., Any]:
    """Returns a call of a kernel; `body` takes the arrays, the group of warps and the scratch.

    The call takes None for missing arrays, and the body gets None then. The last scratch is what
    `operand` needs in the interpreter, and None on a GPU. Axes of the grid are `axis0` and so on.
    """
    names = tuple(f"axis{i}" for i in range(len(grid)))
    operands = buffer(GROUPS, HALF, COLUMNS, dtype=scratch[0].dtype) if interpret else None

    def call(*arrays):
        def entry(*refs):
            given = iter(refs)
            inputs = [None if x is None else next(given) for x in arrays]

            def with_scratch(*scratch):
                body(*inputs, *given, jax.lax.axis_index("group"), *scratch)

            pl.run_scoped(with_scratch, *scratch, operands, collective_axes="group")

        # The compiler names the kernel after the function.
        entry.__name__ = name
        kernel = plgpu.kernel(
            entry, out_type=out_shape, grid=grid, grid_names=names, num_threads=GROUPS + 1,
            thread_name="group",
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        )  # fmt: skip
        return kernel(*(x for x in arrays if x is not None))

    return call


def as_group(
    group: jax.Array, *, computes: bool, interpret: Any
) -> Callable[[Callable[[], None]], None]:
    """Runs the decorated function in the groups that compute, or in the one that copies."""

    def decorate(f: Callable[[], None]) -> None:
        def run() -> None:
            if not interpret:
                if computes:
                    plgpu.set_max_registers(_COMPUTING, action="increase")
                else:
                    plgpu.set_max_registers(_COPYING, action="decrease")
            f()

        pl.when((group < GROUPS) == computes)(run)

    return decorate
