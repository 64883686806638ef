"""The study of language models on a toy of its corpus."""

import json

import pytest
import toy

from experiments.language_modelling import config as lm_config
from experiments.language_modelling import corpus, study
from lucid_jax.config import Config

TOY = (
    "steps=2", "batch_size=8", "eval_every=2", "eval_batches=1", "checkpoint.every=2",
    "model.vocab_size=300", "model.num_layers=1", "model.embed_dim=16", "model.mlp_dim=16",
    "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16", "data.sequence_length=64",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["2048", "16384", "dropin"])
def test_steps_of_all_kinds_have_as_many_tokens(kind):
    config = Config.from_dict(lm_config.get_config(kind).to_dict())
    assert config.batch_size * config.data.sequence_length == 2**15


@pytest.mark.slow
def test_a_softmax_model_becomes_a_lucid_one_and_is_reported(tmp_path, monkeypatch, capsys):
    words = "the preconditioner of a kernel solves what a softmax leaves over in a row of keys"
    for i in range(6):
        (tmp_path / f"packages/{i}").mkdir(parents=True)
        (tmp_path / f"packages/{i}/a.txt").write_text(f"{words} {i}. " * 60)
    output, runs = tmp_path / "corpus", f"--runs={tmp_path}"
    monkeypatch.setattr(corpus, "_VOCABULARY", 300)
    monkeypatch.setattr(corpus, "LENGTHS", (16, 64))
    corpus.main([f"--output={output}", f"--packages={tmp_path / 'packages'}"])
    data = {"tokenizer": f"{output}/tokenizer.json", "train": f"arrayrecord:{output}/train-64",
            "eval": f"arrayrecord:{output}/heldout-64"}  # fmt: skip
    flags = [f"--config.{x}" for x in (*TOY, *(f"data.{k}={v}" for k, v in data.items()))]
    jobs = (
        study.Job("softmax", "2048", "softmax", retrieval="1024"),
        study.Job("softmax-as-lucid", "dropin", "lucid", "softmax", train=False),
    )
    monkeypatch.setattr(study, "PARTS", {"dropin": jobs})
    monkeypatch.setattr(study, "_RETRIEVAL", ("--tasks=ruler_niah_single_1", "--samples=1"))
    monkeypatch.chdir(toy.ROOT)
    for name, value in toy.environment().items():
        monkeypatch.setenv(name, value)
    study.main(["--part=dropin", runs, *flags])
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: pytest.fail("repeated"))
    study.main(["--part=dropin", runs, *flags])
    study.main(["--report", runs, f"--out={tmp_path}"])
    table = capsys.readouterr().out
    assert "| softmax-as-lucid | softmax |" in table
    assert "| softmax | 1024 | 0.0 [0.0, " in table
    softmax, lucid = json.loads((tmp_path / "study.json").read_text())["records"]
    assert softmax["loss"] != lucid["loss"]
