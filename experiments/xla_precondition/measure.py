"""What the benchmark and the tuner share: inputs and the correctness gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measuring
from lucid_jax import precondition, softmax_attention

HEADS = 2
HEAD_DIM = 64
COSINE = 0.5
# The largest dense float64 problem that the gate solves: 1.6 GB of temporaries.
DENSE_ROWS = 4096
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One op of one backend.

    Attributes:
      name: In tables and results.
      op: The public function.
      implementation: Its backend.
      inputs: Names of its arguments, as `draw` has them.
      longest: It is left out beyond this S, where its memory is not sane.
    """

    name: str
    op: Callable
    implementation: str
    inputs: tuple[str, ...]
    longest: int | None = None

    def call(self, implementation: str | None = None, precision: str | None = None) -> Callable:
        """The op as a function of its arrays; by default as users call it."""
        implementation = implementation or self.implementation
        return functools.partial(self.op, implementation=implementation, precision=precision)


PRECONDITION = Contestant("precondition, xla", precondition, "xla", ("k", "v"))
DENSE = Contestant("precondition, dense", precondition, "reference", ("k", "v"), longest=8192)
SOFTMAX = Contestant("softmax attention, xla", softmax_attention, "xla", ("q", "k", "v"))


def draw(length: int) -> dict[str, np.ndarray]:
    """float32 `q, k, v [1,S,K,D]` and a cotangent of the output.

    Keys share a direction, so that `A` is far from the identity (its entries are
    about `exp(√D(COSINE−1))`) and an error in the solve cannot hide.
    """
    rng = np.random.default_rng(length)
    shape = (1, length, HEADS, HEAD_DIM)
    common = rng.normal(size=(1, 1, HEADS, HEAD_DIM))
    arrays = {name: rng.normal(size=shape) for name in ("q", "k", "v", "cotangent")}
    arrays["k"] = np.sqrt(COSINE) * common + np.sqrt(1 - COSINE) * arrays["k"]
    return {name: x.astype(np.float32) for name, x in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Programs:
    """Both passes of a contestant, compiled for float32 inputs of one length."""

    passes: Mapping[str, jax.stages.Compiled]
    arguments: tuple[jax.Array, ...]
    cotangent: jax.Array

    @classmethod
    def compile(cls, contestant: Contestant, arrays: Mapping[str, np.ndarray]) -> Programs:
        """Traces and compiles anew, whatever was traced before."""
        jax.clear_caches()
        arguments = tuple(jnp.asarray(arrays[name]) for name in contestant.inputs)
        cotangent = jnp.asarray(arrays["cotangent"])
        op = contestant.call()
        both = jax.jit(measuring.forward_and_backward(op)).lower(arguments, cotangent).compile()
        passes = {"forward": jax.jit(op).lower(*arguments).compile(), "forward+backward": both}
        return cls(passes, arguments, cotangent)

    def run(self, name: str):
        """Runs the pass to its end."""
        arguments = self.arguments if name == "forward" else (self.arguments, self.cotangent)
        return jax.block_until_ready(self.passes[name](*arguments))

    def temp_bytes(self, name: str) -> int:
        """Peak of what the compiled pass allocates beside arguments and results."""
        return measuring.temp_bytes(self.passes[name])


class Gate:
    """Judges the programs of one op at one length before anybody times them.

    In float64, the blockwise op must agree with the dense definition on the first
    `min(S, DENSE_ROWS)` rows. Then the very programs that are timed must agree with
    the float64 blockwise op on all S rows: outputs and every gradient.
    """

    def __init__(self, contestant: Contestant, arrays: Mapping[str, np.ndarray]):
        self._contestant = contestant
        head = {name: x[:, :DENSE_ROWS] for name, x in arrays.items()}
        dense = _float64(contestant, "reference", head)
        blockwise = _float64(contestant, "xla", head)
        measuring.judge(f"{contestant.name} in float64", blockwise, dense, TOLERANCE["float64"])
        self._exact = blockwise
        if arrays["k"].shape[1] > DENSE_ROWS:
            self._exact = _float64(contestant, "xla", arrays)

    def check(self, name: str, programs: Programs) -> float:
        """The largest relative error of the programs' results; raises GateError if too large."""
        names = ("out", *(f"gradient of {name}" for name in self._contestant.inputs))
        tolerance = TOLERANCE["float32"]
        out, gradients = programs.run("forward+backward")
        found = dict(zip(names, (out, *gradients)))
        alone = {"out": programs.run("forward")}
        return max(
            measuring.judge(f"{name}, forward", alone, {"out": self._exact["out"]}, tolerance),
            measuring.judge(f"{name}, forward+backward", found, self._exact, tolerance),
        )


def _float64(contestant: Contestant, implementation: str, arrays) -> dict[str, np.ndarray]:
    """The output and the gradients by name, computed in float64."""
    names = ("out", *(f"gradient of {name}" for name in contestant.inputs))
    with jax.enable_x64(True):
        arguments = tuple(jnp.asarray(arrays[name], jnp.float64) for name in contestant.inputs)
        cotangent = jnp.asarray(arrays["cotangent"], jnp.float64)
        run = jax.jit(measuring.forward_and_backward(contestant.call(implementation, "highest")))
        out, gradients = run(arguments, cotangent)
        return {name: np.asarray(x) for name, x in zip(names, (out, *gradients))}


def lengths(text: str) -> tuple[int, ...]:
    """Parses `512,1024`."""
    return tuple(int(x) for x in text.split(","))
