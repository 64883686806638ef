"""Times of small kernels on a GPU, which the simulator needs and no other benchmark gives.

  python -m experiments.sequence_scaling.measure

On 4 heads of dimension 64 in bfloat16: the solve of one stripe by the Triton kernels; updates of a
few rows by a few columns; and, for diagonal blocks larger than the kernels have, making all
inverses and multiplying by one, both by library products. Small ops are timed in chains, each on
the result of the one before, as in the solve. Takes about a minute on one H200 and writes
h200.json.
"""

import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring, reporting
from experiments.kernels import TOLERANCE, Shape, repeated
from lucid_jax import precondition
from lucid_jax.ops.precondition.gram import normalize_keys
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton.diagonal import diagonal_inverses
from pallas_kernels.triton.product import product

ROWS, HEADS, HEAD_DIM, SMALLEST = 32768, 4, 64, 128
STRIPES = (1024, 2048, 4096, 8192)
BLOCKS = (128, 256, 512, 1024, 2048)
UPDATES = tuple((r, c) for r in (128, 2048, 8192) for c in (512, 2048))
CHAIN = 400


def microseconds(op: Callable, x: jax.Array, *others: jax.Array) -> float:
    """Returns the device time of one `op` in a chain in which `op(x, *others)` is the next `x`."""

    @jax.jit
    def run(x, *others):
        return jax.lax.fori_loop(0, CHAIN, lambda _, x: op(x, *others), x)

    compiled = run.lower(x, *others).compile()
    runs = {"run": lambda: jax.block_until_ready(compiled(x, *others))}
    return 1e6 * statistics.median(measuring.interleaved(runs, 0)["run"]) / CHAIN


def solve(v: jax.Array, k: jax.Array) -> jax.Array:
    """Returns `A⁻¹ v`."""
    return precondition(k, v, implementation="triton")


def update(y: jax.Array, k: jax.Array, *, rows: int) -> jax.Array:
    """Returns `y` overwritten by `A y`, for the first `rows` keys as rows, the last as columns."""
    device = jax.devices()[0].device_kind
    tiles = Schedule.choose(device, k.dtype, 1, rows, HEADS, HEAD_DIM).product
    k_hat = jnp.swapaxes(k, 1, 2)
    first = jnp.zeros((1, rows // tiles.rows), jnp.int32)
    end = jnp.full_like(first, y.shape[1] // tiles.columns)
    columns = k_hat[:, :, -y.shape[1] :]
    out = product(k_hat[:, :, :rows], columns, y, None, None, first, end, tiles=tiles)
    out = out[:, : y.shape[1]].astype(y.dtype)
    return y.at[:, : out.shape[1]].set(out)


def inverses(k: jax.Array, *, rows: int) -> jax.Array:
    """Returns the inverses of diagonal blocks `[1,K,S/rows,rows,rows]`, made from halves."""
    _, inverse = diagonal_inverses(k, None, rows=SMALLEST, multiple=SMALLEST, dtype=k.dtype)
    inverse = inverse.astype(k.dtype)
    k_hat = jnp.swapaxes(normalize_keys(k).astype(k.dtype), 1, 2)
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    root = HEAD_DIM**0.5
    while (half := inverse.shape[-1]) < rows:
        halves = k_hat.reshape(1, HEADS, -1, 2, half, HEAD_DIM)
        upper, lower = inverse[:, :, 0::2], inverse[:, :, 1::2]
        exponents = multiply(halves[:, :, :, 1], jnp.swapaxes(halves[:, :, :, 0], -1, -2)) / root
        a = jnp.exp(exponents - root).astype(k.dtype)
        corner = -multiply(lower, multiply(a, upper).astype(k.dtype)).astype(k.dtype)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], -1)], -2)
    return inverse


def apply(v: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns `A⁻¹ v` of one block."""
    return jnp.einsum("bkij,bjkd->bikd", inverse, v)


def measure() -> dict[str, dict[str, float]]:
    """Returns microseconds by kind of kernel and by size."""
    arrays = Shape(1, ROWS, HEADS, HEADS, HEAD_DIM).draw()
    # Small values, so that chains of products stay finite.
    k, v = arrays["k"], arrays["v"] * 1e-3
    found: dict[str, dict[str, float]] = {}

    def record(kind: str, size: str, us: float) -> None:
        found.setdefault(kind, {})[size] = us
        print(f"{kind} {size}: {us:.2f} µs", flush=True)

    for rows in STRIPES:
        record("stripe", f"{rows}", microseconds(solve, v[:, :rows], k[:, :rows]))
    for rows, columns in UPDATES:
        op = functools.partial(update, rows=rows)
        record("update", f"{rows}×{columns}", microseconds(op, v[:, :columns], k))
    for rows in BLOCKS:
        make = functools.partial(inverses, rows=rows)
        inverse = jax.jit(make)(k)[:, :, 0]
        exact = np.asarray(jax.jit(solve)(v[:, :rows], k[:, :rows]), np.float64)
        y = apply(v[:, :rows], inverse)
        measuring.judge(f"inverse of {rows} rows", {"y": y}, {"y": exact}, TOLERANCE)
        record("block", f"{rows}", microseconds(apply, v[:, :rows], inverse))
        seconds = measuring.interleaved({"run": repeated(make, (k,), 5)}, 0)["run"]
        record("inverses", f"{rows}", 1e6 * statistics.median(seconds) / 5)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints as it goes, and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags)
    shape = f"1×{ROWS}, {HEADS} heads of {HEAD_DIM}"
    path = flags.out / "h200.json"
    reporting.write_json(path, **header, shape=shape, dtype="bfloat16", microseconds=measure())


if __name__ == "__main__":
    main()
