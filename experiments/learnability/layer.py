"""One attention layer on permutations of ten tokens, cheap enough for a CPU.

Nothing depends on positions, so sequences differ only in which token comes before which.
Everything is therefore computed by token instead of by position: one 10×10 table of logits and one
of `A` serve every sequence under its own mask, and only making the tables costs products of width
256. The library's ops on the sequences themselves give the same.

    V  tokens, 10, also the length of a sequence    E  width, 256    B  batch, 64
"""

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
    """Returns the layer's outputs `[B,V]` by token, logits `[V,V]` and probabilities `[B,V,V]`.

    `seen` is the result of `visible`, the kind `"lucid"` or `"softmax"`. The shifts are zeros
    `[B,V,V]` that are added to logits and probabilities, to take gradients.
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


@functools.partial(jax.jit, static_argnames=("kind", "by_ops"))
def outputs_and_gradients(
    params: dict[str, jax.Array], kind: str, temperature: jax.Array, *, by_ops: bool
) -> dict[str, jax.Array]:
    """Returns outputs and gradients of models `[N,…]`, by token or by the library's ops."""
    key = jax.random.key(0)
    sequences = draw(key)
    cotangent = jax.random.normal(key, sequences.shape)

    def token_layer(params):
        zeros = jnp.zeros((BATCH, TOKENS, TOKENS))
        outputs = attend(params, visible(sequences), kind, temperature, (zeros, zeros))[0]
        return jnp.take_along_axis(outputs, sequences, -1)

    def library_layer(params):
        x = params["embedding"][sequences]
        q, k, v = (jnp.matmul(x, params[name])[:, :, None] for name in ("query", "key", "value"))
        op = lucid_attention if kind == "lucid" else softmax_attention
        o = op(q / temperature, k, v, implementation="xla", precision="highest")[:, :, 0]
        return o @ params["out"] + params["bias"]

    def run(params):
        outputs, pull_back = jax.vjp(library_layer if by_ops else token_layer, params)
        gradients = {f"gradient of {name}": x for name, x in pull_back(cotangent)[0].items()}
        return {"outputs": outputs, **gradients}

    return jax.lax.map(run, params)
