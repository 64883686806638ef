"""Converted models have the logits of transformers and are exported bit for bit."""

import dataclasses
import json
import pathlib
import shutil
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from convert.llama_fixtures import LLAMA, MODELS, llama_json, tensors_of, write_llama
from safetensors.numpy import load_file
from small_models import hidden_states, rest_slow

from lucid_jax.checkpoint.restore import restore_params, saved_config
from lucid_jax.config import Config, ConfigError
from lucid_jax.convert.__main__ import main
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.llama_config import to_config
from lucid_jax.convert.llama_tensors import abstract_params
from lucid_jax.convert.shards import TensorDirectory, write_tensors
from lucid_jax.convert.to_hf import to_hf
from lucid_jax.data import check_data, load_tokenizer
from lucid_jax.evaluate.checkpoint import evaluate_checkpoint
from lucid_jax.ops import rope
from lucid_jax.runtime.user_file import call_in_file
from lucid_jax.training.loop import train


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The parent of the fixtures' work directories."""
    root = tmp_path_factory.mktemp("converted")
    for name, (length, _) in MODELS.items():
        from_hf(LLAMA / name, root / name, length)
    return root


def config_of(workdir: pathlib.Path, **changes) -> Config:
    """Reads a work directory's config.py as run.py does."""
    config = call_in_file(workdir / "config.py", "get_config")
    config.model.update(compute_dtype="float32", remat="none")
    for section, values in changes.items():
        config[section].update(values)
    return Config.from_dict(config.to_dict())


@pytest.mark.parametrize("name", rest_slow(*MODELS))
def test_logits_match_transformers(converted, name):
    config = config_of(converted / name)
    model = toy.model_of(config)
    _, params, saved = restore_params(config.checkpoint.init_from, model.abstract_params)
    assert Config.from_dict(saved).data == config.data
    expected = load_file(LLAMA / name / "expected.safetensors")
    found = hidden_states(model)(params, expected["tokens"]) @ model.merge(params).head
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_exports_equal_the_original(converted, name, tmp_path):
    length, dtype = MODELS[name]
    to_hf(converted / name, tmp_path / "out", dtype=dtype)
    original, found = tensors_of(LLAMA / name), tensors_of(tmp_path / "out")
    toy.assert_same_bits(found, original)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = to_config(llama_json(name), length), to_config(exported)
    if name == "dynamic":
        # transformers has no key for "ntk", so the export has an equivalent RoPE base instead.
        np.testing.assert_allclose(frequencies(after), frequencies(before), rtol=1e-12)
        scaling = {"rope_base": before.model.rope_base, "rope_scaling": "ntk", "rope_factor": 4.0}
        model = dataclasses.replace(after.model, **scaling)
        after = dataclasses.replace(after, model=model)
    assert after == before
    assert exported["torch_dtype"] == dtype
    # transformers computes Mistral as it does Llama.
    model_type = llama_json(name)["model_type"]
    assert exported["model_type"] == ("llama" if model_type == "mistral" else model_type)
    # transformers 4 fails on a quantization_config that is null.
    assert "quantization_config" not in exported


def frequencies(config: Config) -> np.ndarray:
    model = config.model
    return rope.frequencies(
        model.head_dim, model.rope_base, model.rope_scaling, model.rope_factor, 2048
    )


def test_exported_files_have_at_most_max_shard_bytes(converted, tmp_path):
    to_hf(converted / "grouped", tmp_path / "out", dtype="float32", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    contents = {file.name: load_file(file) for file in files}
    assert all(sum(x.nbytes for x in tensors.values()) <= 20_000 for tensors in contents.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, x in contents.items() for name in x}
    original = tensors_of(LLAMA / "grouped")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())
    toy.assert_same_bits(tensors_of(tmp_path / "out"), original)
    # Whoever may read the directory may read the files.
    assert files[0].stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666
    from_hf(tmp_path / "out", tmp_path / "again")
    assert saved_config(tmp_path / "again")["model"] == saved_config(converted / "grouped")["model"]
    # A larger tensor gets a file of its own.
    to_hf(converted / "grouped", tmp_path / "one", max_shard_bytes=1)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == len(original)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_keep_the_dtype_that_they_came_in(tmp_path, dtype):
    arrays = {name: x.astype(dtype) for name, x in tensors_of(LLAMA / "grouped").items()}
    source = write_llama(tmp_path / "in", "grouped", arrays)
    from_hf(source, tmp_path / "work")
    to_hf(tmp_path / "work", tmp_path / "out")
    toy.assert_same_bits(tensors_of(tmp_path / "out"), arrays)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["torch_dtype"] == dtype


