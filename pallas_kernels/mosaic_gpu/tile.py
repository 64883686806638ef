"""Helpers of the kernels: sizes of tiles, buffers in shared memory, and groups of warps.

Two groups of four warps compute 64 rows each, a third one copies. The groups that compute wait for
a buffer to be full, the one that copies for it to be free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.call import traced_alike

# Rows of a block, groups of warps that compute, and the rows of each.
ROWS, GROUPS = 128, 2
HALF = ROWS // GROUPS
# The exponent of the least power of two that is a normal number with a normal inverse.
SMALLEST_POWER = -126
# Registers of a thread that computes and of one that copies; 65,536 are shared by all.
_COMPUTING, _COPYING = 240, 24


def buffer(*shape: int, dtype: jax.typing.DTypeLike) -> Any:
    """Returns the type of a buffer whose rows matrix units read."""
    size = jnp.dtype(dtype).itemsize
    # The largest swizzle whose columns divide those of the buffer.
    swizzle = next(x for x in (128, 64, 32) if shape[-1] * size % x == 0)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(count: int, arrivals: int = 1) -> plgpu.Barrier:
    """Returns the type of a barrier for each of `count` buffers."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def width(d: int) -> int:
    """Returns the columns of tiles that hold heads of width D."""
    return next(w for w in (64, 80, 128) if d <= w)


def columns(w: int) -> int:
    """Returns C, the columns of `A` in a tile of the solve, for heads of W columns."""
    return 64 if w == 128 else 128


def rows_of(group: jax.Array | int) -> Any:
    """Returns the rows of a block that a group of warps computes."""
    return pl.ds(group * HALF, HALF)


