"""The paper's claims on learnability, conditioning and attention noise, at toy sizes."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from experiments import activations, measuring
from experiments.attention_noise import run as noise_run
from experiments.attention_noise import weights
from experiments.conditioning import definitions, keys, operators
from experiments.conditioning import run as conditioning_run
from experiments.learnability import layer
from experiments.learnability import run as learnability_run
from experiments.retrieval.task import Retrieval
from lucid_jax import lucid_attention, softmax_attention
from lucid_jax.checkpoint.manager import save_params
from lucid_jax.config import Config
from lucid_jax.ops.precondition import xla

TASK = Retrieval(length=72, digits=2, alphabet=3, needles=6, queries=4)


def drawn(count, needles):
    rows = jax.jit(TASK.rows, static_argnames=("count", "needles"))
    return jax.device_get(rows(jax.random.key(0), count=count, needles=needles))


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Untrained models: of softmax layers, and of a softmax and a LUCID layer, one sharper."""
    model = {
        "vocab_size": 258, "num_layers": 2, "embed_dim": 32, "mlp_dim": 32, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "init_std": 0.5,
    }  # fmt: skip
    directories = {}
    for name, attention, temperature in (
        ("softmax", "softmax", 1.0),
        ("softmax_lucid", "softmax,lucid", 1.0),
        ("sharp_lucid", "softmax,lucid", 0.5),
    ):
        config = Config.from_dict(
            {"model": {**model, "attention": attention, "temperature": temperature}}
        )
        directory = tmp_path_factory.mktemp("run") / name
        params = toy.model_of(config).init(seed=0)
        save_params(directory, config, 1, params)
        directories[name] = directory
    return directories


def test_the_second_phase_has_a_floor_for_functions_of_the_own_token(monkeypatch):
    monkeypatch.setattr(layer, "TOKENS", 5)
    rows = np.array(list(itertools.permutations(range(5))))
    average = rows.cumsum(1) / np.arange(1, 6)
    best = np.array([average[rows == token].mean() for token in range(5)])
    expected = np.mean((average - best[rows]) ** 2)
    assert learnability_run.own_token_loss() == pytest.approx(expected)