# Tensors.

Q = "model.layers.0.self_attn.q_proj"
LONG = np.zeros((64, 32), jnp.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.weight": None}, f"{Q}.weight (expected [32, 32], found nothing)"),
        ({f"{Q}.weight": LONG}, f"{Q}.weight (expected [32, 32], found [64, 32])"),
        ({f"{Q}.bias": LONG[0]}, f"{Q}.bias (expected nothing, found [32])"),
        ({"lm_head.weight": None}, "lm_head.weight (expected [64, 32], found nothing)"),
        (
            {"model.embed_tokens.weight": np.zeros((64, 32), np.int8)},
            "model.embed_tokens.weight (expected [64, 32], found I8[64, 32])",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, tensors, message):
    source = write_llama(tmp_path / "in", tensors=tensors)
    with pytest.raises(ConfigError) as error:
        from_hf(source, tmp_path / "out")
    assert str(error.value) == f"{source}: tensors do not fit config.json: {message}"
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", "nan"), ("float16", "-inf"), ("bfloat16", "inf")]
)
def test_a_weight_that_is_not_finite_is_refused(tmp_path, dtype, value):
    weight = np.ones((32, 40), dtype)
    weight[3, 5] = weight[4, 1] = float(value)
    name = "model.layers.0.mlp.down_proj.weight"
    source = write_llama(tmp_path / "in", tensors={name: weight})
    with pytest.raises(ConfigError) as error:
        from_hf(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: tensor {name} must be finite; 2 of its 1280 numbers are not: {value} at [3, 5]"
    )
    assert not list(tmp_path.glob("out*"))
    # The largest of float32 is beyond bfloat16.
    weight = np.where(np.isfinite(weight), weight, np.finfo(np.float32).max).astype(np.float32)
    from_hf(write_llama(tmp_path / "large", tensors={name: weight}), tmp_path / "work")
    with pytest.raises(ConfigError, match=f"work in bfloat16: tensor {name} must be finite; 2 of "):
        to_hf(tmp_path / "work", tmp_path / "out", dtype="bfloat16")
    to_hf(tmp_path / "work", tmp_path / "out")


def test_unused_tensors_are_ignored(converted, tmp_path):
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": LONG,
    }
    from_hf(write_llama(tmp_path / "in", "tied_llama3", tensors=more), tmp_path / "out")
    model = config_of(tmp_path / "out").model
    assert model == config_of(converted / "tied_llama3").model
    found, expected = (
        restore_params(path, abstract_params(model))[1]
        for path in (tmp_path / "out", converted / "tied_llama3")
    )
    toy.assert_same_bits(toy.named(found), toy.named(expected))


