"""Shared parts of the kernel benchmarks: inputs, correctness gates, device times and the table."""

import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring, reporting
from lucid_jax import lucid_attention, precondition, softmax_attention

# Tokens at which outputs and gradients are checked; not a multiple of any tile.
GATE_TOKENS = 1500
# A few bfloat16 roundings (2⁻⁹), against float32. The conformance suite has exact tolerances by
# case; a wrong kernel is off by 0.1 and more.
TOLERANCE = 2**-6
# The XLA path takes seconds at longer lengths.
_LONGEST_XLA = 8192


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of sequences, with query heads and key/value heads of one head dimension."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}×{self.length}, {self.heads}/{self.kv_heads}, {self.head_dim}"

    def repeats(self, passes: str) -> int:
        """Returns how often a program repeats an op to run for about 50 ms on an accelerator."""
        products = 2.0 if passes == "forward" else 7.0
        operations = products * self.batch * self.length**2 * self.heads * self.head_dim
        return max(1, min(200, round(0.05 * 3e14 / operations)))

    def draw(self, length: int | None = None) -> dict[str, jax.Array]:
        """Returns bfloat16 `q, k, v` and the cotangents `o_bar` and `y_bar`."""
        arrays = {}
        for i, name in enumerate(("q", "k", "v", "o_bar", "y_bar")):
            heads = self.heads if name in ("q", "o_bar") else self.kv_heads
            shape = self.batch, length or self.length, heads, self.head_dim
            arrays[name] = jax.random.normal(jax.random.key(i), shape)
        # Keys that share a direction, so that `A` is far from the identity and errors show.
        common = jax.random.normal(jax.random.key(9), (1, 1, self.kv_heads, self.head_dim))
        arrays["k"] = arrays["k"] + 0.7 * common
        return {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}


