"""What benchmarks of kernels share: inputs, the gate, time on the device, and the table."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring
from lucid_jax import lucid_attention, precondition, softmax_attention

# Rows of the problem on which outputs and gradients are judged, not a multiple of any tile.
GATE_ROWS = 1500
# Of outputs and gradients, against float32: a few roundings of bfloat16 (2⁻⁹). The exact
# tolerance, by case, is the conformance suite's; a wrong kernel is off by 0.1 and more.
TOLERANCE = 2**-6
# The XLA path takes seconds beyond.
_LONGEST_PEER = 8192


@dataclasses.dataclass(frozen=True)
class Shape:
    """B rows of S tokens, H query and K key/value heads of width D."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}×{self.length}, {self.heads}/{self.kv_heads}, {self.head_dim}"

    def repeats(self, passes: str) -> int:
        """Runs in one program that take accelerators about 50 ms, which hide the host's one."""
        products = 2.0 if passes == "forward" else 7.0
        operations = products * self.batch * self.length**2 * self.heads * self.head_dim
        return max(1, min(200, round(0.05 * 3e14 / operations)))

    def draw(self, length: int | None = None) -> dict[str, jax.Array]:
        """bfloat16 `q, k, v` and a cotangent of each output.

        Keys share a direction, so that `A` is far from the identity and an error in the
        solve cannot hide.
        """
        length = length or self.length
        names = ("q", "k", "v", "o_bar", "y_bar")
        arrays = {}
        for i, name in enumerate(names):
            heads = self.heads if name in ("q", "o_bar") else self.kv_heads
            shape = self.batch, length, heads, self.head_dim
            arrays[name] = jax.random.normal(jax.random.key(i), shape)
        common = jax.random.normal(jax.random.key(9), (1, 1, self.kv_heads, self.head_dim))
        arrays["k"] = arrays["k"] + 0.7 * common
        return {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}


def gate(shape: Shape, op: Callable) -> float:
    """The largest error of `op(k, v)` and its gradients against the float32 XLA path.

    `op` runs as it is given: kernel by kernel where it is not jitted.

    Raises:
      GateError: it exceeds the tolerance, or a result is not finite.
    """
    found = _gate_results(shape, op, jnp.bfloat16)
    return measuring.judge(f"precondition at {shape}", found, _exact_results(shape), TOLERANCE)


@functools.cache
def _exact_results(shape: Shape) -> dict[str, np.ndarray]:
    op = functools.partial(precondition, implementation="xla", precision="highest")
    return _gate_results(shape, jax.jit(op), jnp.float32)


def _gate_results(shape: Shape, op: Callable, dtype) -> dict[str, np.ndarray]:
    arrays = shape.draw(min(shape.length, GATE_ROWS))
    k, v, y_bar = (arrays[name].astype(dtype) for name in ("k", "v", "y_bar"))
    y, gradients = measuring.forward_and_backward(op)((k, v), y_bar)
    names = ("out", "gradient of k", "gradient of v")
    return {n: np.asarray(x, np.float64) for n, x in zip(names, (y, *gradients))}


def check_rows(shape: Shape, k: jax.Array, v: jax.Array, y: jax.Array, count: int = 8) -> float:
    """At full length: rows of `A y = v` in float64, relative to what rounding `y` moves them by.

    Raises:
      GateError: a row is off by more than 8 times that.
    """
    root = np.sqrt(shape.head_dim)
    k64, v64, y64 = (np.asarray(x[0, :, 0], np.float64) for x in (k, v, y))
    k_hat = k64 * root / np.linalg.norm(k64, axis=1, keepdims=True)
    worst = 0.0
    for i in np.linspace(1, shape.length - 1, count, dtype=int):
        a = np.exp(k_hat[:i] @ k_hat[i] / root - root)
        terms = a[:, None] * y64[:i]
        residual = np.linalg.norm(y64[i] + terms.sum(0) - v64[i])
        rounding = 2**-9 * np.sqrt((terms**2).sum() + (y64[i] ** 2).sum())
        worst = max(worst, float(residual / rounding))
    if not worst <= 8:
        raise measuring.GateError(f"precondition at {shape}: A y is off v by {worst:.1f} roundings")
    return worst


def repeated(op: Callable, arguments: tuple, repeats: int) -> Callable[[], float]:
    """A call that runs `op` on the device `repeats` times, in one program.

    The host then starts one program and waits for it, so that a run's time over `repeats`
    is the device's. Each round overwrites one number of the first argument by one made of
    every result, so that nothing is dropped, hoisted out of the loop or merged.
    """

    @jax.jit
    def run(arguments):
        def once(_, arguments):
            first, *others = arguments
            of_results = sum(x.ravel()[0] for x in jax.tree.leaves(op(*arguments)))
            corner = (0,) * first.ndim
            return (first.at[corner].set(of_results.astype(first.dtype)), *others)

        return jax.lax.fori_loop(0, repeats, once, arguments)

    compiled = run.lower(arguments).compile()
    return lambda: jax.block_until_ready(compiled(arguments))