FIRST, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"
DAMAGES = {
    "cut short": (
        FIRST,
        (LLAMA / "grouped" / FIRST).read_bytes()[:-1],
        f"{FIRST} cannot be read: ",
    ),
    "lost": (FIRST, None, f"{FIRST} cannot be read: No such file"),
    "no index": (INDEX, None, f"holds neither model.safetensors nor {INDEX}"),
    "bad index": (INDEX, b"[]", f"{INDEX} is no index of safetensors files"),
    "no JSON": ("config.json", b"{", "config.json is not JSON"),
    "a number": ("config.json", b"3", "config.json must hold an object; got int"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_directory_is_refused(tmp_path, name, content, message):
    shutil.copytree(LLAMA / "grouped", tmp_path / "in")
    (tmp_path / "in" / name).unlink()
    if content is not None:
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        from_hf(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_memory_holds_one_input_tensor_and_one_output_file(tmp_path, monkeypatch):
    read, tensors = TensorDirectory.read, []
    most = {"read": 0, "written": 0}

    def track(x, kind):
        tensors.append(weakref.ref(x))
        most[kind] = max(most[kind], sum(tensor() is not None for tensor in tensors))
        return x

    monkeypatch.setattr(TensorDirectory, "read", lambda *a: track(read(*a), "read"))
    from_hf(LLAMA / "grouped", tmp_path / "work")
    assert most["read"] == 1
    write_tensors(
        tmp_path,
        dict.fromkeys("abcdefg", 8),
        lambda name: track(np.zeros(2, np.float32), "written"),
        max_bytes=16,
    )
    assert most["written"] == 2


# Work directories.


@pytest.mark.slow
def test_fine_tuning_with_lucid_starts_from_a_converted_model(
    converted, corpus, tmp_path, monkeypatch
):
    toy.use_devices(monkeypatch, 1)
    settings = {
        "model": {"attention": "lucid"},
        "data": {"train": corpus, "eval": corpus, "sequence_length": 32},
        # So small that no weight changes.
        "optim": {"learning_rate": 1e-30},
    }
    workdir = converted / "grouped"
    config = dataclasses.replace(
        config_of(workdir, **settings), steps=1, batch_size=2, eval_batches=1, telemetry=False
    )
    assert train(config, tmp_path / "run").finished
    to_hf(tmp_path / "run", tmp_path / "out", dtype="float32")
    toy.assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(LLAMA / "grouped"))
    # The fields that transformers has no key for are exported and read back.
    from_hf(tmp_path / "out", tmp_path / "again")
    assert config_of(tmp_path / "again").model == config.model
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        LLAMA / "grouped" / "tokenizer.json"
    ).read_bytes()
    # The converted work directory can be evaluated, but not trained in.
    softmax = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="softmax")
    )
    assert evaluate_checkpoint(softmax, workdir, "latest").startswith(f"step 0 of {workdir}: loss")
    with pytest.raises(ConfigError, match="holds parameters alone: start from them"):
        train(softmax, workdir)


# The command line.


def convert(*arguments) -> None:
    main([str(argument) for argument in arguments])


