"""Training states to save and compare, shared by the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lucid_jax.checkpoint.manager import Checkpointer
from lucid_jax.config import CheckpointConfig
from lucid_jax.training.step import TrainState

CONFIG = {"model": {"num_layers": 2, "attention": "lucid"}, "seed": 0}
MESH_SHAPES = [(4, 2), (2, 4), (8, 1), (1, 1)]


def make_mesh(shape=(4, 2)):
    count = shape[0] * shape[1]
    return jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[:count])


def sharding_of(x, mesh):
    """Shards matrices over both axes, so that every mesh cuts them differently."""
    spec = PartitionSpec("fsdp", "tensor") if x.ndim == 2 else PartitionSpec()
    return NamedSharding(mesh, spec)


def make_state(step=1, mesh=None, width=256):
    """Returns a state determined by `step`; `embed` is random bits, which do not compress."""
    rng = np.random.default_rng(step)
    bits = rng.integers(2**32, size=(64, width), dtype=np.uint32)
    params = {
        "embed": jnp.asarray(bits.view(np.float32)),
        "mlp": [{"kernel": jnp.asarray(rng.standard_normal((8, 16)), jnp.bfloat16)}],
        # Values for which == is not bitwise equality.
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32),
        "key": jax.random.key_data(jax.random.key(step)),
        "scale": jnp.float32(step),
    }
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state = TrainState(jnp.int32(step), params, optax.adamw(1e-3).init(floats))
    return jax.device_put(state, jax.tree.map(lambda x: sharding_of(x, mesh or make_mesh()), state))


def abstract_of(tree, mesh=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding_of(x, mesh) if mesh else x.sharding
        ),
        tree,
    )


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def save_steps(directory, steps, losses=(), **config):
    with Checkpointer(directory, CheckpointConfig(**config)) as checkpointer:
        for step in steps:
            checkpointer.save(
                step,
                make_state(step),
                data_state={"0": {"offset": step}},
                config=CONFIG,
                eval_loss=dict(losses).get(step),
            )


def restore(directory, abstract=None):
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        return checkpointer.restore_latest(abstract or abstract_of(make_state()))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def data_files(step_directory):
    # Some of these orbax never reads again.
    return list((step_directory / "state").rglob("d/*"))
