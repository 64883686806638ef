"""Checkpoints are bit-exact on any mesh, survive damage, and are never overwritten."""

import errno
import json
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from checkpoint_states import (
    CONFIG,
    MESH_SHAPES,
    abstract_of,
    assert_same,
    data_files,
    make_mesh,
    make_state,
    names,
    restore,
    save_steps,
)
from jax.sharding import NamedSharding, PartitionSpec

from lucid_jax.checkpoint import reader
from lucid_jax.checkpoint.manager import Checkpointer, checkpoint_directory, save_params
from lucid_jax.checkpoint.reader import CheckpointError
from lucid_jax.checkpoint.record import named_leaves
from lucid_jax.checkpoint.restore import restore_params, saved_config
from lucid_jax.config import CheckpointConfig, Config, ConfigError

# Orbax abandons its other reads when one meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# Round trips.


@pytest.mark.parametrize("target", MESH_SHAPES, ids=str)
@pytest.mark.parametrize("source", MESH_SHAPES[::3], ids=str)
def test_round_trip_onto_any_mesh_is_bit_exact(tmp_path, source, target):
    state = make_state(3, make_mesh(source))
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(
            3, state, data_state={"0": {10: None, 9: 0.1}}, config=CONFIG, eval_loss=1.5
        )
        abstract = abstract_of(state, make_mesh(target))
        restored = checkpointer.restore_latest(abstract)
    assert restored.step == 3
    assert restored.data_state == {"0": {"10": None, "9": 0.1}}
    assert restored.config == CONFIG
    assert_same(restored.state, state)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
        lambda x: x.sharding, abstract
    )


def addresses(x):
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def test_buffers_may_be_donated_after_save_and_after_restore(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    # Orbax sometimes gives the replicas of an array one buffer, so there are several arrays.
    sharding = NamedSharding(make_mesh(), PartitionSpec(None, "tensor"))
    fill = jax.jit(lambda: {str(i): jnp.full((512, 512), i) for i in range(10)})
    saved = jax.device_put(fill(), sharding)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, saved, data_state={}, config={}, eval_loss=None)
        for _ in range(5):
            saved = overwrite(saved)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved
        )
        restored = checkpointer.restore_latest(abstract).state
    before = jax.tree.map(addresses, restored)
    assert all(len(set(buffers)) == 8 for buffers in before.values())
    # Values are compared last, because jax 0.11 copies arrays that numpy has seen.
    overwritten = overwrite(restored)
    assert jax.tree.map(addresses, overwritten) == before
    assert_same(overwritten, overwrite(fill()))


# Retention.


def test_keeps_the_last_and_the_best(tmp_path):
    losses = [(1, float("nan")), (2, 2.0), (3, 5.0), (4, 3.0), (5, 1.0)]
    save_steps(tmp_path, range(1, 6), losses, keep_last=2, keep_best=2)
    assert names(tmp_path) == ["2", "4", "5"]
    # A new process reads the losses of the old one.
    save_steps(tmp_path, range(6, 9), losses, keep_last=2, keep_best=2)
    assert names(tmp_path) == ["2", "5", "7", "8"]


def test_a_checkpoint_without_a_loss_is_never_best(tmp_path):
    save_steps(tmp_path, range(1, 4), keep_last=1, keep_best=3)
    assert names(tmp_path) == ["3"]
    assert restore(tmp_path).eval_loss is None
    save_steps(tmp_path, [4], [(4, 0.25)])
    assert restore(tmp_path).eval_loss == 0.25


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for content in (1, 2):
            checkpointer.save(
                5, make_state(content), data_state={}, config={}, eval_loss=float(content)
            )
        assert_same(checkpointer.restore_latest(abstract_of(make_state())).state, make_state(1))


def test_refuses_to_save_below_a_later_step(tmp_path):
    save_steps(tmp_path, [5])
    with pytest.raises(CheckpointError, match=r"cannot save step 4: .* holds the later step 5"):
        save_steps(tmp_path, [4])