@dataclasses.dataclass(frozen=True)
class Backends:
    """What is timed side by side: LUCID's kernels and the softmax attention of a library."""

    kernels: str
    softmax: str
    # By shape: `precondition` on fewer rows, but with the tiles that the shape takes.
    gated: Callable[[Shape], Callable] | None = None
    # More softmax attention of libraries, to be timed too.
    others: tuple[str, ...] = ()

    def ops(self) -> dict[str, tuple[Callable, tuple[str, ...], str]]:
        """Each op, the names of its arguments, and that of its cotangent."""
        solve = functools.partial(precondition, implementation=self.kernels)
        softmax = functools.partial(softmax_attention, implementation=self.softmax)
        xla = functools.partial(precondition, implementation="xla")
        return {
            "precondition": (solve, ("k", "v"), "y_bar"),
            "lucid_attention": (lucid_attention, ("q", "k", "v"), "o_bar"),
            "softmax": (softmax, ("q", "k", "v"), "o_bar"),
            "xla": (xla, ("k", "v"), "y_bar"),
            **{
                name: (
                    functools.partial(softmax_attention, implementation=name),
                    ("q", "k", "v"),
                    "o_bar",
                )
                for name in self.others
            },
        }

    def program(self, name: str, passes: str, arrays: dict) -> tuple[Callable, tuple]:
        """One op's pass and its arguments."""
        op, names, cotangent = self.ops()[name]
        arguments = tuple(arrays[n] for n in names)
        if passes == "forward":
            return op, arguments
        both = measuring.forward_and_backward(op)
        return lambda *x: both(x[:-1], x[-1]), (*arguments, arrays[cotangent])


def prepare(
    backends: Backends, shape: Shape, name: str, passes: str
) -> Callable[[float], dict[str, object]]:
    """Checks and compiles LUCID, softmax attention and others; several rows may do so at once.

    Returns:
      A function of the seconds to spend, which times all in turns and returns the record;
      times in milliseconds.

    Raises:
      GateError: LUCID is wrong.
    """
    solve, *_ = backends.ops()["precondition"]
    error = gate(shape, jax.jit(backends.gated(shape) if backends.gated else solve))
    arrays = shape.draw()
    rows = check_rows(shape, arrays["k"], arrays["v"], jax.jit(solve)(arrays["k"], arrays["v"]))
    contestants = [name, "softmax", *backends.others]
    if name == "precondition" and shape.length <= _LONGEST_PEER:
        contestants.append("xla")
    repeats = shape.repeats(passes)
    runs, memory = {}, {}
    for contestant in contestants:
        op, arguments = backends.program(contestant, passes, arrays)
        memory[contestant] = measuring.temp_bytes(jax.jit(op).lower(*arguments).compile())
        runs[contestant] = repeated(op, arguments, repeats)
    kv = sum(arrays[x].nbytes for x in ("k", "v", "v"))

    def measure(seconds: float) -> dict[str, object]:
        times = measuring.interleaved(runs, seconds)
        ms = {c: 1e3 * statistics.median(times[c]) / repeats for c in runs}
        return {
            "shape": str(shape),
            "op": name,
            "pass": passes,
            "gate_error": error,
            "residual_in_roundings": rows,
            "median_ms": ms,
            "rounds": len(times[name]),
            "over_softmax": ms[name] / ms["softmax"],
            "temporaries_over_k_v_y": memory[name] / kv,
            "softmax_temporaries_over_k_v_y": memory["softmax"] / kv,
        }

    return measure


def table(records: Sequence[dict], softmax: str) -> str:
    """Markdown."""
    lines = [
        f"| B×S, H/K, D | op | pass | LUCID | softmax ({softmax}) | ratio | others"
        " | temporaries / (k+v+y), of softmax |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in records:
        ms = x["median_ms"]
        others = (f"{n} {t:.2f} ms" for n, t in ms.items() if n not in (x["op"], "softmax"))
        lines.append(
            f"| {x['shape']} | `{x['op']}` | {x['pass']} | {ms[x['op']]:.3f} ms"
            f" | {ms['softmax']:.3f} ms | {x['over_softmax']:.3f} | {', '.join(others) or '–'}"
            f" | {x['temporaries_over_k_v_y']:.2f}, {x['softmax_temporaries_over_k_v_y']:.2f} |"
        )
    return "\n".join(lines)
