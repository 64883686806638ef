"""One attention layer on permutations of ten tokens, cheap enough for a CPU.

Nothing depends on positions, so sequences differ only in which token comes before which.
Everything is therefore computed by token instead of by position: one 10×10 table of logits and one
of `A` serve every sequence under its own mask, and only making the tables costs products of width
256. The library's ops on the sequences themselves give the same, which `disagreement` measures.

    V  tokens, 10, also the length of a sequence    E  width, 256    B  batch, 64
"""

from __future__ import annotations

import functools
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
    """Returns parameters: embeddings of deviation 0.02, Xavier-uniform projections, one bias.

    Keys, queries and values are `[E,E]` maps of the embedding; `out [E]` and `bias` turn the
    attention's output into a number. There is no residual, no norm and no MLP.
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
    """Returns sequences `[B,V]`, random permutations of the tokens."""
    return jnp.argsort(jax.random.uniform(key, (BATCH, TOKENS)), -1)


def visible(sequences: jax.Array) -> jax.Array:
    """Returns whether token `u` stands before token `t`, or is `t`: `[B,t,u]`."""
    position = jnp.argsort(sequences, -1)
    return position[:, None, :] <= position[:, :, None]


def target(seen: jax.Array, second_phase: jax.Array) -> jax.Array:
    """Returns by token its own number, or in the second phase the average so far: `[B,V]`."""
    number = jnp.arange(TOKENS, dtype=jnp.float32)
    return jnp.where(second_phase, jnp.sum(seen * number, -1) / jnp.sum(seen, -1), number)


def attend(
    params: dict[str, jax.Array],
    seen: jax.Array,
    kind: str,
    temperature: jax.typing.ArrayLike,
    shifts: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the layer's outputs, by token.

    Args:
      params: Parameters as `init` makes them.
      seen: The result of `visible`.
      kind: `"lucid"` or `"softmax"`.
      temperature: Divides the logits.
      shifts: Zeros `[B,V,V]` that are added to logits and probabilities, to take gradients.

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
    """Returns `A⁻¹ v` in every sequence's order, from keys `[V,E]` and `v [B,V]`."""
    keys = Keys(normalize_keys(k)[None, None], None)
    before = seen & ~jnp.eye(TOKENS, dtype=bool)
    a = jnp.where(before, gram_tile(keys, keys, _HIGHEST)[0, 0], 0)
    y = v
    # Exact after V − 1 rounds, when the first row has reached the last. For long sequences this
    # would lose all digits (powers of the lower part grow with binomials); here they are below 2⁹.
    for _ in range(TOKENS - 1):
        y = v - jnp.sum(a * y[:, None], -1)
    return y


def by_ops(
    params: dict[str, jax.Array], sequences: jax.Array, kind: str, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """Returns the layer's outputs by the library's ops, by position `[B,V]`."""
    x = params["embedding"][sequences]
    q, k, v = (jnp.matmul(x, params[name])[:, :, None] for name in ("query", "key", "value"))
    op = lucid_attention if kind == "lucid" else softmax_attention
    o = op(q / temperature, k, v, implementation="xla", precision="highest")[:, :, 0]
    return o @ params["out"] + params["bias"]


@functools.partial(jax.jit, static_argnames="kind")
def disagreement(
    params: dict[str, jax.Array], kind: str, temperature: jax.Array, seed: int
) -> jax.Array:
    """Returns the largest relative difference from the library's ops, of models `[N,…]`.

    That is `‖by token − by ops‖/‖by ops‖` over the outputs and each parameter's gradient.
    """
    key = jax.random.key(seed)
    sequences = draw(key)
    cotangent = jax.random.normal(key, sequences.shape)
    zeros = jnp.zeros((BATCH, TOKENS, TOKENS))

    def by_token(params):
        outputs = attend(params, visible(sequences), kind, temperature, (zeros, zeros))[0]
        return jnp.take_along_axis(outputs, sequences, -1)

    def compare(params):
        results = []
        for f in (by_token, lambda params: by_ops(params, sequences, kind, temperature)):
            outputs, pull_back = jax.vjp(f, params)
            results.append(jax.tree.leaves((outputs, pull_back(cotangent))))
        norms = [(jnp.linalg.norm(a - b), jnp.linalg.norm(b)) for a, b in zip(*results)]
        return jnp.stack([difference / norm for difference, norm in norms]).max()

    return jax.lax.map(compare, params).max()
