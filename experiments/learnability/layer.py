"""One attention layer over rows that are permutations of ten tokens, cheap enough for a CPU.

Nothing depends on positions, so rows differ only in which token comes before which. All is
written by token instead of by position: one 10×10 table of logits and one of `A` serve every
row under its own mask, and the width of 256 is met only where the tables are made. What the
library's ops give on the rows themselves is the same, which `disagreement` measures.

    V  tokens, 10, the length of a row too    E  width, 256    B  rows of a batch, 64
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lucid_jax import lucid_attention, softmax_attention
from lucid_jax.ops.precondition.gram import Keys, gram_tile, normalize_keys

TOKENS = 10
WIDTH = 256
BATCH = 64
_HIGHEST = jax.lax.Precision.HIGHEST


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Parameters: embeddings of deviation 0.02, Xavier-uniform projections, no bias but one.

    Keys, queries and values are `[E,E]` maps of the embedding; `out [E]` and `bias` make a
    number of what is attended to. No residual, no norm, no MLP.
    """
    keys = jax.random.split(key, 5)
    xavier = jax.nn.initializers.xavier_uniform()
    return {
        "embedding": 0.02 * jax.random.normal(keys[0], (TOKENS, WIDTH)),
        "query": xavier(keys[1], (WIDTH, WIDTH)),
        "key": xavier(keys[2], (WIDTH, WIDTH)),
        "value": xavier(keys[3], (WIDTH, WIDTH)),
        "out": xavier(keys[4], (WIDTH, 1))[:, 0],
        "bias": jnp.zeros(()),
    }


def draw(key: jax.Array) -> jax.Array:
    """Rows `[B,V]`: random permutations of the tokens."""
    return jnp.argsort(jax.random.uniform(key, (BATCH, TOKENS)), -1)


def seen(rows: jax.Array) -> jax.Array:
    """`[B,V,V]`: whether token `u` stands before token `t` in a row, or is `t`."""
    position = jnp.argsort(rows, -1)
    return position[:, None, :] <= position[:, :, None]


def target(seen: jax.Array, second_phase: jax.Array) -> jax.Array:
    """`[B,V]`, by token: its own number, or in the second phase the average of those so far."""
    number = jnp.arange(TOKENS, dtype=jnp.float32)
    return jnp.where(second_phase, jnp.sum(seen * number, -1) / jnp.sum(seen, -1), number)


def attend(
    params: dict[str, jax.Array],
    seen: jax.Array,
    kind: str,
    temperature: jax.typing.ArrayLike,
    shifts: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The layer's outputs, by token.

    Args:
      params: As `init` makes them.
      seen: Of the rows.
      kind: `"lucid"` or `"softmax"`.
      temperature: Divides the logits.
      shifts: Zeros `[B,V,V]`, added to logits and probabilities: their gradients are those of
        logits and probabilities.

    Returns:
      Outputs `[B,V]`, logits `[V,V]` and probabilities `[B,V,V]`.
    """
    q, k, v = (jnp.matmul(params["embedding"], params[x]) for x in ("query", "key", "value"))
    logits = q @ k.T / (math.sqrt(WIDTH) * temperature)
    shifted = jnp.where(seen, logits + shifts[0], -jnp.inf)
    probabilities = jax.nn.softmax(shifted, -1) + shifts[1]
    # `out` may come before the solve and the sum, since both are linear in the values.
    y = jnp.broadcast_to(v @ params["out"], seen.shape[:2])
    if kind == "lucid":
        y = _solve(k, y, seen)
    return jnp.sum(probabilities * y[:, None], -1) + params["bias"], logits, probabilities


def _solve(k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """`A⁻¹ v` in every row's order; keys `[V,E]`, `v [B,V]`."""
    keys = Keys(normalize_keys(k)[None, None], None)
    before = seen & ~jnp.eye(TOKENS, dtype=bool)
    a = jnp.where(before, gram_tile(keys, keys, _HIGHEST)[0, 0], 0)
    y = v
    # Exact after V − 1 rounds, when the first row has reached the last. For long rows this
    # would lose all digits (powers of the lower part grow with binomials); here they are below 2⁹.
    for _ in range(TOKENS - 1):
        y = v - jnp.sum(a * y[:, None], -1)
    return y


def by_ops(
    params: dict[str, jax.Array], rows: jax.Array, kind: str, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """The layer's outputs by the library's ops on the rows themselves, `[B,V]` by position."""
    x = params["embedding"][rows]
    q, k, v = (jnp.matmul(x, params[name])[:, :, None] for name in ("query", "key", "value"))
    op = lucid_attention if kind == "lucid" else softmax_attention
    o = op(q / temperature, k, v, implementation="xla", precision="highest")[:, :, 0]
    return o @ params["out"] + params["bias"]


def disagreement(
    params: dict[str, jax.Array], kind: str, temperature: float, key: jax.Array
) -> jax.Array:
    """How far outputs and parameter gradients by token are from those by the library's ops.

    Returns:
      The largest `‖difference‖/‖by ops‖` over the outputs and each gradient.
    """
    rows = draw(key)
    cotangent = jax.random.normal(key, rows.shape)
    zeros = jnp.zeros((2, BATCH, TOKENS, TOKENS))

    def by_position(params):
        outputs = attend(params, seen(rows), kind, temperature, (zeros[0], zeros[1]))[0]
        return jnp.take_along_axis(outputs, rows, -1)

    results = []
    for f in (by_position, lambda params: by_ops(params, rows, kind, temperature)):
        outputs, pull_back = jax.vjp(f, params)
        results.append(jax.tree.leaves((outputs, pull_back(cotangent))))
    return jnp.stack([jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(*results)]).max()