def test_both_ways_from_the_command_line(tmp_path, capsys):
    source, work, out = LLAMA / "grouped", tmp_path / "work", tmp_path / "out"
    convert("from-hf", f"--input={source}", f"--output={work}", "--sequence_length=32")
    assert config_of(work).data.sequence_length == 32
    convert(
        "to-hf", f"--input={work / 'checkpoints' / '0'}", f"--output={out}", "--dtype=float32",
        "--max_shard_gb=3e-5", "--tokenizer=bytes",
    )  # fmt: skip
    command, end = capsys.readouterr().out.splitlines()
    assert end == str(out)
    assert command == (
        f"python run.py --config={work}/config.py --workdir=runs/work_lucid"
        " --config.model.attention=lucid --config.data.train=python-stdlib"
    )
    config = config_of(work, model={"attention": "lucid"}, data={"train": "python-stdlib"})
    check_data(config, load_tokenizer(config.data.tokenizer))
    toy.assert_same_bits(tensors_of(out), tensors_of(source))
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    exported = json.loads((out / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (256, 257)
    assert not list(out.glob("tokenizer*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from-hf", "--input=/none", "--output={tmp}/new"], "/none/config.json cannot be read"),
        (["from-hf", "--input={grouped}", "--output={tmp}"], "already exists"),
        (["from-hf", "--input={grouped}", "--output=gs://b/x"], "mount the bucket"),
        (["to-hf", "--input=/none", "--output={tmp}/new"], "no checkpoint in /none"),
        (["to-hf", "--input={work}", "--output={tmp}"], "already exists"),
        (
            ["to-hf", "--input={work}", "--output={tmp}/new", "--tokenizer=/none.json"],
            "data.tokenizer='/none.json' is not a file",
        ),
    ],
)
def test_command_line_errors_are_one_line(converted, tmp_path, capsys, arguments, message):
    names = {"tmp": tmp_path, "grouped": LLAMA / "grouped", "work": converted / "grouped"}
    with pytest.raises(SystemExit) as stopped:
        convert(*(argument.format(**names) for argument in arguments))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_copied(converted, tmp_path, caplog):
    source = shutil.copytree(LLAMA / "grouped", tmp_path / "in")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenizer.model").touch()
    from_hf(source, tmp_path / "work")
    to_hf(tmp_path / "work", tmp_path / "out")
    for directory in (tmp_path / "work", tmp_path / "out"):
        tokenizers = {path.name: path.read_bytes() for path in directory.glob("tokenizer*")}
        assert tokenizers == {
            "tokenizer.json": (source / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": b"{}",
        }
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (1, 2)
    # The work directory may be moved.
    moved = (tmp_path / "work").rename(tmp_path / "moved")
    assert config_of(moved).data.tokenizer == str(moved / "tokenizer.json")
    assert config_of(moved).checkpoint.init_from == str(moved)
    # Converting a model without a tokenizer warns.
    assert config_of(converted / "linear").data.tokenizer == ""
    from_hf(LLAMA / "linear", tmp_path / "none")
    assert "holds no tokenizer: set data.tokenizer" in caplog.text
    to_hf(tmp_path / "none", tmp_path / "none-out")
    assert json.loads((tmp_path / "none-out" / "config.json").read_text())["bos_token_id"] is None


def test_all_ends_of_text_go_in_and_out(tmp_path):
    source = write_llama(tmp_path / "in", bos_token_id=1, eos_token_id=[2, 5], pad_token_id=7)
    shutil.copy(LLAMA / "grouped" / "tokenizer.json", source)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    tokenizer = load_tokenizer(from_hf(source, tmp_path / "work").data.tokenizer)
    assert (tokenizer.eos_id, tokenizer.special.ends) == (2, (2, 5, 9))
    to_hf(tmp_path / "work", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        exported = json.loads((tmp_path / "out" / name).read_text())
        assert exported["eos_token_id"] == [2, 5, 9]
        assert (exported["bos_token_id"], exported["pad_token_id"]) == (1, 7)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention": "differential"}, "^model.attention='differential' has layers that"),
        ({"positions": "path"}, "^model.positions='path' is not for transformers"),
        ({"lucid_beta": True}, "^model.lucid_beta=True is not for transformers"),
    ],
)
def test_a_model_that_transformers_cannot_hold_is_not_exported(tmp_path, model, message):
    toy.save_random(tmp_path / "work", toy.toy_config("", model=model))
    with pytest.raises(ConfigError, match=message) as x:
        to_hf(tmp_path / "work", tmp_path / "out")
    assert "\n" not in str(x.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "fields", "architecture"),
    [
        ("linear", {"attention": "softmax,lucid", "temperature": 0.5}, "LucidLlamaForCausalLM"),
        ("qwen3", {"attention": "lucid"}, "LucidLlamaForCausalLM"),
        # No model type of transformers has norms of the keys, and biases of queries, keys and
        # values alone.
        ("qwen2", {"qk_norm": "rms"}, "LucidLlamaForCausalLM"),
        ("grouped", {"qk_norm": "paper", "positions": "none"}, "LucidLlamaForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
    ],
)
def test_an_export_comes_with_the_code_that_transformers_lacks(
    tmp_path, name, fields, architecture
):
    norms = {
        f"model.layers.{layer}.self_attn.{norm}_norm.weight": np.ones(8, jnp.bfloat16)
        for layer in range(2)
        for norm in ("qk" if fields.get("qk_norm") == "rms" else "")
    }
    from_hf(write_llama(tmp_path / "in", name, norms, lucid_jax=fields), tmp_path / "work")
    to_hf(tmp_path / "work", tmp_path / "out")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["architectures"] == [architecture]
    is_ours = architecture == "LucidLlamaForCausalLM"
    # A reader that does not run the code must not take the model for one that it knows.
    assert (exported["model_type"] == "lucid_llama") == is_ours
    modules = {kind.split(".")[0] for kind in exported.get("auto_map", {}).values()}
    assert [*modules] == [path.stem for path in (tmp_path / "out").glob("*.py")]
    assert [*modules] == (["modeling_lucid_llama"] if is_ours else [])
    from_hf(tmp_path / "out", tmp_path / "again")
    model = config_of(tmp_path / "again").model
    assert model == config_of(tmp_path / "work").model
    assert {field: getattr(model, field) for field in fields} == fields
