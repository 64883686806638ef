"""Properties of `precondition` for any keys: norm, causality, packing, prefixes, transforms."""

import contextlib
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.conformance import FIXED_TOLERANCE, assert_close, slow
from ops.interpreter import interpreted

from lucid_jax import Prefix, precondition
from lucid_jax.ops.blocks import panel_width

# The widest dtype of each backend.
DTYPES = {
    "reference": np.float64,
    "xla": np.float64,
    "triton": np.float32,
    "mosaic_tpu": np.float32,
}
KERNELS = ("triton", "mosaic_tpu")
TOLERANCES = {name: FIXED_TOLERANCE[np.dtype(dtype).name] for name, dtype in DTYPES.items()}
PROPERTY = hypothesis.settings(deadline=None, max_examples=12, derandomize=True)

# Few lengths, because each one is compiled. 150 spans several blocks and is no multiple of any;
# 1040 spans two panels on an accelerator, where panels are wider.
LENGTHS = (1, 150, 1040)
lengths = st.sampled_from(LENGTHS)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=["xla", *slow("reference", "triton", "mosaic_tpu")])
def implementation(request):
    kernels = request.param in KERNELS
    with interpreted(request.param) if kernels else contextlib.nullcontext():
        yield request.param


@functools.cache
def solver(implementation: str):
    """Returns one jitted op, at full precision, for all examples."""
    return jax.jit(
        functools.partial(precondition, implementation=implementation, precision="highest")
    )


@functools.cache
def solver_with_gradients(implementation: str):
    """Returns one jitted function from k, v and the cotangent of y to y and the gradients."""

    @jax.jit
    def run(k, v, cotangent):
        y, pull_back = jax.vjp(solver(implementation), k, v)
        return y, pull_back(cotangent)

    return run


