"""The count of operations agrees with XLA's, and the metrics files survive kills."""

import contextlib
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from small_models import small

from lucid_jax import lucid_attention, softmax_attention
from lucid_jax.config import ModelConfig
from lucid_jax.data.packing import FIELDS
from lucid_jax.evaluate.loss import LossReport
from lucid_jax.models.loss import weighted_losses
from lucid_jax.ops.blocks import panel_width
from lucid_jax.parallel.mesh import make_layout
from lucid_jax.training import reporter as reporter_module
from lucid_jax.training.flops import flops_per_token, model_flops, peak_flops
from lucid_jax.training.reporter import Reporter
from lucid_jax.training.writer import MetricsWriter, read_metrics


def xla_flops(f, *arguments) -> float:
    analysis = jax.jit(f).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_flops_of_the_products_with_parameters():
    # With 16 tokens attention is negligible.
    config = small(vocab_size=1024, num_layers=1, embed_dim=256, mlp_dim=512, head_dim=64)
    model = toy.model_of(config)
    batch = {name: jax.ShapeDtypeStruct((2, 16), dtype) for name, dtype in FIELDS.items()}

    def loss(params, batch):
        return weighted_losses(config, model, params, batch)[0].sum()

    counted = xla_flops(jax.value_and_grad(loss), model.abstract_params, batch)
    expected = 32 * flops_per_token(config.model, 16)
    # The backward pass of the loss recomputes the logits, except where XLA removes that for a
    # single chunk, which depends on its version.
    logits = 32 * 2 * config.model.embed_dim * config.model.vocab_size
    # XLA also counts norms, rotations and the softmax: a few percent here.
    assert any(0 <= (counted - extra) / expected - 1 < 0.05 for extra in (0, logits))


@pytest.fixture
def tile_products(monkeypatch):
    """Collects the operations of each `jnp.einsum` in the inner of two loops, run once."""
    counted = []
    einsum, depth = jnp.einsum, 0

    def body_once(lower, upper, body, carry):
        nonlocal depth
        depth += 1
        carry = body(lower, carry)
        depth -= 1
        return carry

    def count(spec, *operands, **options):
        if depth == 2:
            letters = spec.split("->")[0].replace(",", "")
            sizes = dict(zip(letters, itertools.chain(*(x.shape for x in operands))))
            counted.append(2 * math.prod(sizes.values()))
        return einsum(spec, *operands, **options)

    monkeypatch.setattr(jax.lax, "fori_loop", body_once)
    monkeypatch.setattr(jnp, "einsum", count)
    return counted


@pytest.mark.parametrize("kind", ["softmax", "lucid"])
def test_flops_of_attention(kind, tile_products):
    """The formula equals the operations of a tile times the tiles of half the square."""
    s, h, k, d = 256, 8, 2, 16
    op = {"softmax": softmax_attention, "lucid": lucid_attention}[kind]
    arrays = [jax.ShapeDtypeStruct((1, s, n, d), jnp.float32) for n in (h, k, k)]
    split = []

    def run(q, k, v):
        o, pull_back = jax.vjp(functools.partial(op, implementation="xla"), q, k, v)
        split.append(len(tile_products))
        return pull_back(o)

    # Under jit the function is traced before its derivative, and would be counted twice.
    with jax.disable_jit():
        jax.eval_shape(run, *arrays)
    tiles = s**2 / 2 / (128 * min(s, panel_width()))
    forward, backward = (
        tiles * sum(part) for part in (tile_products[: split[0]], tile_products[split[0] :])
    )
    model = ModelConfig(
        num_layers=1, num_heads=h, num_kv_heads=k, head_dim=d, attention=kind, embed_dim=1,
        mlp_dim=1, vocab_size=1,
    )  # fmt: skip
    with_attention, without = (flops_per_token(model, length) for length in (s, 0))
    assert forward == s * (with_attention - without) / 3
    # The backward pass recomputes the first of the two products, which the formula leaves out.
    assert backward - forward / 2 == 2 * forward


def test_flops_of_the_1b_model():
    """A token takes six operations a parameter, except norms and the embedding lookup."""
    config = ModelConfig(attention="softmax")
    lookup_and_norms = 32000 * 2048 + 45 * 2048
    assert flops_per_token(config, 0) == 6 * (1_100_048_384 - lookup_and_norms)
    extra = flops_per_token(ModelConfig(), 32768) - flops_per_token(config, 32768)
    attention = flops_per_token(config, 32768) - flops_per_token(config, 0)
    assert extra == attention / 8  # LUCID adds K/H of the softmax attention's operations.