def draw_segments(batch: int, length: int, mean: int, most: int | None = None) -> np.ndarray:
    """Draws documents of exponentially distributed lengths, 2 to `most` in a sequence.

    Returns segment ids int32 `[B,S]`, from 1 on.
    """
    rng = np.random.default_rng(mean)
    ids = np.zeros((batch, length), np.int32)
    for sequence in ids:
        cuts = np.empty(0)
        while not len(cuts) or (most and len(cuts) >= most):
            cuts = np.cumsum(1 + rng.exponential(mean, 1 + 4 * length // mean).astype(int))
            cuts = cuts[cuts < length]
        sequence[:] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    return ids


def gate(shape: Shape, op: Callable) -> float:
    """Returns the error of `op(k, v)` and its gradients against float32, or raises GateError.

    `op` is called as it is: without `jit`, kernel by kernel.
    """
    found = _gate_results(shape, op, jnp.bfloat16)
    return measuring.judge(f"precondition at {shape}", found, _exact_results(shape), TOLERANCE)


@functools.cache
def _exact_results(shape: Shape) -> dict[str, np.ndarray]:
    op = functools.partial(precondition, implementation="xla", precision="highest")
    return _gate_results(shape, jax.jit(op), jnp.float32)


def _gate_results(shape: Shape, op: Callable, dtype) -> dict[str, np.ndarray]:
    arrays = shape.draw(min(shape.length, GATE_TOKENS))
    k, v, y_bar = (arrays[name].astype(dtype) for name in ("k", "v", "y_bar"))
    y, gradients = measuring.forward_and_backward(op)(k, v, y_bar)
    names = ("out", "gradient of k", "gradient of v")
    return {n: np.asarray(x, np.float64) for n, x in zip(names, (y, *gradients))}


def check_rows(shape: Shape, k: jax.Array, v: jax.Array, y: jax.Array) -> float:
    """Returns the largest residual of rows of `A y = v` in float64, in bfloat16 roundings of `y`.

    Raises GateError if it exceeds 8.
    """
    root, worst = np.sqrt(shape.head_dim), 0.0
    k64, v64, y64 = (np.asarray(x[0, :, 0], np.float64) for x in (k, v, y))
    k_hat = k64 * root / np.linalg.norm(k64, axis=1, keepdims=True)
    for i in np.linspace(1, shape.length - 1, 8, dtype=int):
        a = np.exp(k_hat[:i] @ k_hat[i] / root - root)
        terms = a[:, None] * y64[:i]
        residual = np.linalg.norm(y64[i] + terms.sum(0) - v64[i])
        rounding = 2**-9 * np.sqrt((terms**2).sum() + (y64[i] ** 2).sum())
        worst = max(worst, float(residual / rounding))
    if not worst <= 8:
        raise measuring.GateError(f"precondition at {shape}: A y is off v by {worst:.1f} roundings")
    return worst


def repeated(op: Callable, arguments: tuple, repeats: int) -> Callable[[], object]:
    """Returns a call that runs `op` so often in one program: its time per repeat is the device's.

    Each repeat writes a number made of every result into the first argument, so that the compiler
    cannot drop, hoist or merge any of them.
    """

    @jax.jit
    def run(arguments):
        def once(_, arguments):
            first, *others = arguments
            total = sum(x.ravel()[0] for x in jax.tree.leaves(op(*arguments)))
            return first.at[(0,) * first.ndim].set(total.astype(first.dtype)), *others

        return jax.lax.fori_loop(0, repeats, once, arguments)

    compiled = run.lower(arguments).compile()
    return lambda: jax.block_until_ready(compiled(arguments))


def prepare_ops(
    ops: Mapping[str, tuple[Callable, str]],
    arrays: Mapping[str, jax.Array],
    work: Callable[[str], Shape],
) -> Callable[[float], list[dict[str, object]]]:
    """Compiles both passes of ops side by side; returns a function that times them in turns.

    Args:
      ops: Ops by name, and the names of their arguments.
      arrays: The result of `Shape.draw`.
      work: Returns the shape whose work an op does, from its name.

    Returns:
      A function that takes the seconds to spend and returns records, with times in milliseconds.
    """
    repeats, programs = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, (op, names) in ops.items():
            arguments = tuple(arrays[n] for n in names)
            cotangent = arrays["o_bar" if "q" in names else "y_bar"]
            both = measuring.forward_and_backward(op)
            for passes, program, inputs in (
                ("forward", op, arguments), ("forward+backward", both, (*arguments, cotangent)),
            ):  # fmt: skip
                count = repeats[name, passes] = work(name).repeats(passes)
                programs[name, passes] = pool.submit(repeated, program, inputs, count)
    runs = {key: program.result() for key, program in programs.items()}

    def measure(seconds: float) -> list[dict[str, object]]:
        times = measuring.interleaved(runs, seconds)
        return [
            {
                "name": name, "pass": passes,
                "median_ms": 1e3 * statistics.median(times[name, passes]) / count,
            }
            for (name, passes), count in repeats.items()
        ]  # fmt: skip

    return measure


@dataclasses.dataclass(frozen=True)
class Backends:
    """The implementations that are timed side by side."""

    kernels: str  # Of `precondition`.
    softmax: str  # The library's softmax attention.
    # Makes `precondition` with the tiles of a whole shape, for checks at fewer tokens.
    gated: Callable[[Shape], Callable] | None = None

    def program(self, name: str, passes: str, arrays: dict) -> tuple[Callable, tuple]:
        """Returns one pass of an op, and its arguments."""
        if name in ("precondition", "xla"):
            kernels = self.kernels if name == "precondition" else "xla"
            op: Callable = functools.partial(precondition, implementation=kernels)
            names, cotangent = ["k", "v"], "y_bar"
        else:
            softmax = functools.partial(softmax_attention, implementation=self.softmax)
            op = lucid_attention if name == "lucid_attention" else softmax
            names, cotangent = ["q", "k", "v"], "o_bar"
        arguments = tuple(arrays[n] for n in names)
        if passes == "forward":
            return op, arguments
        return measuring.forward_and_backward(op), (*arguments, arrays[cotangent])


def prepare(
    backends: Backends, shape: Shape, name: str, passes: str
) -> Callable[[float], dict[str, object]]:
    """Checks LUCID, compiles all programs, and returns a function that times them in turns.

    It takes the seconds to spend and returns the record, with times in milliseconds.
    """
    arrays = shape.draw()
    solve, _ = backends.program("precondition", "forward", arrays)
    error = gate(shape, jax.jit(backends.gated(shape) if backends.gated else solve))
    residual = check_rows(shape, arrays["k"], arrays["v"], jax.jit(solve)(arrays["k"], arrays["v"]))
    contestants = [name, "softmax"]
    if name == "precondition" and shape.length <= _LONGEST_XLA:
        contestants.append("xla")
    repeats = shape.repeats(passes)
    runs, memory = {}, {}
    for contestant in contestants:
        op, arguments = backends.program(contestant, passes, arrays)
        memory[contestant] = measuring.temp_bytes(jax.jit(op).lower(*arguments).compile())
        runs[contestant] = repeated(op, arguments, repeats)
    kvy = sum(arrays[x].nbytes for x in ("k", "v", "y_bar"))

    def measure(seconds: float) -> dict[str, object]:
        times = measuring.interleaved(runs, seconds)
        ms = {c: 1e3 * statistics.median(times[c]) / repeats for c in runs}
        return {
            "shape": str(shape),
            "op": name,
            "pass": passes,
            "gate_error": error,
            "residual_in_roundings": residual,
            "median_ms": ms,
            "over_softmax": ms[name] / ms["softmax"],
            "temporaries_over_k_v_y": memory[name] / kvy,
            "softmax_temporaries_over_k_v_y": memory["softmax"] / kvy,
        }

    return measure


def table(records: Sequence[dict], softmax: str) -> str:
    """Returns a Markdown table of the records, with the name of softmax attention's library."""
    header = (
        "B×S, H/K, D", "op", "pass", "LUCID", f"softmax ({softmax})", "ratio", "others",
        "temporaries / (k+v+y): LUCID, softmax",
    )  # fmt: skip
    rows = []
    for x in records:
        ms = x["median_ms"]
        others = [f"{n} {t:.3g} ms" for n, t in ms.items() if n not in (x["op"], "softmax")]
        memory = x["temporaries_over_k_v_y"], x["softmax_temporaries_over_k_v_y"]
        rows.append(
            (
                x["shape"], f"`{x['op']}`", x["pass"], f"{ms[x['op']]:.3f} ms",
                f"{ms['softmax']:.3f} ms", f"{x['over_softmax']:.2f}", ", ".join(others) or "–",
                ", ".join(f"{m:.2f}" for m in memory),
            )
        )  # fmt: skip
    return reporting.markdown(header, rows)