# Damage.


def truncate(directory):
    for path in data_files(directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(directory):
    for path in data_files(directory):
        path.unlink()


def flip_array_bit(directory):
    embed = np.asarray(make_state(int(directory.name)).params["embed"]).tobytes()
    piece = embed[: 4 * 8]
    hits = [path for path in data_files(directory) if piece in path.read_bytes()]
    assert hits
    for path in hits:
        flipped = bytes([piece[0] ^ 1]) + piece[1:]
        path.write_bytes(path.read_bytes().replace(piece, flipped))


def garble_record(directory):
    (directory / "record" / "process_0.json").write_bytes(b"\xff{]")


def alter_record(directory):
    path = directory / "record" / "process_0.json"
    content = json.loads(path.read_text())
    content["record"]["data_state"]["0"]["offset"] += 1
    path.write_text(json.dumps(content))


def delete_record(directory):
    (directory / "record" / "process_0.json").unlink()


def garble_metadata(directory):
    for path in directory.rglob("_[A-Z]*"):
        path.write_text("{]")


def delete_state(directory):
    shutil.rmtree(directory / "state")


SLOW = (truncate, delete, garble_record, alter_record, garble_metadata, delete_state)


@pytest.mark.parametrize(
    "damage",
    [flip_array_bit, delete_record, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)],
)
def test_a_damaged_newest_is_set_aside_and_the_one_before_restored(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2])
    damage(tmp_path / "2")
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_latest(abstract_of(make_state()))
        assert restored.step == 1
        assert restored.data_state == {"0": {"offset": 1}}
        assert_same(restored.state, make_state(1))
        assert f"Skipping damaged checkpoint {tmp_path}/2: " in caplog.text
        if damage is flip_array_bit:
            assert "the saved and the restored bits differ in params.embed" in caplog.text
        assert names(tmp_path) == ["1", "2.damaged"]
        # The run resumes and reaches step 2 again.
        checkpointer.save(2, make_state(2), data_state={}, config={}, eval_loss=None)
    assert_same(restore(tmp_path).state, make_state(2))