def dot_rows(a: Any, b: Any) -> jax.Array:
    """Returns `a bᵀ` in float32, of rows in shared memory."""

    def multiply(total):
        plgpu.wgmma(total, a, b.transpose((1, 0)))
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns the places of a tile along an axis."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def load_vector(ref: Any, axis: int) -> jax.Array:
    """Loads a number for each row (axis 0) or column (1) of a tile."""
    load: Any = plgpu.load  # The type is that of jax 0.10, which these kernels do not take.
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def same_segment(
    ref: Any, b: Any, row: jax.Array, column: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Returns which rows and columns are of one segment, from ids `[B,S]` in global memory."""

    def ids(start, axis):
        found = load_vector(ref.at[b, pl.ds(start, shape[axis])], axis)
        return jax.lax.broadcast_in_dim(found, shape, (axis,))

    # The limit only makes equal rows and columns two loads, because one load has one layout.
    return ids(row, 0) == ids(jnp.minimum(column, ref.shape[1] - shape[1]), 1)


def power(e: jax.Array) -> jax.Array:
    """Returns `2^e` in float32, for exponents from −126 to 126; others are taken as these."""
    return jnp.exp2(jnp.clip(e, SMALLEST_POWER, -SMALLEST_POWER).astype(jnp.float32))


def totals(columns: int, interpret: Any) -> Any:
    """Returns the type of the buffers of `with_total`."""
    return plgpu.SMEM((GROUPS, HALF, columns), jnp.float32) if interpret else None


def with_total(f: Callable[[Any], Any], buffers: Any, group: jax.Array, columns: int) -> Any:
    """Returns `f(total)`, with a total of zeros `[R/2,columns]` in float32."""
    if buffers is None:
        return pl.run_scoped(f, plgpu.ACC((HALF, columns), jnp.float32))
    total = buffers.at[group]
    total[...] = jnp.zeros((HALF, columns), jnp.float32)
    return f(total)


def add_product(total: Any, a: Any, b: Any, interpret: Any) -> None:
    """Starts to add `a b` to a total."""
    if not interpret:
        plgpu.wgmma(total, a, b)
        return

    # The interpreter stores nothing in accumulators, so that there the total is a buffer.
    def multiply(product):
        plgpu.wgmma(product, a, b)
        return product[...]

    product = pl.run_scoped(multiply, plgpu.ACC(total.shape, jnp.float32))
    total[...] = total[...] + product


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


def rows_operand(ref: Any, interpret: Any) -> Any:
    """Returns rows in shared memory as the left operand of many products, in registers.

    With both factors in shared memory, products of 64 columns take all that it can deliver.
    """
    if interpret:
        return ref
    load: Any = plgpu.load  # The type is that of jax 0.10, which these kernels do not take.
    return load(ref, layout=plgpu.Layout.WGMMA)


def operands(columns: int, interpret: Any, dtype: jax.typing.DTypeLike = jnp.float16) -> Any:
    """Returns the type of the buffers of `operand`, for left operands of so many columns."""
    return buffer(GROUPS, HALF, columns, dtype=dtype) if interpret else None


def operand(x: jax.Array, scratch: Any) -> Any:
    """Returns `x` as the left operand of a product.

    The interpreter takes no operand from registers, so that there it goes through a buffer.
    """
    if scratch is None:
        return x
    scratch[...] = x
    plgpu.commit_smem()
    return scratch


@contextlib.contextmanager
def turn(turns: Any, group: jax.Array) -> Iterator[None]:
    """Starts products while the other group does not, so that one can compute meanwhile.

    Without barriers, if `turns` is None, groups start products as they come.
    """
    if turns is None:
        yield
        return
    plgpu.barrier_wait(turns.at[group])
    yield
    plgpu.barrier_arrive(turns.at[1 - group])


def begin_turns(turns: Any, group: jax.Array) -> None:
    """Gives the first group the first turn. Both groups take as many."""
    if turns is not None:
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(turns.at[0]))


def end_turns(turns: Any, group: jax.Array) -> None:
    """Takes the last turn back, because a phase of a barrier must not stay open."""
    if turns is not None:
        pl.when(group == 0)(lambda: plgpu.barrier_wait(turns.at[0]))


class Ring(NamedTuple):
    """Buffers that are filled one after the other.

    Attributes:
      source: The array.
      tiles: The buffers.
      full: The barriers of full buffers.
      free: The barriers of buffers that are free again.
      place: Returns the part of the array that a visit reads.
    """

    source: Any
    tiles: Any
    full: Any
    free: Any
    place: Callable[[jax.Array], Any]


def fill(rings: Sequence[Ring], visits: jax.Array) -> None:
    """Copies the tiles of all visits, each as soon as its buffer is free."""
    stages = rings[0].tiles.shape[0]

    @pl.loop(0, visits)
    def _(n):
        slot = jax.lax.rem(n, jnp.int32(stages))
        for ring in rings:
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
            source = ring.source.at[ring.place(n)]
            plgpu.copy_gmem_to_smem(source, ring.tiles.at[slot], ring.full.at[slot])

    # A barrier must not end with a phase that nobody has waited for.
    @pl.loop(0, jnp.minimum(visits, stages))
    def _(slot):
        for ring in rings:
            plgpu.barrier_wait(ring.free.at[slot])


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def draw(_, semaphores: Any, numbers: Any) -> None:
    """Adds 1 to the first semaphore, and stores what it was as the first number."""
    mosaic: Any = utils  # jax 0.10, which has other names, does not take these kernels.
    # All threads have read the number before.
    mosaic.warpgroup_barrier()
    # Not `single_thread`: it keeps its state in a global, so that a kernel which another thread
    # lowers meanwhile would draw a number for each of its threads, and skip the others.
    with mosaic.when(mosaic.single_thread_predicate(mosaic.ThreadSubset.WARPGROUP)):
        mosaic.inline_ptx(
            "{ .reg .b32 n; atom.relaxed.gpu.global.add.u32 n, [$0], 1; st.shared.b32 [$1], n; }",
            mosaic.memref_ptr(semaphores), mosaic.memref_ptr(numbers), has_side_effects=True,
        )  # fmt: skip
    mosaic.warpgroup_barrier()


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

    The call takes None for missing arrays, and the body gets None then. Axes of the grid are
    `axis0` and so on.
    """
    names = tuple(f"axis{i}" for i in range(len(grid)))

    def call(*arrays):
        def entry(*refs):
            given = iter(refs)
            inputs = [None if x is None else next(given) for x in arrays]

            def with_scratch(*scratch):
                body(*inputs, *given, jax.lax.axis_index("group"), *scratch)

            pl.run_scoped(with_scratch, *scratch, collective_axes="group")

        # The compiler names the kernel after the function.
        entry.__name__ = name
        kernel = plgpu.kernel(
            entry, out_type=out_shape, grid=grid, grid_names=names, num_threads=GROUPS + 1,
            thread_name="group",
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        )  # fmt: skip
        return traced_alike(kernel)(*(x for x in arrays if x is not None))

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
