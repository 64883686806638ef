"""How well `A` is conditioned, against length: its norm, its inverse's, and what solves lose.

  python -m experiments.conditioning.run
  python -m experiments.conditioning.run --lengths=32768,65536   # on a GPU
  python -m experiments.conditioning.run --checkpoint=WORKDIR --text=FILE

Norms come from products and solves in blocks; where a dense matrix of float64 is cheap they are
held to its singular values. Writes random.json and random.png, or trained.json and trained.png.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import measuring
from experiments.conditioning import keys, operators
from lucid_jax import precondition

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
RESULTS = pathlib.Path(__file__).parent / "results"
# Of sets of keys.
COLORS = matplotlib.colormaps["tab20"](range(20))
# Longest that a dense float64 SVD is made for.
DENSE_ROWS = 1024
# Of a norm, against that SVD: a Krylov space that is too small gives too little.
TOLERANCE = 0.02


def measure(k: np.ndarray, steps: int) -> dict[str, list[float]]:
    """Norms and errors of every head.

    Args:
      k: Keys float64 `[1,S,K,D]`.
      steps: Of the Krylov space.

    Returns:
      Lists of K numbers by name.

    Raises:
      GateError: a norm is not that of the dense matrix, where there is one.
    """
    k32 = jnp.asarray(k, jnp.float32)
    start = jax.random.normal(jax.random.key(0), k.shape)
    of_a = operators.norm(
        lambda x: operators.multiply(k32, x),
        lambda x: operators.multiply(k32, x, transpose=True),
        start,
        steps,
    )
    of_inverse = operators.norm(
        lambda x: operators.solve(k32, x),
        lambda x: operators.solve(k32, x, transpose=True),
        start,
        steps,
    )
    found = {
        "norm": np.asarray(of_a.value, np.float64),
        "norm_growth": np.asarray(of_a.growth),
        "inverse_norm": np.asarray(of_inverse.value, np.float64),
        "inverse_norm_growth": np.asarray(of_inverse.growth),
        "inverse_norm_residual": np.asarray(of_inverse.residual),
    }
    found["condition"] = found["norm"] * found["inverse_norm"]
    found |= {f"{name}_error": error(k, start, name) for name in ("float32", "bfloat16")}
    if k.shape[1] <= DENSE_ROWS:
        found |= hold_to_dense(k, found)
    return {name: [float(f"{x:.5g}") for x in values] for name, values in found.items()}


def error(k: np.ndarray, v: jax.Array, dtype: str) -> np.ndarray:
    """`‖y − exact‖/‖exact‖` of a solve in `dtype`, `[K]`; exact is float64 on the same inputs."""
    k_rounded, v_rounded = jnp.asarray(k, jnp.float32).astype(dtype), v.astype(dtype)
    y = np.asarray(jax.jit(precondition)(k_rounded, v_rounded), np.float64)
    with jax.enable_x64(True):
        double = (jnp.asarray(np.asarray(x, np.float64)) for x in (k_rounded, v_rounded))
        exact = np.asarray(jax.jit(_in_blocks)(*double))
    squares = (np.sum(x**2, (0, 1, 3)) for x in (y - exact, exact))
    return np.sqrt(np.divide(*squares))


def _in_blocks(k: jax.Array, v: jax.Array) -> jax.Array:
    return precondition(k, v, implementation="xla", precision="highest")


def hold_to_dense(k: np.ndarray, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms from dense singular values in float64.

    Raises:
      GateError: those found differ.
    """
    exact: dict[str, list[float]] = {"norm": [], "inverse_norm": []}
    for head in np.moveaxis(k[0], 1, 0):
        singular = np.linalg.svd(dense(head), compute_uv=False)
        exact["norm"].append(singular[0])
        exact["inverse_norm"].append(1 / singular[-1])
    for name, values in exact.items():
        off = np.abs(found[name] / values - 1).max()
        if not off <= TOLERANCE:
            raise measuring.GateError(
                f"{name} at {k.shape[1]} rows: off by {off:.1%} from the dense matrix's"
            )
    return {f"dense_{name}": np.array(values) for name, values in exact.items()}


def dense(k: np.ndarray) -> np.ndarray:
    """`A` from keys `[S,D]`, in float64, by its definition."""
    root = math.sqrt(k.shape[-1])
    k_hat = k * root / np.linalg.norm(k, axis=-1, keepdims=True)
    return np.tril(np.exp(k_hat @ k_hat.T / root - root), -1) + np.eye(len(k))


