"""The paper's recipe: sizes of every stage and variant, and what each starts from."""

import importlib
import itertools

import numpy as np
import pytest
import toy

from configs.paper.recipe import VARIANTS
from lucid_jax.config import Config, ConfigError
from lucid_jax.runtime.command_line import default_workdir
from lucid_jax.training.loop import train

# Tokens of a sequence, sequences of a step, steps, and the rate.
STAGES = {
    "pretrain": (2048, 256, 11_000, 5e-4),
    "long_32k": (32_768, 16, 500, 5e-5),
    "long_64k": (65_536, 16, 500, 5e-5),
    "babilong": (32_768, 16, 625, 5e-5),
    "longbench": (32_768, 16, 33, 5e-6),
}
# PaTH adds 22·(2048·4·68 + 3·4·68 + 2048·4 + 4).
PARAMETERS = {
    "standard": 1_113_024_512, "differential": 1_113_033_488, "lucid": 1_113_024_512,
    "path": 1_125_478_008, "lucid_path": 1_125_478_008,
}  # fmt: skip


def get_config(stage: str, argument: str) -> Config:
    module = importlib.import_module(f"configs.paper.{stage}")
    return Config.from_dict(module.get_config(argument).to_dict())


@pytest.mark.parametrize(("stage", "variant"), [*itertools.product(STAGES, PARAMETERS)])
def test_a_stage_has_the_papers_sizes(stage, variant):
    config = get_config(stage, variant)
    model, optim, data = config.model, config.optim, config.data
    found = data.sequence_length, config.batch_size, config.steps, optim.learning_rate
    assert found == STAGES[stage]
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.99, 1e-12, 0.01)
    assert optim.warmup == 0.06
    assert model.head_dim == 68
    assert model.rope_base == (10_000 if stage == "pretrain" else 64_000)
    assert toy.model_of(config).num_params == PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_starts_from_the_work_directory_of_the_stage_before(variant):
    for stage in STAGES:
        source = get_config(stage, variant).checkpoint.init_from
        before = {"pretrain": None, "long_32k": "pretrain", "long_64k": "pretrain"}
        before = before.get(stage, "long_32k")
        argument = f"configs/paper/{before}.py:{variant}"
        assert source == (default_workdir(argument, None) if before else "")


def test_every_stage_and_variant_is_tested():
    names = {path.stem for path in (toy.ROOT / "configs" / "paper").glob("*.py")}
    assert names == {*STAGES, "recipe"}
    assert VARIANTS.keys() == PARAMETERS.keys()


def test_an_unknown_variant_is_refused_in_one_line():
    message = f"one of {', '.join(PARAMETERS)}, or that and -smoke; got 'softmax'$"
    with pytest.raises(ConfigError, match=message):
        get_config("pretrain", "softmax-smoke")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_and_resumes(variant, tmp_path, monkeypatch):
    toy.use_devices(monkeypatch, 1)
    values = get_config("pretrain", f"{variant}-smoke").to_dict()
    halfway = Config.from_dict({**values, "steps": 2})
    assert train(halfway, tmp_path).step == 2
    result = train(Config.from_dict(values), tmp_path)
    assert (result.step, result.finished) == (4, True)
    assert np.isfinite(result.report.loss)
