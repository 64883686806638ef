"""The solve by jax-triton beside the same solve by Pallas' Triton lowering, on one GPU.

  python -m experiments.jax_triton.benchmark

Needs jax-triton. One process runs both with equal tiles on equal keys and inverses, and times them
in turns. Solutions are compared first: their largest difference, and the share of equal entries.
Writes benchmark.json.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import kernels, measuring, reporting
from experiments.kernels import Shape
from lucid_jax.ops import target
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton import solve as pallas_solve
from pallas_kernels.triton.diagonal import diagonal_inverses
from pallas_kernels.triton.tiles import Tiles

SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 8192, 1, 1, 128),
    Shape(16, 2048, 4, 4, 64),
)
NAMES = "jax-triton", "Pallas"


def choose_tiles(shape: Shape, reverse: bool) -> Tiles:
    """Returns the tiles of `precondition` on this device, with no blocks prepared ahead."""
    dimensions = shape.batch, shape.length, shape.kv_heads, shape.head_dim
    schedule = Schedule.choose(target.device_kind(), jnp.dtype(jnp.bfloat16), *dimensions)
    tiles = schedule.transposed if reverse else schedule.solve
    return dataclasses.replace(tiles, lookahead=0)


def by_pallas(k_hat, inverses, v, k, *, tiles: Tiles, reverse: bool) -> jax.Array:
    """Returns the solution, as `experiments.jax_triton.solve` takes and returns it."""
    options = {"dtype": v.dtype, "tiles": tiles, "reverse": reverse, "k": k}
    return pallas_solve.solve(k_hat, inverses, v, None, None, **options)[0]


def by_jax_triton(k_hat, inverses, v, k, *, tiles: Tiles, reverse: bool) -> jax.Array:
    """Returns the solution."""
    # jax-triton is no requirement of the project.
    from experiments.jax_triton.solve import solve

    return solve(k_hat, inverses, v, k, tiles=tiles, reverse=reverse)[0]


def prepare(shape: Shape, reverse: bool) -> Callable[[float], list[dict]]:
    """Compiles and compares both; returns a function that times them and gives records.

    Raises GateError if they differ by more than a rounding of the largest entry.
    """
    arrays, tiles = shape.draw(), choose_tiles(shape, reverse)
    k, v = arrays["k"], arrays["v"]
    make = functools.partial(diagonal_inverses, rows=tiles.rows, multiple=tiles.rows)
    k_hat, inverses = jax.jit(lambda k: make(k, None, None, dtype=jnp.float16))(k)
    inputs = k_hat, inverses, v, k
    ops = [functools.partial(f, tiles=tiles, reverse=reverse) for f in (by_jax_triton, by_pallas)]
    found, expected = (np.asarray(jax.jit(op)(*inputs), np.float32) for op in ops)
    case = f"{shape}{', transposed' if reverse else ''}"
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= 2**-7:
        raise measuring.GateError(f"the solves at {case} differ by {difference:.1e}")
    count = 2 * shape.repeats("forward")
    runs = {
        # The first argument changes from repeat to repeat, and should be one that stays finite.
        name: kernels.repeated(
            lambda v, a, b, k, op=op: op(a, b, v, k), (v, k_hat, inverses, k), count
        )
        for name, op in zip(NAMES, ops)
    }

    def measure(seconds: float) -> list[dict]:
        times = measuring.interleaved(runs, seconds)
        return [
            {
                "case": case, "name": name, "tiles": str(tiles), "difference": difference,
                "equal": float((found == expected).mean()),
                "median_ms": 1e3 * statistics.median(times[name]) / count,
            }
            for name in NAMES
        ]  # fmt: skip

    return measure


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table in ms."""
    cases: dict[str, dict[str, dict]] = {}
    for x in records:
        cases.setdefault(x["case"], {})[x["name"]] = x
    rows = []
    for case, both in cases.items():
        ms = [both[name]["median_ms"] for name in NAMES]
        times = [f"{x:.3g}" for x in ms]
        rows.append([case, *times, f"{ms[0] / ms[1]:.2f}", f"{both[NAMES[0]]['equal']:.1%}"])
    return reporting.markdown(["B×S, H/K, D", *NAMES, "ratio", "equal entries"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and times every case, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    parser.add_argument("--seconds", type=float, default=3, help="of timing for each case")
    flags = parser.parse_args(argv)
    measuring.require_gpus(parser)
    header = measuring.provenance(flags, ("jax_triton", "triton"))
    # Everything compiles at once; then the device is timed alone.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        cases = [(shape, reverse) for shape in SHAPES for reverse in (False, True)]
        prepared = list(pool.map(prepare, *zip(*cases)))
    records = [record for measure in prepared for record in measure(flags.seconds)]
    print(table(records))
    reporting.write_json(flags.out / "benchmark.json", **header, dtype="bfloat16", records=records)


if __name__ == "__main__":
    main()
