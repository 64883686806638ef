"""`softmax_attention`: argument checks, and the choice of a backend."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from lucid_jax.ops import check
from lucid_jax.ops.attention import cudnn, mosaic_gpu, path, reference, splash, triton, xla
from lucid_jax.ops.numerics import accumulator_dtype
from lucid_jax.ops.per_device import per_device
from lucid_jax.ops.transitions import Transitions, check_transitions, for_transitions


class SubsetBackend(NamedTuple):
    """Attention whose queries are a subset of the sequence; see `xla.forward`."""

    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]

    @classmethod
    def from_differentiable(cls, attend: Callable[..., jax.Array]) -> SubsetBackend:
        """Splits `o = attend(scale, precision, positions, q, k, v)` by its own gradient."""

        def forward(scale, precision, q, k, v, positions):
            return jax.vjp(functools.partial(attend, scale, precision, positions), q, k, v)

        def backward(scale, precision, pull_back, o_bar):
            del scale, precision
            return pull_back(o_bar)

        return cls(forward, backward)


class Backend(NamedTuple):
    """Attention of whole sequences, and of a subset of the queries where the backend has it."""

    attention: Callable[..., jax.Array]
    subset: SubsetBackend | None = None


_BACKENDS = {
    "reference": Backend(reference.attention),
    "xla": Backend(xla.attention, SubsetBackend(xla.forward, xla.backward)),
    "cudnn": Backend(cudnn.attention),
    "triton": Backend(triton.attention),
    "mosaic_gpu": Backend(mosaic_gpu.attention),
    "splash": Backend(splash.attention, SubsetBackend.from_differentiable(splash.attend)),
}
# With transitions.
_PATH_BACKENDS = {
    **_BACKENDS,
    "xla": Backend(functools.partial(path.attention, False)),
    "triton": Backend(functools.partial(path.attention, True)),
}


# Below it, the factor of logits comes near the largest float32.
_LEAST_TEMPERATURE = 1e-30


def choose_backend(
    implementation: str | None,
    q: jax.Array,
    segment_ids: jax.Array | None,
    precision: jax.lax.Precision | None,
    transitions: Transitions | None = None,
) -> Backend:
    """Chooses the backend that `implementation` names, or the best for the device.

    Raises:
      ValueError: an implementation that is unknown or cannot run the call.
    """
    reasons = {
        "cudnn": cudnn.unsupported(q, segment_ids, precision),
        "triton": triton.unsupported(q),
        "mosaic_gpu": mosaic_gpu.unsupported(q, precision),
        "splash": splash.unsupported(q, precision),
    }
    if mosaic_gpu.is_fastest(q):
        reasons = {name: reasons[name] for name in ("cudnn", "mosaic_gpu")} | reasons
    if transitions is None:
        return check.backend("attention", implementation, _BACKENDS, reasons)
    return check.backend("attention", implementation, _PATH_BACKENDS, for_transitions(reasons))


def choose_subset_backend(implementation: str | None, q: jax.Array) -> SubsetBackend:
    """`choose_backend` among those whose queries may be a subset of the sequence."""
    backends = {name: x.subset for name, x in _BACKENDS.items() if x.subset}
    return check.backend(
        "attention", implementation, backends, {"splash": splash.unsupported(q, None)}
    )


def logits_scale(temperature: float, d: int) -> float:
    """Returns `1/(τ√D)`.

    Raises:
      TypeError: a temperature that is not a number.
      ValueError: a temperature that is not positive, or so small that logits overflow.
    """
    if not isinstance(temperature, numbers.Real | np.ndarray) or np.ndim(temperature):
        raise TypeError(f"temperature must be a number; got {type(temperature).__name__}")
    if not temperature >= _LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be positive, at least {_LEAST_TEMPERATURE}; got {temperature}"
        )
    return 1 / (float(temperature) * math.sqrt(d))


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    transitions: Transitions | None = None,
    temperature: float | jax.Array = 1.0,
    implementation: str | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Computes causal softmax attention with grouped queries, `softmax(q kᵀ/(τ√D)) v`.

    Args:
      q: Queries `[B,S,H,D]`, float16, bfloat16, float32 or float64, after RoPE.
      k: Keys `[B,S,K,D]` of the same dtype; K divides H, and query head `h` reads
        key/value head `h // (H/K)`.
      v: Values `[B,S,K,D]` of the same dtype and width. (Narrower ones can be padded with zeros.)
      segment_ids: Integers `[B,S]`, told apart by their low 32 bits; tokens see only tokens of the
        same id. None is one segment.
      transitions: Those of PaTH attention, for queries and keys without RoPE: `q_i·k_j` becomes
        `q_iᵀ H_i ⋯ H_{j+1} k_j`. By `"triton"`, `"xla"` or `"reference"`.
      temperature: τ > 0; below 1 it sharpens the weights. A JAX scalar gets a gradient, and is
        not checked; the queries are divided by it.
      implementation: None takes the first of cuDNN, the fastest of our kernels for GPUs and splash
        attention that can run the call, and the blockwise XLA path elsewhere; `"cudnn"`, `"triton"`
        and `"mosaic_gpu"` (our kernels; the latter for Hopper GPUs, 16 bits, D of at most 128 and
        the default precision), `"splash"`, `"xla"`, `"reference"` run that or raise.
      precision: As in `precondition`.

    Returns:
      `o [B,S,H,D]`, dtype of `q`.

    Raises:
      TypeError: a dtype that is not supported or does not match.
      ValueError: shapes that do not match, a temperature that is not positive, or an
        implementation that is unknown or cannot run the call.
    """
    segment_ids = check.attention_inputs(q, k, v, segment_ids)
    full = check.precision(precision)
    if transitions is not None:
        check_transitions(transitions, k)
    backend = choose_backend(implementation, q, segment_ids, full, transitions)
    if isinstance(temperature, jax.Array):
        # Queries take a factor that only the device knows, and pass its gradient.
        q = (q.astype(accumulator_dtype(q.dtype)) / temperature).astype(q.dtype)
        temperature = 1.0
    scale = logits_scale(temperature, q.shape[-1])
    return _attention(backend.attention, scale, full, q, k, v, segment_ids, transitions)


# Compiled once for a shape, also where it is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _attention(
    attention: Callable[..., jax.Array],
    scale: float,
    precision: jax.lax.Precision | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    transitions: Transitions | None,
) -> jax.Array:
    def attend(q, k, v, segment_ids, transitions):
        dtype = q.dtype
        if precision is not None:
            # Full precision means full operands too, not only full products.
            q, k, v, transitions = jax.tree.map(
                lambda x: x.astype(accumulator_dtype(dtype)), (q, k, v, transitions)
            )
        of_path = () if transitions is None else (transitions,)
        return attention(q, k, v, segment_ids, scale, precision, *of_path).astype(dtype)

    axes = "BSHD", "BSKD", "BSKD", "BS", cast(Any, Transitions)("BSKD", "BSK")
    return per_device(attend, axes, "BSHD", q, k, v, segment_ids, transitions)