def test_values_of_differential_layers_are_twice_as_wide():
    sizes = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
    pairs = [
        model_flops(ModelConfig(**sizes, attention=kinds), tokens=0, pairs=1)
        for kinds in ("softmax", "softmax,softmax,differential")
    ]
    # q kᵀ and weights·v of every map: two and three widths of a head.
    assert pairs == [6 * 3 * 2 * 8 * 16, 6 * (2 * 2 + 3) * 8 * 16]


def test_reports_count_tokens_and_the_pairs_that_documents_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(reporter_module, "peak_flops", lambda device: 1e9)
    config = toy.toy_config("corpus", batch_size=2, data={"sequence_length": 10})
    layout = make_layout(config, jax.devices()[:1])
    step = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "finite": True}
    # Two documents of 5 tokens, and one of 6 with padding.
    step |= {"tokens": 16, "pairs": 2 * 15 + 21}
    # Two LUCID layers.
    steps = [step | {"value_gain": gains} for gains in ([0.5, 0.75], [0.25, 1.0])]
    with contextlib.closing(Reporter(tmp_path, config, layout, 0)) as reporter:
        reporter.training(2, [{k: np.array(v) for k, v in x.items()} for x in steps])
    [line] = read_metrics(tmp_path)
    assert line["value_gain"] == [0.5, 1.0]
    assert line["padding"] == pytest.approx(0.2)
    flops = model_flops(config.model, 16, 51)
    assert line["mfu"] / line["tokens_per_second"] == pytest.approx(flops / 16 / 1e9)


def test_a_log_line_fits_100_columns():
    fields = [f"name_{i} {'9' * (i % 7 + 1)}" for i in range(40)]
    lines = reporter_module._join(fields).split("\n")
    assert max(map(len, lines)) <= 100 < min(map(len, lines[:-1])) + 20
    assert "".join(lines).split("  ") == fields
    assert "\n" not in reporter_module._join(["x" * 49, "y" * 49])
    assert "\n" in reporter_module._join(["x" * 49, "y" * 50])


def test_the_clock_leaves_out_a_block_and_evaluations_draw_the_curve(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(reporter_module, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(reporter_module.time, "perf_counter", lambda: clock[0])
    config = toy.toy_config("corpus", steps=9)
    step = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "finite": True}
    step |= {"tokens": 16, "pairs": 0}
    layout = make_layout(config, jax.devices()[:1])
    with contextlib.closing(Reporter(tmp_path, config, layout, 0)) as reporter:
        with reporter.off_the_clock():
            clock[0] += 1000  # Compiling.
        clock[0] += 4
        reporter.training(2, [step, step])
        assert not (tmp_path / "loss.png").exists()
        reporter.evaluation(2, LossReport(1.0, 16, 2.0, ()))
        assert (tmp_path / "loss.png").exists()
    line, _ = read_metrics(tmp_path)
    assert (line["seconds_left"], line["tokens_per_second"]) == (7 * 2.0, 8.0)


def test_pairs_of_one_document_are_half_of_the_square():
    model = small().model
    assert 64 * flops_per_token(model, 64) == model_flops(model, 64, 64**2 / 2)


def test_the_peak_of_an_unknown_device_is_measured():
    assert 1e8 < peak_flops(jax.devices()[0]) < 1e14


def test_the_writer_drops_lines_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step), "off_diagonal": [0.5, 0.25]})
    writer.write(4, {"loss": float("nan")})
    # Even a kill loses no event, so that TensorBoard shows what was trained.
    [events] = (tmp_path / "tensorboard").iterdir()
    assert [events.read_bytes().count(tag) for tag in (b"loss", b"off_diagonal/01")] == [4, 3]
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # A kill in the middle of a line.
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == "nan"
    damaged = tmp_path / "metrics.jsonl.damaged"

    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.write(3, {"loss": 2.5})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[-1]) == {"step": 3, "loss": 2.5}
    assert not damaged.exists()


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\x00", b"\0" * 9, b'{"step": 2, "lo', b"3", b'{"x": 1}']
)
def test_a_damaged_line_costs_only_itself_and_is_kept_aside(tmp_path, caplog, line):
    content = b'{"step": 1, "loss": 5.0}\n' + line + b'\n{"step": 3, "loss": 4.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 3]
    MetricsWriter(tmp_path, resume_step=3).close()
    assert f"{tmp_path}/metrics.jsonl has damaged lines" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 3]
