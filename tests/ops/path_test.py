"""PaTH and LUCID-PaTH: every backend agrees with the float64 oracle; the bound; properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle
from ops.cases import PATH_CASES, draw_keys
from ops.conformance import (
    MODES,
    PathPreconditionConformance,
    PathSoftmaxConformance,
    assert_close,
    slow,
)

from lucid_jax import Prefix, Transitions, lucid_attention, precondition
from lucid_jax.ops.precondition import xla as precondition_xla

# What shows an error in float64 or rounds as bfloat16 does; the other modes have fewer cases.
XLA_MODES = (("float64", "highest"), ("bfloat16", None))
OTHER_MODES = tuple(mode for mode in MODES if mode not in XLA_MODES)
OTHER_CASES = tuple(case for case in PATH_CASES if case.name in ("path_packed", "path_alike"))


class TestPreconditionReference(PathPreconditionConformance):
    implementation = "reference"
    modes = (("float64", "highest"),)
    quick = ("path_interleaved-float64-highest",)


class TestPreconditionXla(PathPreconditionConformance):
    implementation = "xla"
    modes = XLA_MODES
    quick = ("path_packed-float64-highest", "path_alike-bfloat16-None")


class TestPreconditionXlaInOtherModes(PathPreconditionConformance):
    implementation = "xla"
    modes, cases = OTHER_MODES, OTHER_CASES


class TestSoftmaxReference(PathSoftmaxConformance):
    implementation = "reference"
    modes = (("float64", "highest"),)


class TestSoftmaxXla(PathSoftmaxConformance):
    implementation = "xla"
    modes = XLA_MODES
    quick = ("path_packed-float64-highest", "path_alike-bfloat16-None")


class TestSoftmaxXlaInOtherModes(PathSoftmaxConformance):
    implementation = "xla"
    modes, cases = OTHER_MODES, OTHER_CASES


def draw(length: int, *, seed=0, batch=1, heads=4, kv_heads=2, d=8, dtype=np.float32):
    """Draws q, k, v and transitions."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, d)).astype(dtype)
    k, v, w = rng.normal(size=(3, batch, length, kv_heads, d)).astype(dtype)
    beta = rng.uniform(0, 2, k.shape[:3]).astype(dtype)
    return q, k, v, Transitions(w, beta)


def test_the_inverse_has_norm_at_most_two():
    """`A⁻¹` is the solution for the identity, whose rows are values of width D = S."""
    rng, shape = np.random.default_rng(0), (1, 32, 1, 32)
    kinds = ("random", "identical", "cosine0.9", "cosine0.99", "zeros")
    draws = [
        (draw_keys(rng, shape, keys), draw_keys(rng, shape, directions), beta)
        for keys in kinds
        for directions in kinds
        for beta in (0, 1, 2, rng.uniform(0, 2, shape[:3]), rng.integers(0, 3, shape[:3]))
    ]
    k, w = (np.concatenate([x[i] for x in draws]) for i in range(2))
    beta = np.concatenate([np.broadcast_to(x[2], shape[:3]) for x in draws])
    identity = np.broadcast_to(np.eye(32)[:, None], k.shape)
    with jax.enable_x64(True):
        inverse = precondition(k, identity, transitions=Transitions(w, 1.0 * beta))
    norms = np.linalg.norm(np.asarray(inverse)[:, :, 0], 2, axis=(1, 2))
    assert norms.max() <= 2 * (1 + 1e-12)
    # The bound is met nearly: identical keys reach it as the length grows.
    assert norms.max() > 1.9


@pytest.mark.parametrize("zero", ["beta", *slow("w")])
def test_identities_leave_attention_without_positions(zero):
    q, k, v, transitions = draw(300)
    transitions = transitions._replace(**{zero: np.zeros_like(getattr(transitions, zero))})

    @jax.jit
    def run(q, k, v, transitions):
        y = precondition(k, v, transitions=transitions, implementation="xla")
        op = functools.partial(lucid_attention, transitions=transitions, implementation="xla")
        o, pull_back = jax.vjp(op, q, k, v)
        return y, o, pull_back(o)

    (y, *found), (expected_y, *expected) = (run(q, k, v, t) for t in (transitions, None))
    np.testing.assert_array_equal(y, expected_y)
    # Scores within a block come first here, so that the sums of the softmax are rounded otherwise.
    for x, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, ref, atol=1e-6 * np.abs(ref).max())