def test_learnability_is_recorded_for_every_seed(tmp_path, capsys):
    names = [str(learnability_run.VARIANTS[i]) for i in (0, -1)]
    learnability_run.main(
        ["--seeds=2", "--first=300", "--second=100", "--every=100", f"--out={tmp_path}"]
        + [f"--only={name}" for name in names]
    )
    assert "| softmax, temperature 1, second phase alone | – |" in capsys.readouterr().out
    result = json.loads((tmp_path / "learnability.json").read_text())
    by_name = {x["variant"]: x for x in result["runs"]}
    assert list(by_name) == names
    lucid = by_name["LUCID"]["records"]
    # Both phases learn: the first from a mean square of 28, the second from what it left.
    assert np.shape(lucid["loss"]) == (2, 4)
    assert all(x[2] < 8 and x[3] < x[2] for x in lucid["loss"])
    alone = by_name["softmax, temperature 1, second phase alone"]
    assert np.shape(alone["records"]["loss"]) == (2, 1)
    assert alone["summary"]["first_phase"] is None
    assert (tmp_path / "learnability.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_that_is_not_the_librarys_attention_is_not_trained(monkeypatch, tmp_path):
    solve = xla._solve
    monkeypatch.setattr(xla, "_solve", lambda *a: solve(*a) * (1 + 1e-6))
    jax.clear_caches()
    with pytest.raises(measuring.GateError, match="LUCID: the layer by token differs"):
        learnability_run.main([f"--out={tmp_path}"])
    jax.clear_caches()


def test_products_and_norms_are_those_of_the_dense_matrix():
    length = 256
    k = keys.random_keys(0.9, length, seeds=2)
    k[:, :, 1] = k[:, :1, 1]  # Identical keys: the largest norm that there is.
    k32 = jnp.asarray(k, jnp.float32)
    x = jax.random.normal(jax.random.key(0), k.shape)
    found = {}
    for name, op in (("norm", operators.multiply), ("inverse_norm", operators.solve)):
        both = [functools.partial(op, k32, transpose=t) for t in (False, True)]
        found[name] = operators.norm(*both, x, steps=8).value
        for head in range(2):
            a = conditioning_run.dense(k[0, :, head])
            a = a if name == "norm" else np.linalg.inv(a)
            for f, exact in zip(both, (a, a.T)):
                y = f(x)[0, :, head]
                exact = exact @ np.asarray(x[0, :, head], np.float64)
                assert np.linalg.norm(y - exact) < 1e-5 * np.linalg.norm(exact)
    exact = conditioning_run.hold_to_dense(k, {n: np.asarray(v) for n, v in found.items()})
    assert exact["dense_norm"][1] == pytest.approx(operators.most_possible(length))
    assert exact["dense_inverse_norm"].max() <= 2


def test_conditioning_of_random_and_of_trained_keys(tmp_path, workdirs, capsys):
    conditioning_run.main(["--lengths=256", "--seeds=2", f"--out={tmp_path}"])
    text = tmp_path / "text.txt"
    text.write_text("lower triangle keys " * 10)
    source = [f"--checkpoint={workdirs['softmax_lucid']}", f"--text={text}"]
    conditioning_run.main(["--lengths=100", *source, f"--out={tmp_path}"])
    assert "| softmax_lucid, layer 2 | 100 |" in capsys.readouterr().out
    for name, sets in (("random", 4), ("trained", 2)):
        records = json.loads((tmp_path / f"{name}.json").read_text())["records"]
        assert len(records) == sets
        for x in records:
            assert len(x["norm"]) == 2
            assert max(x["inverse_norm"]) <= 2
            assert max(x["float32_error"]) < 1e-5 < max(x["bfloat16_error"]) < 0.1
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_that_is_too_short_is_refused(tmp_path, workdirs):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(ValueError, match="has 7 tokens, fewer than 8"):
        keys.trained_sets([workdirs["softmax"]], text, [4, 8])


def test_norms_that_are_not_those_of_the_dense_matrix_are_refused(tmp_path, monkeypatch):
    multiply = operators.multiply
    monkeypatch.setattr(operators, "multiply", lambda *a, **k: 1.05 * multiply(*a, **k))
    with pytest.raises(measuring.GateError, match="norm at 256 rows"):
        conditioning_run.main(["--lengths=256", "--seeds=2", f"--out={tmp_path}"])


def test_definitions_agree_on_a_and_are_drawn_out(tmp_path, capsys):
    definitions.main(["--lengths=32,64,128", "--seeds=1", f"--out={tmp_path}"])
    assert capsys.readouterr().out.count("| whole kernel matrix |") == len(keys.COSINES)
    result = json.loads((tmp_path / "definitions.json").read_text())
    for x in result["records"]:
        cosine = float(x["keys"].split()[-1])
        a = conditioning_run.dense(keys.random_keys(cosine, x["length"], 1)[0, :, 0])
        assert x["condition"]["A"][0] == pytest.approx(np.linalg.cond(a), rel=1e-3)
    # The shorter half of the lengths counts for nothing.
    slope, far = definitions.extrapolate([1, 2, 4, 8], [5, 1, 16, 64])
    assert slope == pytest.approx(2)
    assert far == pytest.approx(definitions.FAR**2)


def test_activations_are_what_attention_reads(workdirs):
    """Attention over them, by the weights too, is the layer's own."""
    model = activations.Trained.load(workdirs["sharp_lucid"])
    text, answers = drawn(1, needles=6)
    row = weights.questions(TASK, text[0], answers[0])
    found = activations.activations(model.model, model.params, jnp.asarray(row.tokens)[None])
    by_weights = weights.weights(model, row)
    ops = functools.partial(softmax_attention, temperature=0.5), lucid_attention
    for i, op in enumerate(ops):
        q, k, v = (x[i] for x in found)
        expected = op(q, k, v)[0, row.asked]
        values = jnp.repeat(v[0], 2, axis=1)
        actual = jnp.einsum("hmt,thd->mhd", by_weights.effective[i], values)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert (by_weights.effective[1] < 0).any()
    # The model that computes hidden states of its own agrees on what enters the second layer.
    assert weights.right(model, row) in [0, 0.25, 0.5, 0.75, 1]


def test_needles_are_found_before_their_questions():
    texts, answers = drawn(8, needles=3)
    for text, answer in zip(texts, answers):
        row = weights.questions(TASK, text, answer)
        assert len(row.value) == 3
        np.testing.assert_array_equal(row.tokens[row.value], row.answer)
        for back in range(2):
            np.testing.assert_array_equal(
                row.tokens[row.value - 1 - back], row.tokens[row.asked - back]
            )
        assert (row.value < 73 - TASK.asked_tokens).all()


def test_attention_noise_of_two_models(tmp_path, workdirs, capsys):
    noise_run.main(
        [
            f"--softmax={workdirs['softmax']}", f"--lucid={workdirs['softmax_lucid']}",
            "--length=72", "--alphabet=3", "--needles=6", "--queries=4", "--rows=2",
            f"--out={tmp_path}",
        ]
    )  # fmt: skip
    assert capsys.readouterr().out.count("| lucid |") == 2
    records = json.loads((tmp_path / "attention_noise.json").read_text())["records"]
    heads = {kind: {k: np.array(v) for k, v in x["heads"].items()} for kind, x in records.items()}
    assert heads["softmax"]["value"].shape == (2, 4)
    for of in (heads["softmax"], {k: v[:1] for k, v in heads["lucid"].items()}):
        np.testing.assert_allclose(of["effective_value"], of["value"], atol=1e-4)
        np.testing.assert_allclose(of["effective_size"], 1, atol=1e-4)
        assert (of["negative"] == 0).all()
    assert (heads["lucid"]["negative"][1] > 0).all()
    assert not records["softmax"]["accuracy_without_inverse"]
    assert list(records["lucid"]["accuracy_without_inverse"]) == ["1"]
    assert (tmp_path / "attention_noise.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_without_its_inverse_attends_to_the_values(workdirs):
    model = activations.Trained.load(workdirs["softmax_lucid"])
    without = model.without_inverse(1)
    row = weights.questions(TASK, *(x[0] for x in drawn(1, 6)))
    before, after = (weights.weights(x, row) for x in (model, without))
    assert not np.allclose(before.effective[1], before.softmax[1], atol=1e-3)
    np.testing.assert_array_equal(after.effective[1], after.softmax[1])
    np.testing.assert_array_equal(after.softmax, before.softmax)
    # The softmax model has the same parameters, from the same seed.
    softmax = activations.Trained.load(workdirs["softmax"])
    logits = [
        x.model.merge(x.params)(row.tokens[None], np.arange(72)[None], None)[0]
        for x in (model, without, softmax)
    ]
    np.testing.assert_array_equal(logits[1], logits[2])
    assert not np.allclose(logits[0], logits[2], atol=1e-3)
    with pytest.raises(ValueError, match=r"temperature of 0\.5; expected 1"):
        activations.Trained.load(workdirs["sharp_lucid"]).without_inverse(1)


def test_who_looks_at_itself_alone_sees_no_needle():
    row = weights.questions(TASK, *(x[0] for x in drawn(1, 6)))
    itself = np.eye(TASK.length)[row.asked][None, None]
    found = weights.describe(row, weights.Weights(itself, itself), TASK.digits + 1)
    ones = {name: x.item() for name, x in found.items() if x != 0}
    assert ones == {"own": 1, "effective_size": 1}


def test_a_needle_below_zero_is_found_all_the_same():
    row = weights.questions(TASK, *(x[0] for x in drawn(1, 6)))
    itself, value = (np.eye(TASK.length)[at] for at in (row.asked, row.value))
    # Of the last question another token has the larger weight.
    other = np.outer(np.arange(4) == 3, np.eye(TASK.length)[0])
    effective = (itself - 0.5 * value + 0.6 * other)[None, None]
    found = weights.describe(row, weights.Weights(itself[None, None], effective), TASK.digits + 1)
    assert found["largest"] == 0.75
    assert found["effective_value"] == -0.5
    assert found["negative"] == pytest.approx(np.mean([1 / 3] * 3 + [0.5 / 2.1]))
