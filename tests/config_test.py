"""Configurations that cannot run raise a one-line error; the others round-trip."""

import json
import math

import numpy as np
import pytest

from configs import lucid_1b_1m, lucid_1b_128k
from lucid_jax.config import Config, ConfigError, ModelConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, "unknown config key step; did you mean steps?"),
        ({"model": {"head": 3}}, "unknown config key model.head; did you mean model."),
        ({"optim": {"zzz": 3}}, "unknown config key optim.zzz$"),
        ({"model": 3}, "model must be a section of keys; got 3"),
        ({"steps": "3"}, "steps must be int; got '3'"),
        ({"steps": True}, "steps must be int; got True"),
        ({"steps": 0}, "config.steps must be positive; got 0"),
        ({"steps": 1.5}, r"steps must be int; got 1\.5"),
        ({"steps": math.inf}, "steps must be int; got inf"),
        ({"steps": np.float64(1.5)}, r"steps must be int; got 1\.5"),
        ({"steps": np.True_}, "steps must be int; got True"),
        ({"seed": -1}, r"config.seed must be in \[0, 2\^32\); got -1"),
        ({"seed": 2**32}, r"config.seed must be in \[0, 2\^32\); got 4294967296"),
        ({"model": {"num_heads": 6, "num_kv_heads": 4}}, r"model.num_heads \(6\) must be a mult"),
        ({"model": {"head_dim": 63}}, "model.head_dim must be even; got 63"),
        ({"model": {"attention": "lucid,linear"}}, "must be one of lucid, .*; got 'linear'"),
        ({"model": {"qk_norm": "l2"}}, "model.qk_norm must be one of none, paper, rms; got 'l2'"),
        ({"model": {"positions": True}}, "model.positions must be str; got True"),
        (
            {"model": {"positions": "none", "rope_scaling": "ntk"}},
            "model.rope_scaling='ntk' needs model.positions='rope'; got 'none'",
        ),
        (
            {"model": {"positions": "path", "rope_scaling": "ntk"}},
            "model.rope_scaling='ntk' needs model.positions='rope'; got 'path'",
        ),
        (
            {"model": {"positions": "path", "attention": "lucid,differential"}},
            "'path' needs a model.attention of lucid and softmax alone; got 'lucid,differential'",
        ),
        (
            {"model": {"positions": "path", "implementation": "mosaic_tpu"}},
            "needs a model.implementation of auto, xla, triton or reference; got 'mosaic_tpu'",
        ),
        (
            {"model": {"positions": "path", "lucid_beta": True}},
            "model.lucid_beta needs model.positions='rope' or 'none'; got 'path'",
        ),
        (
            {"model": {"implementation": "mosaic_gpu", "lucid_beta": True}},
            "model.lucid_beta needs another model.implementation; got 'mosaic_gpu'",
        ),
        (
            {"model": {"attention": "softmax", "lucid_beta": True}},
            "model.lucid_beta needs a LUCID layer; got model.attention='softmax'",
        ),
        (
            {"model": {"attention": "softmax,differential", "num_kv_heads": 1}},
            "pairs heads, so model.num_kv_heads must be even; got 1",
        ),
        ({"model": {"rope_factor": 2.0}}, "model.rope_factor=2.0 needs a model.rope_scaling"),
        (
            {"model": {"remat": "some"}},
            "model.remat must be one of none, dots, attention, full; got 'some'",
        ),
        ({"batch_size": 6, "accumulation": 4}, r"batch_size \(6\) must be a multiple of accum"),
        ({"batch_size": 6, "data": {"shards": 4}}, r"must be a multiple of data.shards \(4\)"),
        ({"data": {"holdout": 1.0}}, r"data.holdout must be in \[0, 1\); got 1.0"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "at most one -1"),
        ({"mesh": {"stripe": 0}}, "mesh.stripe must be positive; got 0"),
        ({"optim": {"b1": 1.0}}, r"optim.b1 must be in \[0, 1\); got 1.0"),
        ({"optim": {"b2": 1.0}}, r"optim.b2 must be in \[0, 1\); got 1.0"),
        ({"optim": {"z_loss": -1.0}}, "optim.z_loss must be 0 or more; got -1.0"),
        (
            {"optim": {"schedule": "step"}},
            "optim.schedule must be one of cosine, constant, wsd",
        ),
        (
            {"optim": {"schedule": "wsd", "warmup": 0.5, "decay": 0.6}},
            r"optim.warmup \(0.5\) and optim.decay \(0.6\) must add up to 1 at most",
        ),
        ({"optim": {"warmup": 1.5}}, r"optim.warmup must be in \[0, 1\]; got 1.5"),
        (
            {"model": {"head_dim": 2, "rope_scaling": "ntk"}},
            "model.rope_scaling='ntk' needs model.head_dim above 2; got 2",
        ),
        (
            {"eval_every": 300, "data": {"eval": "x.txt"}},
            r"^one of eval_every \(300\) and checkpoint.every \(1000\) must be a multiple",
        ),
    ],
)
def test_error(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config.from_dict(values)
    assert "\n" not in str(error.value)


def test_round_trip_and_numbers_of_other_types():
    values = {
        "steps": 7.0,
        "seed": np.int64(2),
        "batch_size": np.float32(4),
        "telemetry": np.False_,
        "optim": {"learning_rate": 1, "weight_decay": np.float64(0.5), "b2": np.float32(0.5)},
        "model": {"attention": np.str_("softmax")},
    }
    config = Config.from_dict(values)
    plain = Config.from_dict(
        {
            "steps": 7,
            "seed": 2,
            "batch_size": 4,
            "telemetry": False,
            "optim": {"learning_rate": 1.0, "weight_decay": 0.5, "b2": 0.5},
            "model": {"attention": "softmax"},
        }
    )
    # JSON and the types tell 7 from 7.0.
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("recorded", "meant"), [(False, "none"), (True, "rms"), ("paper", "paper")]
)
def test_records_of_earlier_versions_keep_their_meaning(recorded, meant):
    assert Config.from_dict({"model": {"qk_norm": recorded}}).model.qk_norm == meant