def test_damage_twice_in_one_step_keeps_both(tmp_path):
    save_steps(tmp_path, [1])
    for _ in range(2):
        save_steps(tmp_path, [2])
        truncate(tmp_path / "2")
        restore(tmp_path)
    assert names(tmp_path) == ["1", "2.damaged", "2.damaged.damaged"]


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    save_steps(tmp_path, [1, 2])
    garble_record(tmp_path / "1")
    truncate(tmp_path / "2")
    for _ in range(2):  # If the first start moved them away, the second would be a new run.
        with pytest.raises(CheckpointError, match=r"all checkpoints .* damaged \(steps 2, 1\)"):
            restore(tmp_path)
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ESTALE, "Stale file handle"),
        TimeoutError("the server does not answer"),
        ValueError("RESOURCE_EXHAUSTED: Error opening 'zarr' driver: [Too many open files]"),
    ],
    ids=str,
)
def test_errors_of_the_machine_are_not_damage(tmp_path, monkeypatch, error):
    save_steps(tmp_path, [1])

    monkeypatch.setattr(reader, "_read_arrays", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        restore(tmp_path)
    assert names(tmp_path) == ["1"]


def test_an_unfinished_save_is_ignored(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert restore_params(tmp_path, abstract_of(make_state().params))[0] == 1
    assert restore(tmp_path).step == 1
    assert "damaged" not in caplog.text
    save_steps(tmp_path, [3])
    assert names(tmp_path) == ["1", "3"]


def test_an_error_while_writing_is_raised_by_the_next_call(tmp_path, monkeypatch):
    disk_full = mock.Mock(side_effect=OSError("disk full"))
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", disk_full)
    with pytest.raises(OSError, match="disk full"):
        save_steps(tmp_path, [1])
    assert restore(tmp_path) is None


# Mismatch.


def test_another_model_is_an_error_that_names_leaves_and_moves_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    other = make_state(width=512)
    other.params["head"] = other.params.pop("scale")
    with pytest.raises(ConfigError) as error:
        restore(tmp_path, abstract_of(other))
    message = str(error.value)
    assert f"checkpoint {tmp_path}/2 is of another model" in message
    assert "params.embed (expected float32[64,512], found float32[64,256])" in message
    assert "params.head (expected float32[], found nothing)" in message
    assert "\n" not in message
    assert names(tmp_path) == ["1", "2"]
    with pytest.raises(ConfigError, match=r"params.scale \(expected nothing, found float32\[\]\)"):
        restore_params(tmp_path, abstract_of(other.params))


def test_another_dtype_is_an_error(tmp_path):
    save_steps(tmp_path, [1])
    params = make_state().params
    params["embed"] = params["embed"].astype(jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"expected bfloat16\[64,256\], found float32\[64,256\]"):
        restore_params(tmp_path, abstract_of(params))


# Parameters only.


def test_restore_params_newest_best_and_by_step_directory(tmp_path):
    save_steps(tmp_path, [1, 2, 3], [(1, 0.5), (2, 0.25)], keep_last=3)
    abstract = abstract_of(make_state().params, make_mesh((1, 1)))
    for kwargs, path, step in [
        ({}, tmp_path, 3),
        ({"best": True}, tmp_path, 2),
        ({}, tmp_path / "1", 1),
    ]:
        found, params, config = restore_params(path, abstract, **kwargs)
        assert (found, config) == (step, CONFIG)
        assert_same(params, make_state(step).params)
        assert params["embed"].sharding == abstract["embed"].sharding


def test_restore_params_skips_damage_and_moves_nothing(tmp_path):
    save_steps(tmp_path, [1, 2, 3], [(1, 0.5), (2, 0.25)], keep_last=3)
    abstract = abstract_of(make_state().params)
    truncate(tmp_path / "3")
    assert restore_params(tmp_path, abstract)[0] == 2
    truncate(tmp_path / "2")
    assert restore_params(tmp_path, abstract, best=True)[0] == 1
    with pytest.raises(CheckpointError, match="damaged"):
        restore_params(tmp_path / "2", abstract)
    assert names(tmp_path) == ["1", "2", "3"]


def test_restore_params_without_a_checkpoint(tmp_path):
    abstract = abstract_of(make_state().params)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore_params(tmp_path / "absent", abstract)
    save_steps(tmp_path, [1])
    with pytest.raises(CheckpointError, match="no checkpoint with an evaluation loss in"):
        restore_params(tmp_path, abstract, best=True)


def test_saved_config_is_of_the_newest_sound_record(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2" / "record" / "process_0.json").write_text("{")
    assert saved_config(tmp_path) == saved_config(tmp_path / "1") == CONFIG
    with pytest.raises(CheckpointError, match="are damaged"):
        saved_config(tmp_path / "2")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        saved_config(tmp_path / "absent")


def test_a_run_cannot_resume_from_parameters_alone(tmp_path):
    params = make_state().params
    save_params(tmp_path, Config(), 5, params)
    step, restored, config = restore_params(tmp_path, abstract_of(params))
    assert (step, Config.from_dict(config)) == (5, Config())
    assert_same(restored, params)
    with pytest.raises(ConfigError, match=r"alone: start from them, .* checkpoint.init_from$"):
        restore(checkpoint_directory(tmp_path))
    # If parameters are missing too, it is another model.
    with pytest.raises(ConfigError, match=r"params.more \(expected float32\[\], found nothing\)"):
        restore_params(tmp_path, abstract_of({**params, "more": params["scale"]}))


def test_leaves_with_the_same_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        named_leaves({"a": {"b": 1}, "a.b": 2})


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("run", [1])
    assert restore("run").step == 1


def test_orbax_logs_only_warnings(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    save_steps(tmp_path, [1])
    restore(tmp_path)
    assert [record.message for record in caplog.records] == []
