"""The corpus of documentation, and the study of language models on a toy of it."""

import gzip
import json

import pytest

from experiments.language_modelling import config as lm_config
from experiments.language_modelling import corpus, study
from lucid_jax.config import Config
from lucid_jax.data import load_tokenizer
from lucid_jax.data.sources import SourceSpec, open_source
from lucid_jax.evaluate.checkpoint import evaluate_checkpoint
from lucid_jax.evaluate.request import TaskRequest
from lucid_jax.evaluate.run_tasks import evaluate_tasks
from lucid_jax.training.loop import train

WORDS = "the preconditioner of a kernel solves what a softmax leaves over in a row of keys"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Pieces of 16 and 64 tokens of some text."""
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    texts = [f"{WORDS} {i}. " * 60 for i in range(6)]
    corpus.write(texts, output, 300, (16, 64))
    return output, texts


def test_documents_are_folders_and_no_file_twice(tmp_path):
    for name, text in (("a/x.rst", "one"), ("a/y.txt", "two"), ("b/z.rst", "one"), ("b/w.png", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "b/v.pod.gz").write_bytes(gzip.compress(b"three"))
    assert list(corpus.documents(tmp_path)) == ["one\n\ntwo", "three"]


def test_pieces_are_the_text_and_none_is_in_both_splits(tokens):
    output, texts = tokens
    tokenizer = load_tokenizer(str(output / "tokenizer.json"))

    def read(name):
        source = open_source(SourceSpec("arrayrecord", str(output / name)), "text")
        return [source[i] for i in range(len(source))]

    for length in (16, 64):
        sizes = [len(piece) for piece in read(f"train-{length}")]
        assert max(sizes) <= length + 1
        assert sorted(sizes)[len(sizes) // 2] >= length - 1
    split = {name: "".join(map(tokenizer.decode, read(f"{name}-16"))) for name in
             ("train", "heldout")}  # fmt: skip
    assert sum(map(len, split.values())) == sum(map(len, texts))
    assert "".join(map(tokenizer.decode, read("heldout-64"))) == split["heldout"]


@pytest.mark.parametrize("kind", ["2048", "16384", "dropin"])
def test_steps_of_all_kinds_have_as_many_tokens(kind):
    config = Config.from_dict(lm_config.get_config(kind).to_dict())
    assert config.batch_size * config.data.sequence_length == 2**15
    assert config.steps % config.checkpoint.every == 0


@pytest.mark.slow
def test_a_softmax_model_becomes_a_lucid_one_and_is_reported(tokens, tmp_path, monkeypatch):
    output, _ = tokens
    jobs = (
        study.Job("softmax", "2048", "softmax", retrieval="1024"),
        study.Job("softmax-as-lucid", "dropin", "lucid", "softmax", train=False),
    )
    done = []

    def call(command, check):
        """Does what `run.py` would do, with a toy model and in this process."""
        flags = dict(flag.split("=", 1) for flag in command[2:])
        done.append(flags)
        values = lm_config.get_config(flags["--config"].split(":")[1])
        values.update(steps=2, batch_size=8, eval_every=2, eval_batches=1, telemetry=False)
        values.checkpoint.every = 2
        values.model.update(
            vocab_size=300, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=1, num_kv_heads=1,
            head_dim=16, compute_dtype="float32", attention=flags["--config.model.attention"],
        )  # fmt: skip
        values.data.update(
            tokenizer=str(output / "tokenizer.json"), train=f"arrayrecord:{output}/train-64",
            eval=f"arrayrecord:{output}/heldout-64", sequence_length=64,
        )  # fmt: skip
        config = Config.from_dict(values.to_dict())
        if "--tasks" in flags:
            tasks, lengths = (flags[name].split(",") for name in ("--tasks", "--lengths"))
            request = TaskRequest.parse(tasks[:1], lengths, 1, [])
            evaluate_tasks(config, flags["--workdir"], "latest", request)
        elif "--mode" in flags:
            evaluate_checkpoint(config, flags["--workdir"], flags.get("--checkpoint", "latest"))
        else:
            train(config, flags["--workdir"])

    monkeypatch.setattr(study.subprocess, "run", call)
    study.run(jobs, tmp_path)
    study.run(jobs, tmp_path)
    assert len(done) == 4, "finished work was repeated"
    table = study.report(tmp_path, tmp_path / "out")
    assert "| softmax-as-lucid | softmax |" in table
    assert "| softmax | 1024 | 0.0 [0.0, " in table
    softmax, lucid = json.loads((tmp_path / "out/study.json").read_text())["records"]
    assert softmax["loss"] != lucid["loss"]
    assert softmax["scores"]
    assert not lucid["scores"]
