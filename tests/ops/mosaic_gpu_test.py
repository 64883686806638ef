"""The backend of Mosaic GPU kernels, in Pallas' interpreter where there is no Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.cases import CASES, Case
from ops.conformance import PreconditionConformance, SoftmaxConformance, assert_close, slow
from ops.float16_error import check_float16_errors
from ops.interpreter import ON_GPU

from lucid_jax import precondition, softmax_attention
from lucid_jax.ops import implementations, target
from lucid_jax.ops.precondition import mosaic_gpu_solve
from pallas_kernels.mosaic_gpu.tile import ROWS

pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax is older than 0.11"),
    pytest.mark.usefixtures("mosaic_gpu_interpreter"),
]
solve = functools.partial(precondition, implementation="mosaic_gpu")
attend = functools.partial(softmax_attention, implementation="mosaic_gpu")


class TestMosaicGpu(PreconditionConformance):
    implementation = "mosaic_gpu"
    # The products are the same for both 16-bit dtypes; of these float16 has the tighter tolerance.
    modes = (("float16", None), *([("bfloat16", None)] if ON_GPU else []))
    # One to four blocks, and heads of all widths that the kernels have.
    cases = (
        *(case for case in CASES if ON_GPU or case.length <= 300),
        Case("many_documents", length=300, batch=2, segments="many"),
        Case("heads_of_68", length=300, head_dim=68, segments="long"),
        Case("heads_of_128", length=300, head_dim=128, segments="long"),
        Case("long_documents", length=400, segments="long"),
        Case("interleaved", length=200, segments="interleaved"),
    )
    quick = ("length_129_wide-float16-None", "packed_identical-float16-None")


class TestSoftmaxMosaicGpu(SoftmaxConformance):
    implementation = "mosaic_gpu"
    modes = (("float16", None), *([("bfloat16", None)] if ON_GPU else []))
    cases = (
        *(case for case in CASES if ON_GPU or case.length <= 300),
        Case("many_documents", length=300, batch=2, segments="many", heads=4, kv_heads=2),
        Case("heads_of_68", length=300, head_dim=68, segments="long"),
        Case("heads_of_128", length=300, head_dim=128, segments="long"),
        Case("interleaved", length=200, segments="interleaved"),
        # Each buffer of tiles is used several times.
        Case("eight_blocks", length=1000, heads=2, kv_heads=1, segments="long"),
    )
    quick = ("many_documents-float16-None",)


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ("cosine0.9", "documents"),
        pytest.param("cosine0.7", "alike", marks=pytest.mark.slow),
        pytest.param("cosine0.9", "rising", marks=pytest.mark.slow),
        pytest.param("cosine0.9", "falling", marks=pytest.mark.slow),
        pytest.param("zeros", "documents", marks=pytest.mark.slow),
        pytest.param("cosine0.9", "descending", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_inputs_cost_the_error_of_float16_in_every_document(keys, sizes):
    def op(k, v, segment_ids):
        return solve(k, v, segment_ids=segment_ids)

    check_float16_errors(op, keys, sizes)


NAMES = "y", "gradient of k", "gradient of v"


def draw_documents():
    """Draws bfloat16 `k, v, y_bar` of three documents; the second one has the rows 100 to 290.

    Returns the arrays and a function of them that gives `y` and the gradients.
    """
    drawn = Case("documents", length=300, head_dim=64, segments="long", keys="cosine0.9").draw()
    ids = jnp.asarray(drawn["segment_ids"])

    @jax.jit
    def run(k, v, y_bar):
        y, pull_back = jax.vjp(functools.partial(solve, segment_ids=ids), k, v)
        return y, *pull_back(y_bar)

    return [jnp.asarray(drawn[name], jnp.bfloat16) for name in ("k", "v", "y_bar")], run


@pytest.mark.parametrize("token", [150, pytest.param(280, marks=pytest.mark.slow)])
def test_a_bad_token_stays_in_its_document(token):
    (k, v, y_bar), run = draw_documents()
    good, bad = run(k, v, y_bar), run(k, v.at[0, token].set(jnp.nan), y_bar)
    for name, x, y in zip(NAMES, good, bad):
        for rows in (slice(100), slice(290, None)):
            assert jnp.array_equal(x[:, rows], y[:, rows]), f"{name} in {rows}"
    assert jnp.isnan(bad[0][0, token:290]).all()
    rows = slice(100, token // ROWS * ROWS)
    assert jnp.array_equal(good[0][:, rows], bad[0][:, rows])


def test_the_kernels_are_traced_under_other_settings():
    # They are not run, because the interpreter does not work under both of these.
    (k, v, y_bar), run = draw_documents()
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        run.trace(k, v, y_bar)
        jax.jit(lambda *x: jax.vjp(attend, *x)[1](y_bar)).trace(k, k, v)


def test_a_document_of_zeros_has_no_gradient():
    (k, *arrays), run = draw_documents()
    for name, x in zip(NAMES, run(k, *(x.at[:, 100:290].set(0) for x in arrays))):
        assert jnp.isfinite(x).all(), name
        assert not x[:, 100:290].any(), name


def test_values_and_cotangents_of_any_size():
    (k, v, y_bar), run = draw_documents()
    exact = [np.asarray(x, np.float64) for x in run(k, v, y_bar)]
    for of_v, of_y_bar in ((2.0**20, 2.0**-8), (2.0**-20, 2.0**40)):
        scales = of_v, of_v * of_y_bar, of_y_bar
        results = run(k, v * of_v, y_bar * of_y_bar)
        for name, x, scale, want in zip(NAMES, results, scales, exact):
            assert_close(name, x.astype(jnp.float32) / scale, want, 2**-8)


def test_the_kernels_see_a_mapped_axis_as_part_of_the_batch(monkeypatch):
    # The interpreter could map them, but on a GPU all calls would share their semaphores.
    kernel, systems = mosaic_gpu_solve.solve_systems, []

    def spy(k_hat, *arrays, **options):
        systems.append(k_hat.shape[0])
        return kernel(k_hat, *arrays, **options)

    monkeypatch.setattr(mosaic_gpu_solve, "solve_systems", spy)
    k = jax.ShapeDtypeStruct((3, 1, 136, 2, 64), "bfloat16")
    jax.eval_shape(jax.vmap(solve), k, k)
    assert systems[-1] == 3 * 2


@pytest.mark.slow
def test_a_mapped_axis_has_results_of_its_own():
    (k, v, y_bar), _ = draw_documents()
    ids = jnp.arange(k.shape[1])[None] // 100
    k, ids = (jnp.stack([x, x[:, ::-1]]) for x in (k, ids))

    def run(k, v, ids):
        y, pull_back = jax.vjp(functools.partial(solve, segment_ids=ids), k, v)
        return y, *pull_back(y_bar)

    mapped, single = jax.jit(jax.vmap(run, (0, None, 0)))(k, v, ids), jax.jit(run)
    for i in range(2):
        for name, x, y in zip(NAMES, mapped, single(k[i], v, ids[i])):
            assert jnp.array_equal(x[i], y), f"{name} of {i}"


@pytest.mark.parametrize("token", [90, 150, 280])
def test_a_bad_value_reaches_no_document_without_a_row_in_its_block(token):
    (k, v, _), _ = draw_documents()
    ids = jnp.arange(k.shape[1])[None] // 100
    op = jax.jit(functools.partial(attend, segment_ids=ids))
    good, bad = (op(k, k, x) for x in (v, v.at[0, token].set(jnp.nan)))
    block = token // ROWS * ROWS
    untouched = {90: slice(200, None), 150: slice(100), 280: slice(200)}[token]
    assert jnp.array_equal(good[:, untouched], bad[:, untouched])
    assert jnp.array_equal(good[:, :block], bad[:, :block])
    assert jnp.isnan(bad[0, token : (token // 100 + 1) * 100]).all()


@pytest.mark.parametrize("name", ["v", *slow("k", "o_bar")])
def test_a_bad_token_changes_no_gradient_of_documents_without_a_row_in_its_block(name):
    drawn = Case("documents", length=400, heads=2, kv_heads=1, head_dim=64).draw()
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], [100, 100, 150, 50])[None])

    @jax.jit
    def run(q, k, v, o_bar):
        o, pull_back = jax.vjp(functools.partial(attend, segment_ids=ids), q, k, v)
        return o, *pull_back(o_bar)

    arrays = {x: jnp.asarray(drawn[x], jnp.float16) for x in ("q", "k", "v", "o_bar")}
    good = run(**arrays)
    # The last token of the second of four documents is in a tile of its neighbours in the block of
    # the rows 128 to 255, which the blocks before and behind it visit too.
    bad = run(**arrays | {name: arrays[name].at[0, 199].set(jnp.nan)})
    for x, y in zip(good, bad):
        for rows in (slice(100), slice(350, None)):
            assert jnp.array_equal(x[:, rows], y[:, rows])
    assert jnp.isnan(bad[1][0, 199]).any()


@pytest.mark.slow
def test_a_mapped_axis_of_attention_has_results_of_its_own():
    (k, v, o_bar), _ = draw_documents()
    ids = jnp.arange(k.shape[1])[None] // 100
    k = jnp.stack([k, k[:, ::-1]])

    def run(k, v):
        o, pull_back = jax.vjp(functools.partial(attend, segment_ids=ids), k, k, v)
        return o, *pull_back(o_bar)

    mapped, single = jax.jit(jax.vmap(run, (0, None)))(k, v), jax.jit(run)
    for i in range(2):
        for x, y in zip(mapped, single(k[i], v)):
            assert jnp.array_equal(x[i], y)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: "gpu")
    monkeypatch.setattr(target, "device_kind", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("shape", "dtype", "chosen"),
    [
        ((1, 32768, 16, 128), "bfloat16", "mosaic_gpu"),
        ((1, 131072, 4, 68), "float16", "mosaic_gpu"),
        ((1, 131072, 4, 64), "bfloat16", "triton"),
        ((1, 131072, 1, 128), "bfloat16", "triton"),
        ((32, 2048, 8, 128), "bfloat16", "triton"),
        ((1, 131072, 4, 128), "float32", "triton"),
        ((1, 131072, 4, 256), "bfloat16", "triton"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_it_is_chosen_where_it_is_the_fastest(shape, dtype, chosen):
    k = jax.ShapeDtypeStruct(shape, dtype)
    with implementations.recorded() as found:
        jax.eval_shape(precondition, k, k)
    assert str(found) == f"solve {chosen}"
    # It has no β.
    with implementations.recorded() as found:
        jax.eval_shape(lambda k: precondition(k, k, beta=k[..., 0]), k)
    assert str(found) == "solve triton"


@pytest.mark.parametrize(
    ("shape", "dtype", "chosen"),
    [
        ((4, 8192, 16, 128), "bfloat16", "mosaic_gpu"),
        ((8, 8192, 16, 68), "float16", "mosaic_gpu"),
        ((1, 131072, 32, 64), "bfloat16", "mosaic_gpu"),
        ((1, 8192, 8, 128), "bfloat16", "triton"),
        ((16, 2048, 16, 128), "bfloat16", "triton"),
        ((4, 16384, 32, 64), "bfloat16", "triton"),
        ((1, 131072, 16, 128), "float32", "triton"),
        ((1, 131072, 8, 256), "bfloat16", "triton"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_it_is_chosen_where_its_attention_is_the_fastest(shape, dtype, chosen):
    x, ids = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:2], "int32")
    with implementations.recorded() as found:
        jax.eval_shape(lambda x, ids: softmax_attention(x, x, x, segment_ids=ids), x, ids)
    assert str(found) == f"attention {chosen}"
