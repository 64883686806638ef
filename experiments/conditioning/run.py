"""The condition of `A` against length: its norm, its inverse's norm, and errors of solves.

  python -m experiments.conditioning.run
  python -m experiments.conditioning.run --lengths=32768,65536   # on a GPU
  python -m experiments.conditioning.run --checkpoint=WORKDIR --text=FILE

Norms come from products and solves in blocks. At lengths where a dense float64 matrix is cheap
they are checked against its singular values. Writes random.json and random.png, or trained.json
and trained.png.
"""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring, reporting
from experiments.conditioning import keys, operators
from lucid_jax import precondition

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# One for each set of keys.
COLORS = matplotlib.colormaps["tab20"](range(20))
# The longest length of a dense float64 SVD.
DENSE_LENGTH = 1024
# A norm's tolerance against that SVD: a Krylov space that is too small gives too little.
TOLERANCE = 0.02


def measure(k: np.ndarray, steps: int) -> dict[str, list[float]]:
    """Returns norms, checked, and errors of keys float64 `[1,S,K,D]`: K numbers by name."""
    k32 = jnp.asarray(k, jnp.float32)
    start = jax.random.normal(jax.random.key(0), k.shape)
    ops = {"norm": operators.multiply, "inverse_norm": operators.solve}
    norms = {name: operators.norm(op, k32, start, steps) for name, op in ops.items()}
    found = {name: np.asarray(x.value, np.float64) for name, x in norms.items()}
    if k.shape[1] <= DENSE_LENGTH:
        check_dense(k, found)
    found["condition"] = found["norm"] * found["inverse_norm"]
    found["inverse_norm_growth"] = np.asarray(norms["inverse_norm"].growth)
    found |= {f"{dtype}_error": error(k, start, dtype) for dtype in ("float32", "bfloat16")}
    return reporting.rounded(found)


def error(k: np.ndarray, v: jax.Array, dtype: str) -> np.ndarray:
    """Returns `‖y − exact‖/‖exact‖` of a solve in `dtype`, `[K]`, exact on the same inputs."""
    k_rounded, v_rounded = jnp.asarray(k, jnp.float32).astype(dtype), v.astype(dtype)
    y = np.asarray(jax.jit(precondition)(k_rounded, v_rounded), np.float64)
    with jax.enable_x64(True):
        double = (jnp.asarray(np.asarray(x, np.float64)) for x in (k_rounded, v_rounded))
        op = functools.partial(precondition, implementation="xla", precision="highest")
        exact = np.asarray(jax.jit(op)(*double))
    squares = (np.sum(x**2, (0, 1, 3)) for x in (y - exact, exact))
    return np.sqrt(np.divide(*squares))


def check_dense(k: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    """Checks norms against singular values of the dense matrix; raises GateError."""
    singular = np.linalg.svd([dense(x) for x in k[0].swapaxes(0, 1)], compute_uv=False)
    exact = {"norm": singular[:, 0], "inverse_norm": 1 / singular[:, -1]}
    measuring.judge(f"keys at {k.shape[1]} rows", found, exact, TOLERANCE)


def normalised(k: np.ndarray) -> np.ndarray:
    """Returns keys `[S,D]` of length √D."""
    return k * math.sqrt(k.shape[-1]) / np.linalg.norm(k, axis=-1, keepdims=True)


def kernel(k: np.ndarray) -> np.ndarray:
    """Returns the whole kernel matrix of keys `[S,D]` in float64."""
    root = math.sqrt(k.shape[-1])
    return np.exp(k @ k.T / root - root)


def dense(k: np.ndarray) -> np.ndarray:
    """Returns `A` from keys `[S,D]`, by its definition in float64."""
    return np.tril(kernel(normalised(k)), -1) + np.eye(len(k))


COLUMNS = (
    ("norm", "‖A‖", ".1f"),
    ("inverse_norm", "‖A⁻¹‖", ".3f"),
    ("condition", "κ(A)", ".0f"),
    ("float32_error", "error, float32", ".1e"),
    ("bfloat16_error", "error, bfloat16", ".1e"),
)


def table(records: Sequence[dict]) -> str:
    """Returns a Markdown table of the lowest and the highest of the heads."""
    rows = []
    for x in sorted(records, key=lambda x: x["keys"]):
        cells = []
        for name, _, form in COLUMNS:
            low, high = (f"{f(x[name]):{form}}" for f in (min, max))
            cells.append(low if low == high else f"{low} to {high}")
        rows.append((x["keys"], x["length"], *cells))
    return reporting.markdown(("keys", "S", *(label for _, label, _ in COLUMNS)), rows)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Plots each number against S, with the largest that any keys can have."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    lengths = sorted({x["length"] for x in records})
    norms = [operators.most_possible(s) for s in lengths]
    twice = [2 * x for x in norms]
    limits = {"norm": norms, "inverse_norm": [2.0] * len(norms), "condition": twice}
    for panel, (name, label, _) in zip(axes, COLUMNS):
        panel.set_prop_cycle(color=COLORS)
        for keys_name in dict.fromkeys(x["keys"] for x in records):
            mine = [x for x in records if x["keys"] == keys_name]
            x = [record["length"] for record in mine]
            (line,) = panel.plot(x, [max(r[name]) for r in mine], "o-", ms=4, label=keys_name)
            if name == "float32_error":
                highest = [max(r["bfloat16_error"]) for r in mine]
                panel.plot(x, highest, "s:", ms=4, color=line.get_color())
        if name in limits:
            panel.plot(lengths, limits[name], "k--", lw=1)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="S", yscale="linear" if name == "inverse_norm" else "log")
        panel.set_ylabel("error of y: float32, bfloat16 dotted" if "error" in name else label)
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    axes[0].set_title("highest of the heads; dashed: the most possible", fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every set of keys at every length, prints the table and writes the results."""
    parser = reporting.make_parser(__spec__, __doc__, argv)
    keys.add_flags(parser, LENGTHS)
    parser.add_argument("--steps", type=int, default=8, help="of the Krylov space")
    flags = parser.parse_args(argv)
    header = measuring.provenance(flags)
    trained = keys.from_flags(parser, flags)
    sets = trained or keys.random_sets(flags.lengths, flags.seeds)
    name = "trained" if trained else "random"
    records: list[dict] = []
    for length, named in sets.items():
        for keys_name, k in named.items():
            found = measure(k, flags.steps)
            records.append({"keys": keys_name, "length": length, **found})
            print(f"{keys_name}, S = {length}: κ {max(found['condition']):.0f}", flush=True)
        # Written after each length, so that an interrupted run leaves what it has measured.
        reporting.write_json(flags.out / f"{name}.json", **header, records=records)
        plot(records, flags.out / f"{name}.png")
    print(f"\n{table(records)}")


if __name__ == "__main__":
    main()
