"""Checkpoints that two processes write together, whole and damaged."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from checkpoint_states import CONFIG, abstract_of, names, restore
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lucid_jax.checkpoint import reader
from lucid_jax.checkpoint.manager import Checkpointer
from lucid_jax.config import CheckpointConfig

# Orbax abandons its other reads when one meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def python(call):
    """Starts a Python process that evaluates `call`, an expression on this module."""
    paths = ["tests", "tests/checkpoint"]
    code = f"import sys; sys.path[:0] = {paths}; import processes_test as t; t.{call}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=toy.ROOT)


def one_of_two_processes(index, port, directory):
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    sharding = NamedSharding(jax.make_mesh((4,), ("fsdp",)), PartitionSpec("fsdp"))
    fill = jax.jit(lambda x: {"params": jnp.full((8, 4), x)}, out_shardings=sharding)

    def save(checkpointer, step):
        checkpointer.save(
            step,
            fill(step),
            data_state={str(2 * i + index): {"offset": step} for i in range(2)},
            config=CONFIG,
            eval_loss=None,
        )

    read_arrays = reader._read_arrays

    def read_arrays_except_step_3(path, abstract):
        if path.parent.name == "3":
            raise FileNotFoundError("only on this process")
        return read_arrays(path, abstract)

    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, step)
    # Both processes see the damage of step 2, and only one that of step 3.
    if index == 0:
        (pathlib.Path(directory) / "2" / "record" / "process_1.json").unlink()
    else:
        reader._read_arrays = read_arrays_except_step_3
    multihost_utils.sync_global_devices("damaged")
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_latest(abstract_of(fill(0)))
        assert restored.step == 1
        assert restored.data_state == {str(i): {"offset": 1} for i in range(4)}
        assert jax.jit(lambda x: (x == 1).all())(restored.state["params"])
        save(checkpointer, 2)


@pytest.mark.slow
def test_two_processes_save_what_one_restores(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    port = toy.free_port()
    processes = [python(f"one_of_two_processes({i}, {port}, {str(tmp_path)!r})") for i in range(2)]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert names(tmp_path) == ["1", "2", "2.damaged", "3.damaged"]
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=one_device)
    restored = restore(tmp_path, {"params": abstract})
    assert restored.data_state == {str(i): {"offset": 2} for i in range(4)}
    np.testing.assert_array_equal(restored.state["params"], np.full((8, 4), 2))
