"""Both phases of training in one compiled loop, and the records of each step."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.learnability import layer

RATE = 1e-4


@functools.partial(jax.jit, static_argnames=("kind", "steps", "every"))
def train(
    kind: str,
    temperature: jax.Array,
    seeds: jax.Array,
    first_phase: jax.Array,
    steps: int,
    every: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Trains one model a seed with Adam, whose moments are kept when the task changes.

    The steps are those of both phases, `first_phase` those of the first, and a record averages over
    `every`. Returns final parameters, each `[N,…]`, and records, each `[N,steps/every]`.
    """
    optimizer = optax.adam(RATE)

    def train_seed(seed):
        init_key, data_key = jax.random.split(jax.random.key(seed))
        params = layer.init(init_key)

        def step(state, i):
            params, moments = state
            seen = layer.visible(layer.draw(jax.random.fold_in(data_key, i)))
            target = layer.target(seen, i >= first_phase)
            gradient, record = _gradient_and_record(params, seen, target, kind, temperature)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), record

        def window(state, steps):
            state, records = jax.lax.scan(step, state, steps)
            return state, jax.tree.map(lambda x: x.mean(0), records)

        (params, _), records = jax.lax.scan(
            window, (params, optimizer.init(params)), jnp.arange(steps).reshape(-1, every)
        )
        return params, records

    # Never tf32 on GPUs: probabilities of 0.9998 differ in their fourth digit.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(train_seed)(seeds)


def _gradient_and_record(params, seen, target, kind, temperature):
    """Returns the gradient of the mean squared error, and scalars that describe the step."""
    zeros = jnp.zeros(seen.shape)

    def loss(params, shifts):
        outputs, logits, probabilities = layer.attend(params, seen, kind, temperature, shifts)
        return jnp.mean((outputs - target) ** 2), (logits, probabilities)

    (value, (logits, probabilities)), (gradient, (to_logits, to_probabilities)) = (
        jax.value_and_grad(loss, (0, 1), has_aux=True)(params, (zeros, zeros))
    )
    before = seen & ~jnp.eye(layer.TOKENS, dtype=bool)

    def off_diagonal(x):
        return jnp.sum(jnp.abs(x) * before)

    return gradient, {
        "loss": value,
        "diagonal_logit": jnp.mean(jnp.diagonal(logits)),
        "diagonal_probability": jnp.mean(jnp.diagonal(probabilities, axis1=1, axis2=2)),
        "logits_gradient": jnp.linalg.norm(to_logits),
        # The logits' gradient over the probabilities' gradient: how much the softmax lets through.
        "off_diagonal_jacobian": off_diagonal(to_logits) / off_diagonal(to_probabilities),
    }