@pytest.mark.parametrize(
    ("eval_every", "evaluated", "keep_best"),
    [(500, "x.txt", 1), (2000, "x.txt", 1), (300, "", 1), (300, "x.txt", 0)],
)
def test_valid_intervals_of_evaluations_and_checkpoints(eval_every, evaluated, keep_best):
    Config.from_dict(
        {
            "eval_every": eval_every,
            "data": {"eval": evaluated},
            "checkpoint": {"every": 1000, "keep_best": keep_best},
        }
    )


def test_changes_since_an_earlier_configuration():
    earlier = Config.from_dict({"seed": 1, "model": {"num_layers": 2}})
    changes = Config.from_dict({"seed": 1, "model": {"num_layers": 3}}).changes_since(earlier)
    assert changes == {"model.num_layers": (2, 3)}


def test_attention_patterns_repeat_over_depth():
    kinds = ModelConfig(num_layers=6, attention="softmax,softmax,lucid").layer_kinds
    assert kinds == ("softmax", "softmax", "lucid") * 2
    assert ModelConfig(num_layers=3, attention="softmax,lucid").layer_kinds[-1] == "softmax"


@pytest.mark.parametrize("file", [lucid_1b_128k, lucid_1b_1m])
def test_every_slice_gets_a_mesh_of_its_chips(file):
    for name in file.SLICES:
        config = Config.from_dict(file.get_config(name).to_dict())
        chips = math.prod(map(int, name.split("-")[1].split("x")))
        assert math.prod(config.mesh.sizes) == chips
        assert config.batch_size % (config.mesh.data * config.mesh.fsdp) == 0
    for name, values in getattr(file, "GPUS", {}).items():
        config = Config.from_dict(file.get_config(name).to_dict())
        assert math.prod(config.mesh.sizes) == int(name.removesuffix("gpu"))
        assert config.accumulation == config.batch_size == values["accumulation"]
    with pytest.raises(ConfigError, match=r"must be one of full, smoke, v5p-.*; got 'v5p'"):
        file.get_config("v5p")
    Config.from_dict(file.get_config("smoke").to_dict())