def test_only_the_directions_of_w_matter():
    q, k, v, transitions = draw(150)
    scales = np.exp(8 * np.random.default_rng(1).normal(size=(1, 150, 2, 1))).astype(np.float32)
    scaled = transitions._replace(w=transitions.w * scales)
    o, o_scaled = (lucid_attention(q, k, v, transitions=t) for t in (transitions, scaled))
    assert_close("o", o_scaled, np.asarray(o, np.float64), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_panels_of_several_blocks_give_the_same(monkeypatch, packed):
    """An accelerator's panels hold several blocks, each of another level to the rows of one."""
    ids = np.searchsorted([1, 700, 900], np.arange(1100), "right")[None] if packed else None
    with jax.enable_x64(True):
        q, k, v, transitions = draw(1100, heads=2, kv_heads=1, dtype=np.float64)

        def run():
            @jax.jit
            def op(*arguments):
                def attend(q, k, v, transitions):
                    return lucid_attention(q, k, v, transitions=transitions, segment_ids=ids)

                out, pull_back = jax.vjp(attend, *arguments)
                return out, pull_back(out)

            return jax.tree.leaves(op(q, k, v, transitions))

        expected = run()
        jax.clear_caches()
        monkeypatch.setattr(precondition_xla, "panel_width", lambda: 512)
        found = run()
    jax.clear_caches()
    for x, ref in zip(found, expected):
        assert_close("out or gradient", x, np.asarray(ref), 1e-12)
    assert any((x != ref).any() for x, ref in zip(found, expected)), "the panels were not used"


@pytest.mark.parametrize("implementation", ["xla", *slow("reference")])
@pytest.mark.parametrize("name", ["beta", *slow("w")])
def test_a_bad_transition_reaches_later_tokens_of_its_segment_alone(implementation, name):
    q, k, v, transitions = draw(20)
    ids = np.repeat([[3, 1]], 10, 1).astype(np.int32)
    bad = getattr(transitions, name).copy()
    bad[0, 12, 1] = np.nan
    transitions = transitions._replace(**{name: bad})

    def op(q, k, v, transitions):
        return lucid_attention(
            q, k, v, segment_ids=ids, transitions=transitions, implementation=implementation
        )

    @jax.jit
    def run(*arguments):
        o, pull_back = jax.vjp(op, *arguments)
        return o, pull_back(jnp.ones_like(o))

    o, (_, k_bar, v_bar, transitions_bar) = run(q, k, v, transitions)
    expected = np.zeros((1, 20, 4), bool)
    expected[:, 12:, 2:] = True
    np.testing.assert_array_equal(np.isnan(o).any(-1), expected)
    # Gradients depend in reverse on the results that are NaN.
    reached = np.zeros((1, 20, 2), bool)
    reached[:, 10:, 1] = True
    for x in (k_bar, v_bar, transitions_bar.w, transitions_bar.beta[..., None]):
        np.testing.assert_array_equal(np.isnan(x).any(-1), reached)


@pytest.mark.slow
def test_vmap_and_remat_give_the_same():
    q, k, v, transitions = draw(40, batch=3)

    def loss(q, k, v, transitions):
        return (lucid_attention(q, k, v, transitions=transitions) ** 2).sum()

    expected = jax.grad(loss, (0, 1, 2, 3))(q, k, v, transitions)
    one = jax.tree.map(lambda x: x[:, None], (q, k, v, transitions))
    found = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1, 2, 3)))(*one)
    for x, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x[:, 0], ref, atol=1e-5 * np.abs(ref).max())


def test_a_chunk_after_a_prefix_is_part_of_the_whole():
    check_chunks("xla", "interleaved")


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["none", "packed", "interleaved"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_chunk_of_any_segments(implementation, segments):
    check_chunks(implementation, segments)


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["none", "packed"])
def test_a_chunk_with_panels_of_several_blocks(monkeypatch, segments):
    jax.clear_caches()
    monkeypatch.setattr(precondition_xla, "panel_width", lambda: 256)
    check_chunks("xla", segments)
    jax.clear_caches()


def check_chunks(implementation: str, segments: str, cut=330, free=20):
    """Checks results and gradients of a prefix, with `free` places that hold NaN, and a chunk."""
    rng = np.random.default_rng(0)
    ids = {
        "none": None,
        "packed": np.searchsorted([1, 100, 300], np.arange(500), "right")[None],
        "interleaved": rng.integers(0, 3, (1, 500)),
    }[segments]
    solve = functools.partial(precondition, implementation=implementation)

    def in_chunks(*tokens):
        first, (k2, v2, t2, ids2) = (
            jax.tree.map(lambda x: x[:, part], (*tokens, ids))  # noqa: B023
            for part in (slice(cut), slice(cut, None))
        )
        k1, v1, t1, ids1 = first
        y1 = solve(k1, v1, segment_ids=ids1, transitions=t1)
        buffers = jax.tree.map(lambda x: _lengthen(x, free, jnp.nan), (k1, y1, t1))
        ids1 = None if ids is None else _lengthen(ids1, free, 1)
        prefix = Prefix(*buffers[:2], ids1, jnp.array([cut]), buffers[2])
        y2 = solve(k2, v2, segment_ids=ids2, prefix=prefix, transitions=t2)
        return jnp.concatenate([y1, y2], 1)

    @jax.jit
    def run(*arguments):
        y, pull_back = jax.vjp(in_chunks, *arguments[:-1])
        return y, pull_back(arguments[-1])

    with jax.enable_x64(True):
        _, k, v, transitions = draw(500, heads=1, kv_heads=1, dtype=np.float64)
        y_bar = rng.normal(size=v.shape)
        y, (k_bar, v_bar, t_bar) = run(k, v, transitions, y_bar)
    ref, gradients, scales = oracle.path_precondition(k, v, *transitions, y_bar, ids)
    assert_close("out", y, ref, 1e-12)
    found = {"k": k_bar, "v": v_bar, "w": t_bar.w, "w_beta": t_bar.beta}
    for name, gradient in found.items():
        assert_close(name, gradient, gradients[name], 1e-12, scales.get(name))


def _lengthen(x, places, value):
    """Returns `x [B,S,…]` with more places at the end."""
    return jnp.concatenate([x, jnp.full((x.shape[0], places, *x.shape[2:]), value, x.dtype)], 1)