COLUMNS = (
    ("norm", "‖A‖", ".1f"),
    ("inverse_norm", "‖A⁻¹‖", ".3f"),
    ("condition", "κ(A)", ".0f"),
    ("float32_error", "error, float32", ".1e"),
    ("bfloat16_error", "error, bfloat16", ".1e"),
)


def table(records: Sequence[dict]) -> str:
    """Markdown: for every set of keys and length the lowest and the highest of its heads."""
    lines = [
        "| keys | S | " + " | ".join(label for _, label, _ in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for x in sorted(records, key=lambda x: x["keys"]):
        cells = []
        for name, _, form in COLUMNS:
            low, high = (f"{f(x[name]):{form}}" for f in (min, max))
            cells.append(low if low == high else f"{low} to {high}")
        lines.append(f"| {x['keys']} | {x['length']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(records: Sequence[dict], path: pathlib.Path) -> None:
    """Each number against S, with what no keys can exceed."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    lengths = sorted({x["length"] for x in records})
    norms = [operators.most_possible(s) for s in lengths]
    limits = {
        "norm": norms,
        "inverse_norm": [2.0] * len(norms),
        "condition": [2 * x for x in norms],
    }
    for panel, (name, label, _) in zip(axes, COLUMNS):
        panel.set_prop_cycle(color=COLORS)
        for keys_name in dict.fromkeys(x["keys"] for x in records):
            rows = [x for x in records if x["keys"] == keys_name]
            highest = [max(x[name]) for x in rows]
            (line,) = panel.plot([x["length"] for x in rows], highest, "o-", ms=4, label=keys_name)
            if name == "float32_error":
                highest = [max(x["bfloat16_error"]) for x in rows]
                panel.plot([x["length"] for x in rows], highest, "s:", ms=4, color=line.get_color())
        if name in limits:
            panel.plot(lengths, limits[name], "k--", lw=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("linear" if name == "inverse_norm" else "log")
        panel.set_xlabel("S")
        panel.set_ylabel("error of y: float32, bfloat16 dotted" if "error" in name else label)
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    axes[0].set_title("highest of the heads; dashed: the most possible", fontsize=9)
    figure.savefig(path, dpi=120)


def lengths(text: str) -> tuple[int, ...]:
    """Parses `512,1024`."""
    return tuple(int(x) for x in text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every set of keys at every length, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lengths, default=LENGTHS)
    parser.add_argument("--seeds", type=int, default=3, help="of random keys")
    parser.add_argument("--steps", type=int, default=8, help="blocks of the Krylov space")
    parser.add_argument("--checkpoint", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--text", type=pathlib.Path, help="what a checkpoint's keys are made of")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(argv)
    if bool(flags.checkpoint) != bool(flags.text):
        parser.error("--checkpoint and --text go together")
    environment = measuring.environment()
    if flags.checkpoint:
        sets = keys.trained_sets(flags.checkpoint, flags.text, flags.lengths)
    else:
        sets = {length: keys.random_sets(length, flags.seeds) for length in flags.lengths}
    sources = [f"--checkpoint={x}" for x in flags.checkpoint]
    sources += [f"--text={flags.text}"] if flags.text else [f"--seeds={flags.seeds}"]
    records: list[dict] = []
    result = {
        "command": "python -m experiments.conditioning.run --lengths="
        + ",".join(map(str, flags.lengths))
        + f" --steps={flags.steps} {' '.join(sources)}",
        "environment": environment,
        "most_possible_norm": {str(n): operators.most_possible(n) for n in flags.lengths},
        "records": records,
    }
    name = "trained" if flags.checkpoint else "random"
    flags.out.mkdir(parents=True, exist_ok=True)
    for length, named in sets.items():
        for keys_name, k in named.items():
            found = measure(k, flags.steps)
            records.append({"keys": keys_name, "length": length, **found})
            print(f"{keys_name}, S = {length}: κ {max(found['condition']):.0f}", flush=True)
        # A run that is stopped leaves the lengths that it has finished.
        (flags.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(records, flags.out / f"{name}.png")
    print(f"\n{table(records)}")


if __name__ == "__main__":
    main()
