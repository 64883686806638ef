"""The lm-eval adapter, run by lm-eval itself without a network."""

import importlib
import json
import pathlib

import numpy as np
import pytest
import toy
import wonderwords
from echo import EchoGenerator

from lucid_jax.config import ConfigError
from lucid_jax.data import load_tokenizer
from lucid_jax.data.tokenizer import ByteTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval==0.4.13")
harness = importlib.import_module("lucid_jax.evaluate.harness")
LucidLM = harness.LucidLM
BYTES = load_tokenizer("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a directory with random parameters and the log probabilities of their model."""
    directory = tmp_path_factory.mktemp("harness")
    model = {"vocab_size": 264, "init_std": 0.2, "mlp_dim": 64}
    config = toy.toy_config("none", model=model, data={"train": "", "eval": ""})
    params = toy.save_random(directory, config)
    return directory, toy.log_probabilities(config, params, size=66)


@pytest.fixture(scope="module")
def model(run):
    return LucidLM(str(run[0]))


class FakeGenerator:
    """Replaces decoding: answers with the first letter of the prompt and a fixed text."""

    def __init__(self, text):
        self.text = BYTES.encode(text).tolist()
        self.requests = []

    def __call__(self, prompts, max_new_tokens, finished):
        assert len(prompts) % 8 == 0, "every device has equally many"
        prompts = [prompt for prompt in prompts if len(prompt) > 1]
        self.requests += [(prompt, max_new_tokens) for prompt in prompts]
        return [[*prompt[1:2], *self.text][:max_new_tokens] for prompt in prompts]


@pytest.fixture
def fake(model, monkeypatch):
    fake = FakeGenerator("one STOP two\n\nthree")
    monkeypatch.setattr(model._generator, "_generator", fake)
    return fake


def run_requests(model, kind, *arguments):
    requests = [lm_eval.api.instance.Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def test_model_is_registered(run):
    assert lm_eval.api.registry.get_model("lucid") is LucidLM
    model = LucidLM.create_from_arg_string(
        f"checkpoint={run[0]},max_length=32", {"batch_size": 3, "device": None}
    )
    assert model.max_length == 32
    # Rounded up to a multiple of the eight devices.
    assert model._config.batch_size == 8
    with pytest.raises(ConfigError, match="batch_size must be auto or a positive integer; got 'x'"):
        LucidLM(run[0], batch_size="x")


def test_log_likelihoods_match_all_logits(run, model):
    _, log_probabilities = run
    long = "x" * 50
    pairs = [("a", " b"), (long, " c" * 20), ("", "d e"), ("a tail ", "f"), (long, "y"), ("g", "h")]

    def expected(context, continuation):
        # lm-eval moves spaces at the end of a context to the continuation.
        text = context.rstrip()
        after = BYTES.encode(context[len(text) :] + continuation).tolist()
        tokens = [BOS, *BYTES.encode(text).tolist(), *after][-65:]
        logs = log_probabilities(tokens[:-1])[-len(after) :]
        return logs[np.arange(len(after)), after].sum(), (logs.argmax(-1) == after).all()

    for (found, greedy), pair in zip(
        run_requests(model, "loglikelihood", *pairs), pairs, strict=True
    ):
        sum_, is_greedy = expected(*pair)
        assert found == pytest.approx(sum_, rel=1e-5)
        assert greedy == is_greedy
    with pytest.raises(ConfigError, match="65 tokens is longer than max_length=64"):
        run_requests(model, "loglikelihood", ("a", "b" * 65))


class Llama(ByteTokenizer):
    """Bytes without BOS; 259 is written <|end|>, and a decoded text loses its first space."""

    bos_id = None

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")

    def special_id(self, text):
        return 259 if text == "<|end|>" else None


def test_a_context_of_spaces_starts_from_the_prefix_token(run, model, monkeypatch):
    monkeypatch.setattr(model, "_tokenizer", Llama())
    [(found, _)] = run_requests(model, "loglikelihood", (" ", " abc"))
    after = list(b"  abc")
    logs = run[1]([EOS, *after][:-1])[np.arange(5), after]
    assert found == pytest.approx(logs.sum(), rel=1e-5)


def test_completions_keep_their_first_space_and_end_at_a_special_token(model, monkeypatch):
    monkeypatch.setattr(model._generator, "_tokenizer", Llama())
    fake = FakeGenerator("")
    fake.text = [*b"    return x", 259, *b" more"]
    monkeypatch.setattr(model._generator, "_generator", fake)
    options = {"until": ["<|end|>"], "max_gen_toks": 30}
    assert run_requests(model, "generate_until", ("def", options)) == ["d    return x"]
    monkeypatch.setattr(FakeGenerator, "__call__", lambda self, prompts, *_: [fake.text] * 8)
    assert run_requests(model, "generate_until", ("def", options)) == ["    return x"]
    finished = model._generator._is_finished
    request = harness.GenerationRequest([1], 30, ("<|end|>",))
    assert finished(request, fake.text[:13])
    assert not finished(request, fake.text[:12])


def test_rolling_log_likelihoods_count_every_token_once(run, model):
    _, log_probabilities = run
    texts = ["short", "x y " * 40, "z" * 64]

    def expected(text):
        tokens = [BOS, *BYTES.encode(text).tolist()]
        total = 0.0
        for first in range(0, len(tokens) - 1, 64):
            after = tokens[first + 1 : first + 65]
            # The last window begins earlier, to be as long as the others.
            window = tokens[max(first + len(after) - 64, 0) : first + len(after)]
            total += log_probabilities(window)[-len(after) :][np.arange(len(after)), after].sum()
        return total

    found = run_requests(model, "loglikelihood_rolling", *[(text,) for text in texts])
    assert found == pytest.approx([expected(text) for text in texts], rel=1e-5)


def test_generation_honours_its_options(model, fake, caplog):
    arguments = [
        ("a short one", {"until": ["STOP", "\n\n"], "max_gen_toks": 20}),
        ("b" * 100, {"until": "\n\n", "max_gen_toks": 20}),
        ("c " * 9, {"until": [], "max_gen_toks": 4}),
        ("d " * 8, {"until": ["three"], "max_gen_toks": 40}),
        ("e", {"until": ["no"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
    ]
    texts = run_requests(model, "generate_until", *arguments)
    assert texts == [
        "aone ",
        "bone STOP two",
        "cone",
        "done STOP two\n\n",
        "eone STOP two\n\nthree",
    ]
    assert sorted(new for _, new in fake.requests) == [4, 20, 20, 20, 40]
    requests = {tuple(prompt): new for prompt, new in fake.requests}
    assert requests[(BOS, *b"a short one")] == 20
    # The end of a long prompt is kept, with room for the whole answer.
    assert requests[tuple(b"b" * 44)] == 20
    assert "1 requests are longer than max_length=64 and lost their beginning" in caplog.text
    with pytest.raises(ConfigError, match="LucidLM generates greedily"):
        run_requests(model, "generate_until", ("a", {"do_sample": True, "temperature": 0.5}))
    with pytest.raises(ConfigError, match="max_gen_toks=64 leaves no token of max_length=64"):
        run_requests(model, "generate_until", ("a", {"max_gen_toks": 64}))


@pytest.mark.slow
def test_generation_is_greedy(run, model):
    _, log_probabilities = run
    texts = run_requests(
        model, "generate_until", *[(text, {"max_gen_toks": 6}) for text in ("one", "another")]
    )
    for prompt, text in zip(("one", "another"), texts, strict=True):
        tokens = [BOS, *prompt.encode()]
        for _ in range(6):
            tokens.append(int(log_probabilities(tokens)[-1].argmax()))
            if tokens[-1] == EOS:
                break
        assert text == BYTES.decode(tokens[1 + len(prompt) :])


ROWS = [{"text": f"q{i}", "choices": [" yes", " no"], "label": i % 2} for i in range(3)]
TASK = {
    "task": "toy_choice",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "text",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}],
}


def test_lm_eval_runs_a_multiple_choice_task(run, model):
    """lm-eval makes the model from its name and compares log-likelihoods."""
    import datasets

    dataset = {"test": datasets.Dataset.from_list(ROWS)}
    task = {**TASK, "custom_dataset": lambda **_: dataset}
    results = lm_eval.simple_evaluate(
        "lucid", f"checkpoint={run[0]}", [task], bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    pairs = [(row["text"], choice) for row in ROWS for choice in row["choices"]]
    values = np.reshape([x for x, _ in run_requests(model, "loglikelihood", *pairs)], (3, 2))
    share = np.mean(values.argmax(1) == [row["label"] for row in ROWS])
    assert results["results"]["toy_choice"]["acc,none"] == pytest.approx(share)


@pytest.mark.slow
def test_command_line(run, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"data_files": {"test": str(data)}}
    task = {**TASK, "dataset_path": "json", "dataset_kwargs": files, "doc_to_text": "{{text}}"}
    # JSON is valid YAML.
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def evaluate(checkpoint):
        arguments = ["run", "--model", "lucid", "--model_args", f"checkpoint={checkpoint}",
                     "--tasks", "toy_choice", "--include_path", str(tmp_path)]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["lm_eval", *arguments])
        harness.main()

    evaluate(run[0])
    assert "|toy_choice|" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: no checkpoint in .*none$"):
        evaluate(tmp_path / "none")


OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe",
           "ruler_fwe")  # fmt: skip


@pytest.mark.slow
def test_lm_evals_own_ruler_tasks(tmp_path, monkeypatch):
    """Runs those of lm-eval's own RULER tasks that need nothing from a hub but a tokenizer.

    The tokenizer is trained on their prompts. With a tokenizer of letters the shortest samples
    do not fit, and lm-eval either never ends or divides by the number of answers, zero.
    """
    pytest.importorskip("transformers", reason="lm-eval's RULER needs transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rules = (pathlib.Path(lm_eval.__file__).parent / "tasks" / "ruler").glob("*.py")
    words = (pathlib.Path(wonderwords.__file__).parent / "assets").glob("*.txt")
    lines = [file.read_text(encoding="utf-8") for file in (*rules, *words)]
    bpe_file = tmp_path / "tokenizer.json"
    toy.train_bpe(bpe_file, lines, vocab_size=8000)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    data = {"tokenizer": str(bpe_file), "train": "", "eval": "", "sequence_length": 4096}
    config = toy.toy_config("none", model={"vocab_size": 8000}, data=data)
    toy.save_random(tmp_path / "run", config)
    model = LucidLM(tmp_path / "run")
    echo = EchoGenerator(load_tokenizer(str(bpe_file)))
    monkeypatch.setattr(model._generator, "_generator", echo)
    results = lm_eval.simple_evaluate(
        model, tasks=list(OFFLINE), limit=8, bootstrap_iters=0,
        metadata={"tokenizer": str(tmp_path), "max_seq_lengths": [4096]},
    )["results"]  # fmt: skip
    assert results.keys() == set(OFFLINE)
    assert len(echo.prompts) == 8 * len(OFFLINE)
    assert max(map(len, echo.prompts)) < 4096
    assert 0 < results["niah_single_1"]["4096,none"] < 1