def draw(seed: int, length: int, *, batch: int = 1, dtype=np.float32):
    """Draws keys with a common direction and random norms, some of them zero, and values."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, 2, 8)
    k = rng.normal(size=shape) + rng.exponential() * rng.normal(size=(1, 1, 2, 8))
    k *= np.exp(3 * rng.normal(size=(*shape[:3], 1)))
    k *= rng.random((*shape[:3], 1)) > 0.1
    return k.astype(dtype), rng.normal(size=shape).astype(dtype)


@PROPERTY
@hypothesis.given(seed=seeds, length=lengths)
def test_the_norm_at_most_doubles(implementation, seed, length):
    k, v = draw(seed, length)
    y = np.asarray(solver(implementation)(k, v))
    norm = functools.partial(np.linalg.norm, axis=1)
    assert (norm(y) <= 2 * norm(v) * (1 + 1e-5)).all()


@PROPERTY
@hypothesis.given(seed=seeds, length=lengths)
def test_the_norm_at_most_doubles_with_beta(implementation, seed, length):
    rng = np.random.default_rng(seed)
    k, v = draw(seed, length)
    if seed % 2:  # Without diag(β) on the right, alike keys give a norm that grows with length.
        k = np.broadcast_to(k[:, :1], k.shape).copy()
    beta = (rng.random(v.shape[:3]) ** rng.choice([0.1, 1, 10])).astype(np.float32)
    y = np.asarray(solver(implementation)(k, v, beta=beta))
    norm = functools.partial(np.linalg.norm, axis=1)
    assert (norm(y) <= 2 * norm(v) * (1 + 1e-5)).all()


def test_beta_of_one_is_none_and_of_zero_removes_a_token(implementation):
    k, v = draw(0, 150)
    solve = solver(implementation)
    expected = np.asarray(solve(k, v))
    np.testing.assert_allclose(solve(k, v, beta=np.ones(v.shape[:3], np.float32)), expected)
    keep = np.arange(150) % 3 != 1
    y = np.asarray(solve(k, v, beta=np.broadcast_to(keep[:, None], v.shape[:3]).astype(np.float32)))
    assert np.abs(y[:, ~keep]).max() <= 1e-16
    assert_close("other tokens", y[:, keep], oracle.precondition(k[:, keep], v[:, keep]), 1e-5)


@pytest.mark.parametrize("beta", [0, 1e-30, 1e-6, 1e-3, 1])
def test_the_gradient_of_any_beta_is_right(implementation, beta):
    k, v = draw(1, 150)
    beta = np.full(v.shape[:3], beta, np.float32)

    @jax.jit
    def run(beta):
        _, pull_back = jax.vjp(lambda beta: solver(implementation)(k, v, beta=beta), beta)
        return pull_back(jnp.cos(v))[0]

    found = run(beta)
    gradients, _ = oracle.precondition_gradients(k, v, np.cos(v), beta=beta)
    assert_close("gradient of beta", found, gradients["beta"], 1e-5)


@PROPERTY
@hypothesis.given(seed=seeds, length=lengths, data=st.data())
def test_earlier_tokens_do_not_depend_on_later_ones(implementation, seed, length, data):
    t = data.draw(st.integers(0, length - 1))
    k, v = draw(seed, length)
    before = solver(implementation)(k, v)
    # New arrays, because jit may alias the old ones, which must keep their values.
    k, v = (np.concatenate([x[:, :t], y[:, t:]], 1) for x, y in zip((k, v), draw(seed + 1, length)))
    after = solver(implementation)(k, v)
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert not np.array_equal(before[:, t], after[:, t])


@PROPERTY
@hypothesis.given(seed=seeds, data=st.data())
def test_packed_documents_equal_separate_ones(implementation, seed, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, 149), min_size=1, max_size=4)))
    bounds = list(zip([0, *cuts], [*cuts, 150]))
    ids = data.draw(st.permutations(range(len(bounds))))
    segment_ids = np.concatenate(
        [np.full((1, stop - start), id_, np.int32) for id_, (start, stop) in zip(ids, bounds)], 1
    )
    with jax.enable_x64(DTYPES[implementation] == np.float64):
        k, v = draw(seed, 150, dtype=DTYPES[implementation])
        y = np.asarray(solver(implementation)(k, v, segment_ids=segment_ids))
    for start, stop in bounds:
        # Not bitwise: a segment that begins inside a block adds up in other groups.
        alone = oracle.precondition(k[:, start:stop], v[:, start:stop])
        assert_close(
            f"tokens {start} to {stop}", y[:, start:stop], alone, TOLERANCES[implementation]
        )


@pytest.mark.parametrize("implementation", ["xla", *slow("triton")], indirect=True)
@PROPERTY
@hypothesis.given(seed=seeds, cuts=st.sampled_from([(1,), (2,), (1, 2)]))
def test_packed_documents_at_block_bounds_equal_separate_ones_bitwise(implementation, seed, cuts):
    block = {"xla": panel_width(), "triton": 64}[implementation]
    bounds = [block * n for n in (0, *cuts, 3)]
    k, v = draw(seed, 3 * block)
    rows = np.arange(3 * block)
    packed = solver(implementation)(
        k, v, segment_ids=np.searchsorted(bounds, rows, "right").astype(np.int32)[None]
    )
    for start, stop in itertools.pairwise(bounds):
        # Rolled to the front and padded to the same length, so that one program computes both.
        alone = solver(implementation)(
            *(np.roll(x, -start, 1) for x in (k, v)),
            segment_ids=np.zeros_like(rows, np.int32)[None],
        )
        np.testing.assert_array_equal(packed[:, start:stop], alone[:, : stop - start])


@PROPERTY
@hypothesis.given(seed=seeds, cut=st.integers(1, 149))
def test_tokens_do_not_depend_on_other_segments(implementation, seed, cut):
    segment_ids = (np.arange(150) >= cut).astype(np.int32)[None]
    k, v = draw(seed, 150)
    before = solver(implementation)(k, v, segment_ids=segment_ids)
    k, v = (
        np.concatenate([y[:, :cut], x[:, cut:]], 1) for x, y in zip((k, v), draw(seed + 1, 150))
    )
    after = solver(implementation)(k, v, segment_ids=segment_ids)
    np.testing.assert_array_equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("segmented", [True, *slow(False)])
@PROPERTY
@hypothesis.given(seed=seeds, cut=st.integers(0, 299))
def test_any_split_with_a_prefix_equals_the_whole(implementation, segmented, seed, cut):
    # Every split has the same shapes: a full buffer with `cut` valid tokens as the prefix, and the
    # other tokens rolled to the front, where the tokens after them cannot affect them.
    ids = (np.arange(300) // 110).astype(np.int32)[None] if segmented else None
    rolled = functools.partial(np.roll, shift=-cut, axis=1)
    beta = np.random.default_rng(seed).random((1, 300, 2), np.float32)
    with jax.enable_x64(DTYPES[implementation] == np.float64):
        k, v = draw(seed, 300, dtype=DTYPES[implementation])
        whole = oracle.precondition(k, v, ids, beta=beta).astype(k.dtype)
        rest = solver(implementation)(
            rolled(k),
            rolled(v),
            segment_ids=rolled(ids) if segmented else None,
            beta=rolled(beta),
            prefix=Prefix(k, whole, ids, length=np.array([cut], np.int32)),
        )
    assert_close("rest", rest[:, : 300 - cut], whole[:, cut:], TOLERANCES[implementation])


def test_tokens_after_the_length_of_a_prefix_are_never_read(implementation):
    k, v = draw(0, 150, batch=3, dtype=DTYPES[implementation])
    filled = np.array([0, 40, 110], np.int32)
    whole = [
        oracle.precondition(k[i : i + 1, 110 - n :], v[i : i + 1, 110 - n :])
        for i, n in enumerate(filled)
    ]
    with jax.enable_x64(DTYPES[implementation] == np.float64):
        buffer_k, buffer_y = np.full((2, 3, 200, 2, 8), np.nan, k.dtype)
        for i, n in enumerate(filled):
            buffer_k[i, :n], buffer_y[i, :n] = k[i, 110 - n : 110], whole[i][0, :n]
        prefix = Prefix(jnp.asarray(buffer_k), jnp.asarray(buffer_y), length=jnp.asarray(filled))

        def chunk(prefix, k, v):
            return precondition(
                k, v, prefix=prefix, implementation=implementation, precision="highest"
            )

        chunk_k, chunk_v = jnp.asarray(k[:, 110:]), jnp.asarray(v[:, 110:])
        run = jax.jit(lambda k, y: chunk(Prefix(k, y, length=prefix.length), chunk_k, chunk_v))
        y, pull_back = jax.vjp(run, prefix.k, prefix.y)
        k_bar, y_bar = pull_back(jnp.ones_like(y))
    for i, n in enumerate(filled):
        assert_close(f"sequence {i}", y[i], whole[i][0, n:], TOLERANCES[implementation])
        for gradient in (k_bar, y_bar):
            np.testing.assert_array_equal(gradient[i, n:], 0)
            assert np.isfinite(gradient).all()
        assert n == 0 or np.abs(y_bar[i, :n]).max() > 0


@pytest.mark.parametrize("with_beta", [True, *slow(False)])
def test_gradients_through_a_split_equal_those_of_the_whole(implementation, with_beta):
    check_gradients_through_a_split(implementation, cut=110, with_beta=with_beta)


@pytest.mark.slow
@pytest.mark.usefixtures("wide_panels")
def test_gradients_through_a_split_of_wide_panels():
    check_gradients_through_a_split("xla", cut=140, with_beta=False)


def check_gradients_through_a_split(implementation: str, cut: int, *, with_beta: bool):
    k, v = draw(3, 300, dtype=DTYPES[implementation])
    ids = (np.arange(300) // 70).astype(np.int32)[None]
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=v.shape)
    beta = rng.random((1, 300, 2), np.float32) if with_beta else None
    solve = functools.partial(precondition, implementation=implementation, precision="highest")

    def split(k, v, beta):
        before, after = (None, None) if beta is None else (beta[:, :cut], beta[:, cut:])
        first = solve(k[:, :cut], v[:, :cut], segment_ids=ids[:, :cut], beta=before)
        prefix = Prefix(k[:, :cut], first, jnp.asarray(ids[:, :cut]))
        rest = solve(k[:, cut:], v[:, cut:], segment_ids=ids[:, cut:], prefix=prefix, beta=after)
        return jnp.concatenate([first, rest], 1)

    with jax.enable_x64(DTYPES[implementation] == np.float64):
        y, pull_back = jax.vjp(jax.jit(split), *jax.tree.map(jnp.asarray, (k, v, beta)))
        k_bar, v_bar, beta_bar = pull_back(jnp.asarray(cotangent, y.dtype))
    gradients, size = oracle.precondition_gradients(k, v, cotangent, ids, beta=beta)
    assert_close("out", y, oracle.precondition(k, v, ids, beta=beta), TOLERANCES[implementation])
    if with_beta:
        # It is float32, whatever the dtype of the keys.
        assert_close("gradient of beta", beta_bar, gradients["beta"], 1e-5)
    assert_close("gradient of k", k_bar, gradients["k"], TOLERANCES[implementation], size)
    assert_close("gradient of v", v_bar, gradients["v"], TOLERANCES[implementation])


@pytest.mark.parametrize("segmented", [True, *slow(False)])
def test_vmap_and_jit_change_nothing(implementation, segmented):
    k, v = (x.reshape(3, 2, 150, 2, 8) for x in draw(5, 150, batch=6, dtype=DTYPES[implementation]))
    ids = np.random.default_rng(0).integers(0, 3, (3, 2, 150)).astype(np.int32)
    ids = np.sort(ids, -1) if segmented else None
    # Mapped with the segments, so that one case maps an axis of k and v alone.
    beta = np.random.default_rng(0).random((3, 2, 150, 2), np.float32) if segmented else None

    def loss(k, v, beta, ids):
        y = precondition(k, v, segment_ids=ids, beta=beta, implementation=implementation)
        return jnp.sum(jnp.sin(y)), y

    argnums = (0, 1, 2) if segmented else (0, 1)
    gradient = jax.jit(jax.grad(loss, argnums, has_aux=True))
    # The gradients of tiny keys are large.
    tolerance = TOLERANCES[implementation]
    with jax.enable_x64(DTYPES[implementation] == np.float64):
        mapped = jax.jit(jax.vmap(gradient))(k, v, beta, ids)
        for i in range(3):
            single = gradient(*jax.tree.map(lambda x: jnp.asarray(x[i]), (k, v, beta, ids)))  # noqa: B023
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=10 * tolerance),
                jax.tree.map(lambda x: x[i], mapped),  # noqa: B023
                single,
            )


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e30])
def test_the_norm_of_keys_does_not_matter(implementation, scale):
    k, v = np.random.default_rng(0).normal(size=(2, 1, 40, 2, 8)).astype(np.float32)
    run = solver_with_gradients(implementation)
    y, (k_bar, _) = run(k, v, v)
    scaled, (scaled_k_bar, _) = run(k * np.float32(scale), v, v)
    np.testing.assert_allclose(scaled, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled_k_bar * np.float32(scale), k_bar, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_residuals_and_temporaries_are_linear_in_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
        loss = lambda k, v: jnp.sum(precondition(k, v, implementation="xla"))  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(65536) < 4.2 * temporaries(16384)


def test_the_size_of_keys_does_not_matter(implementation):
    """Powers of two, from the smallest normal numbers to the largest, and their gradients."""
    rng = np.random.default_rng(0)
    k = rng.integers(1, 4, (1, 150, 2, 8)) * rng.choice([-1.0, 1.0], (1, 150, 2, 8))
    v, y_bar = rng.normal(size=(2, *k.shape)).astype(np.float32)
    exponents = rng.choice([-126, -120, -50, -39, 0, 39, 50, 100, 126], (1, 150, 2, 1))

    @jax.jit
    def run(k):
        y, pull_back = jax.vjp(
            lambda k: precondition(k, v, implementation=implementation, precision="highest"), k
        )
        return y, *pull_back(jnp.asarray(y_bar))

    y, k_bar = run(np.ldexp(k, exponents).astype(np.float32))
    expected, expected_bar = run(k.astype(np.float32))
    assert_close("y", y, np.asarray(expected, float), 1e-5)
    # Gradients of the largest keys are subnormal, those of the smallest next to infinity.
    normal = (np.abs(exponents) <= 100) & np.ones_like(k, bool)
    scaled = np.ldexp(np.asarray(k_bar, float), exponents)
    assert_close("k̄", scaled[normal], np.asarray(expected_bar, float)[normal], 1e-5)
