"""What the benchmark and the tuner share: inputs, compiled programs and the correctness gate."""

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
# Length of the largest dense float64 problem that is solved: 1.6 GB of temporaries.
DENSE_LENGTH = 4096
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
PASSES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One op of one backend.

    Attributes:
      name: its name in tables and results.
      op: the public function.
      implementation: the backend.
      inputs: names of the op's arguments among the arrays of `draw`.
      longest: the length beyond which it would need too much memory.
    """

    name: str
    op: Callable
    implementation: str
    inputs: tuple[str, ...]
    longest: int | None = None

    def call(self, implementation: str | None = None, precision: str | None = None) -> Callable:
        """Returns the op as a function of its arrays, by default as users call it."""
        implementation = implementation or self.implementation
        return functools.partial(self.op, implementation=implementation, precision=precision)


PRECONDITION = Contestant("precondition, xla", precondition, "xla", ("k", "v"))
DENSE = Contestant("precondition, dense", precondition, "reference", ("k", "v"), longest=8192)
SOFTMAX = Contestant("softmax attention, xla", softmax_attention, "xla", ("q", "k", "v"))


def draw(length: int) -> dict[str, np.ndarray]:
    """Returns float32 `q, k, v [1,S,K,D]` and a cotangent of the output.

    The keys share a direction, so that `A` is far from the identity (its entries are about
    `exp(√D(COSINE−1))`) and errors of the solve show.
    """
    rng = np.random.default_rng(length)
    shape = (1, length, HEADS, HEAD_DIM)
    common = rng.normal(size=(1, 1, HEADS, HEAD_DIM))
    arrays = {name: rng.normal(size=shape) for name in ("q", "k", "v", "cotangent")}
    arrays["k"] = np.sqrt(COSINE) * common + np.sqrt(1 - COSINE) * arrays["k"]
    return {name: x.astype(np.float32) for name, x in arrays.items()}


class Programs:
    """Both passes of a contestant, compiled for float32 inputs of one length."""

    def __init__(self, contestant: Contestant, arrays: Mapping[str, np.ndarray]):
        # Tiles may have changed since the op was last traced.
        jax.clear_caches()
        self._contestant = contestant
        arguments = tuple(jnp.asarray(arrays[name]) for name in contestant.inputs)
        self._arguments = {
            "forward": arguments,
            "forward+backward": (arguments, jnp.asarray(arrays["cotangent"])),
        }
        op = contestant.call()
        functions = {"forward": op, "forward+backward": measuring.forward_and_backward(op)}
        self._passes = {
            name: jax.jit(function).lower(*self._arguments[name]).compile()
            for name, function in functions.items()
        }

    def run(self, name: str):
        """Runs a pass and waits for it."""
        return jax.block_until_ready(self._passes[name](*self._arguments[name]))

    def temp_bytes(self, name: str) -> int:
        """Returns the peak memory of a pass beyond its arguments and results."""
        return measuring.temp_bytes(self._passes[name])

    def check(self, exact: Mapping[str, np.ndarray]) -> float:
        """Returns the largest relative error of both passes; raises GateError if too large."""
        name, tolerance = self._contestant.name, TOLERANCE["float32"]
        forward, both = {"out": self.run("forward")}, self.run("forward+backward")
        return max(
            measuring.judge(f"{name}, forward", forward, {"out": exact["out"]}, tolerance),
            measuring.judge(
                f"{name}, forward+backward", _named(self._contestant, *both), exact, tolerance
            ),
        )


def exact_results(
    contestant: Contestant, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the op's output and gradients by the blockwise backend in float64.

    Raises:
      GateError: on the first DENSE_LENGTH tokens they differ from the dense definition's.
    """
    first = {name: x[:, :DENSE_LENGTH] for name, x in arrays.items()}
    dense = _float64(contestant, "reference", first)
    blockwise = _float64(contestant, "xla", first)
    measuring.judge(f"{contestant.name} in float64", blockwise, dense, TOLERANCE["float64"])
    longer = arrays["k"].shape[1] > DENSE_LENGTH
    return _float64(contestant, "xla", arrays) if longer else blockwise


def _float64(contestant: Contestant, implementation: str, arrays) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        arguments = tuple(jnp.asarray(arrays[name], jnp.float64) for name in contestant.inputs)
        cotangent = jnp.asarray(arrays["cotangent"], jnp.float64)
        run = jax.jit(measuring.forward_and_backward(contestant.call(implementation, "highest")))
        results = _named(contestant, *run(arguments, cotangent))
        return {name: np.asarray(x) for name, x in results.items()}


def _named(contestant: Contestant, out, gradients) -> dict:
    names = [f"gradient of {name}" for name in contestant.inputs]
    return {"out": out, **dict(zip(names, gradients))}
