"""Kernels by jax-triton beside the same kernels by Pallas' Triton lowering, on one GPU.

  python -m experiments.jax_triton.benchmark

Needs jax-triton. One process runs both with equal tiles on equal inputs, and times them in turns.
Results are compared first: their largest difference, and the share of equal entries. Writes
benchmark.json.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import kernels, measuring, reporting
from experiments.kernels import Shape
from lucid_jax import precondition
from lucid_jax.ops import target
from lucid_jax.ops.precondition.triton_schedule import Schedule
from pallas_kernels.triton import key_gradient as pallas_gradient
from pallas_kernels.triton import solve as pallas_solve
from pallas_kernels.triton.diagonal import diagonal_inverses
from pallas_kernels.triton.tiles import Tiles

SHAPES = (
    Shape(1, 131072, 4, 4, 64),
    Shape(1, 32768, 16, 16, 128),
    Shape(1, 8192, 1, 1, 128),
    Shape(16, 2048, 4, 4, 64),
)
# Three kernels with equal inputs, and both passes of the op, where Pallas' kernels prepare blocks
# ahead and fuse half of the key gradient.
KERNELS = "solve", "transposed solve", "key gradient", "precondition"
NAMES = "jax-triton", "Pallas"


@dataclasses.dataclass(frozen=True)
class Case:
    """One of `KERNELS` on one shape."""

    kernel: str
    shape: Shape

    @property
    def schedule(self) -> Schedule:
        """The tiles of `precondition` on this device."""
        shape = self.shape
        dimensions = shape.batch, shape.length, shape.kv_heads, shape.head_dim
        return Schedule.choose(target.device_kind(), jnp.dtype(jnp.bfloat16), *dimensions)

    @property
    def tiles(self) -> Tiles:
        """The tiles of the kernel, which prepares no blocks ahead."""
        schedule = self.schedule
        others = {"transposed solve": schedule.transposed, "key gradient": schedule.gradient}
        return dataclasses.replace(others.get(self.kernel, schedule.solve), lookahead=0)

    def draw(self) -> tuple[Any, ...]:
        """Returns the inputs of the kernel; the first are values that stay finite."""
        arrays, schedule = self.shape.draw(), self.schedule
        k, v, y_bar = (arrays[name] for name in ("k", "v", "y_bar"))
        if self.kernel == "precondition":
            return v, k, y_bar

        @jax.jit
        def inputs(k, v, y_bar):
            options = {"rows": schedule.solve.rows, "multiple": schedule.multiple}
            k_hat, inverses = diagonal_inverses(k, None, None, dtype=jnp.float16, **options)
            if self.kernel != "key gradient":
                return v, k, k_hat, inverses
            y, y_scaled, _ = by_pallas(schedule.solve, False, v, k, k_hat, inverses)
            v_bar, v_bar_scaled, _ = by_pallas(schedule.transposed, True, y_bar, k, k_hat, inverses)
            return y, v_bar, k, k_hat, y_scaled, v_bar_scaled

        return inputs(k, v, y_bar)

    def contestants(self) -> tuple[Callable, ...]:
        """Returns functions of these inputs, by jax-triton and by Pallas."""
        # jax-triton is no requirement of the project.
        from experiments.jax_triton import key_gradient as gradient
        from experiments.jax_triton import solve, trial

        if self.kernel == "precondition":
            ops = trial.precondition, functools.partial(precondition, implementation="triton")
            runs = [measuring.forward_and_backward(op) for op in ops]
            return tuple(lambda v, k, y_bar, run=run: run(k, v, y_bar) for run in runs)
        tiles, reverse = self.tiles, self.kernel == "transposed solve"
        if self.kernel == "key gradient":

            def ours(y, v_bar, k, k_hat, *scaled):
                return gradient.key_gradient(k, k_hat, y, v_bar, *scaled, tiles=tiles)

            def pallas(y, v_bar, k, k_hat, y_scaled, v_bar_scaled):
                return pallas_gradient.key_gradient(
                    k, k_hat, y, v_bar, None, None, None, tiles=tiles, dtype=k.dtype,
                    y_scaled=y_scaled, v_bar_scaled=v_bar_scaled,
                )  # fmt: skip

            return ours, pallas

        def solve_by_triton(v, k, k_hat, inverses):
            return solve.solve(k_hat, inverses, v, k, tiles=tiles, reverse=reverse)[0]

        return solve_by_triton, lambda *inputs: by_pallas(tiles, reverse, *inputs)[0]

    def __str__(self) -> str:
        return f"{self.shape}, {self.kernel}"


def by_pallas(tiles: Tiles, reverse: bool, v, k, k_hat, inverses):
    """Solves by the Pallas kernel."""
    options = {"dtype": v.dtype, "tiles": tiles, "reverse": reverse, "k": k}
    return pallas_solve.solve(k_hat, inverses, v, None, None, **options)


def prepare(case: Case) -> Callable[[float], list[dict]]:
    """Compiles and compares both; returns a function that times them and gives records.

    Raises GateError if they differ by more than a rounding of the largest entry.
    """
    inputs, ops = case.draw(), case.contestants()
    found, expected = (
        np.concatenate([np.ravel(np.float32(x)) for x in jax.tree.leaves(jax.jit(op)(*inputs))])
        for op in ops
    )
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= 2**-7:
        raise measuring.GateError(f"the results at {case} differ by {difference:.1e}")
    count = 2 * case.shape.repeats("forward")
    runs = {name: kernels.repeated(op, inputs, count) for name, op in zip(NAMES, ops)}

    def measure(seconds: float) -> list[dict]:
        times = measuring.interleaved(runs, seconds)
        return [
            {
                "case": str(case), "name": name, "tiles": str(case.tiles), "difference": difference,
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
        cases = [Case(kernel, shape) for shape in SHAPES for kernel in KERNELS]
        prepared = list(pool.map(prepare, cases))
    records = [record for measure in prepared for record in measure(flags.seconds)]
    print(table(records))
    reporting.write_json(flags.out / "benchmark.json", **header, dtype="bfloat16", records=records)


if __name__ == "__main__":
    main()
