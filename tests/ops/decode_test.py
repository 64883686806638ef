"""Decoding one token with a KV cache: every backend agrees with the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from ops import oracle
from ops.cases import draw_keys
from ops.conformance import FIXED_TOLERANCE, assert_close, parametrize, rounding, slow
from ops.interpreter import ON_GPU

from lucid_jax.ops.decode import LayerCache, decode_attention
from lucid_jax.ops.decode import triton as pallas_triton
from lucid_jax.ops.precondition.gram import inverse_norms


@dataclasses.dataclass(frozen=True)
class Step:
    """The inputs of one call. After the valid tokens the cache holds large numbers."""

    name: str
    lengths: tuple[int, ...] = (63,)
    size: int = 100
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    keys: str = "random"
    lucid: bool = True
    beta: bool = False
    temperature: float = 1.0

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: str) -> dict[str, np.ndarray]:
        """Draws float64 arrays whose values are representable in `dtype`."""
        rng = np.random.default_rng(sum(map(ord, self.name)))
        b, heads, d = len(self.lengths), self.kv_heads, self.head_dim
        keys = draw_keys(rng, (b, self.size + 1, heads, d), self.keys).swapaxes(1, 2)
        y = rng.normal(size=(b, heads, self.size, d))
        invalid = (np.arange(self.size) >= np.array(self.lengths)[:, None])[:, None, :, None]
        drawn = {
            "q": rng.normal(size=(b, heads * self.group, d)),
            "k": keys[:, :, -1],
            "v": rng.normal(size=(b, heads, d)),
            "beta": rng.random((b, heads)) if self.beta else np.ones((b, heads)),
            "cached_k": np.where(invalid, 1e3, keys[:, :, :-1]),
            "cached_y": np.where(invalid, 1e3, y),
        }
        return {name: rounding(dtype)(x) for name, x in drawn.items()}


CASES = (
    Step("empty", lengths=(0,)),
    Step("one", lengths=(1, 0), kv_heads=2, group=1),
    Step("full", lengths=(100, 99), head_dim=68),
    Step("ragged", lengths=(0, 5, 64, 131, 200), size=200, kv_heads=2, group=3),
    Step("wide_group", lengths=(70,), group=20, head_dim=64),
    Step("width_128", lengths=(150, 40), size=160, group=8, head_dim=128),
    Step("width_256", lengths=(90,), head_dim=256),
    Step("width_6", lengths=(90,), head_dim=6, keys="cosine0.9"),
    Step("identical_keys", keys="identical", head_dim=32),
    Step("cosine_0.99", keys="cosine0.99", head_dim=64),
    Step("zero_keys", keys="zeros", lengths=(80,)),
    Step("huge_key", keys="huge"),
    Step("beta", lengths=(0, 90), kv_heads=2, group=3, beta=True),
    Step("softmax", lengths=(7, 100), kv_heads=2, lucid=False, temperature=0.6),
    Step("softmax_full_group", group=16, lucid=False),
)


def layer_cache(step: Step, drawn, dtype) -> LayerCache:
    k, y = (jnp.asarray(drawn[name], dtype) for name in ("cached_k", "cached_y"))
    return LayerCache(k, y, inverse_norms(k) if step.lucid else None)


class DecodeConformance:
    """Tests that a backend joins by subclassing; tolerances as in `conformance`."""

    implementation: str
    dtypes: tuple[str, ...]
    quick: tuple[str, ...]

    def pytest_generate_tests(self, metafunc):
        if "step" in metafunc.fixturenames:
            runs = ((step, dtype) for dtype in self.dtypes for step in CASES)
            parametrize(metafunc, ("step", "dtype"), runs, self.quick)

    def test_output_and_cache(self, step: Step, dtype):
        drawn = step.draw(dtype)
        arguments = *drawn.values(), step.lengths, step.lucid, step.temperature
        expected = dict(zip(("o", "y"), oracle.decode(*arguments)))
        if dtype in FIXED_TOLERANCE:
            tolerance = dict.fromkeys(expected, FIXED_TOLERANCE[dtype])
        else:
            low = dict(zip(("o", "y"), oracle.decode(*arguments, rounding=rounding(dtype))))
            eps = float(ml_dtypes.finfo(dtype).eps)
            tolerance = {
                name: max(eps, 2 * np.linalg.norm(low[name] - x) / np.linalg.norm(x))
                for name, x in expected.items()
            }
        with jax.enable_x64(dtype == "float64"):
            before = layer_cache(step, drawn, dtype)
            q, k, v = (jnp.asarray(drawn[name], dtype) for name in "qkv")
            beta = jnp.asarray(drawn["beta"], dtype) if step.beta else None
            length = jnp.asarray(step.lengths, jnp.int32)

            @jax.jit
            def run(q, k, v, beta, before, length):
                return decode_attention(
                    q, k, v, before, length, beta=beta, temperature=step.temperature,
                    implementation=self.implementation,
                )  # fmt: skip

            o, after = run(q, k, v, beta, before, length)
            norm = inverse_norms(k)
        assert o.dtype == dtype
        assert_close("o", o, expected["o"], tolerance["o"])
        for b, place in enumerate(step.lengths):
            if place < step.size:
                assert_close("y", after.y[b, :, place], expected["y"][b], 2 * tolerance["y"])
                np.testing.assert_array_equal(after.k[b, :, place], k[b])
                if step.lucid:
                    found = after.inverse_norms[b, :, place]
                    np.testing.assert_allclose(found, norm[b], rtol=1e-6)
        for name in ("k", "y", *(["inverse_norms"] if step.lucid else [])):
            untouched = np.arange(step.size) != np.array(step.lengths)[:, None]
            a, b = (np.asarray(getattr(x, name)).swapaxes(1, 2) for x in (before, after))
            np.testing.assert_array_equal(a[untouched], b[untouched])


class TestXla(DecodeConformance):
    implementation = "xla"
    dtypes = ("float64", "float32", "bfloat16")
    quick = ("ragged-float64", "empty-float64", "softmax-bfloat16", "beta-float64")


@pytest.mark.usefixtures("triton_interpreter")
class TestTriton(DecodeConformance):
    implementation = "triton"
    dtypes = ("float32", "bfloat16", *(["float16"] if ON_GPU else []))
    quick = ("ragged-float32", "beta-float32")


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_squares_of_a_new_key_may_underflow_or_overflow(scale):
    step = Step("scaled", lengths=(70,))
    drawn = step.draw("float32")
    q, k, v = (jnp.asarray(drawn[name], jnp.float32) for name in "qkv")
    before, length = layer_cache(step, drawn, "float32"), jnp.array([70])

    def append(k):
        _, after = decode_attention(q, k, v, before, length, implementation="triton")
        return after.y[:, :, 70], after.inverse_norms[:, :, 70]

    (y, norm), (expected, expected_norm) = append(scale * k), append(k)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(scale * norm, expected_norm, rtol=1e-6)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("implementation", ["xla", *slow("triton")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [66, -66, 100, -100])
def test_keys_of_any_size(exponent, dtype, implementation):
    """A power of two in all keys, and its inverse in the queries, changes nothing."""
    step = Step("scaled", lengths=(70, 33), size=96, kv_heads=2)
    drawn = step.draw("float32")
    q, k, v = (jnp.asarray(drawn[name], dtype) for name in "qkv")
    cached = layer_cache(step, drawn, jnp.dtype(dtype))
    length, c = jnp.asarray(step.lengths, jnp.int32), jnp.asarray(2.0**exponent, dtype)
    keys = cached.k * c
    scaled = LayerCache(keys, cached.y, inverse_norms(keys))
    expected, _ = decode_attention(q, k, v, cached, length, implementation=implementation)
    found, _ = decode_attention(
        q * jnp.asarray(2.0**-exponent, dtype), k * c, v, scaled, length,
        implementation=implementation,
    )  # fmt: skip
    np.testing.assert_allclose(
        *(np.asarray(x, float) for x in (found, expected)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(jax.device_count() < 3, reason="the cache needs three devices")
@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("implementation", ["xla", *slow("triton")])
@pytest.mark.parametrize("lucid", [True, *slow(False)])
def test_devices_that_share_a_cache_agree(implementation, lucid):
    """Each device has its own length, one has no valid token, and one gets the new token."""
    step = Step("shared", lengths=(70, 33), size=96, kv_heads=2, lucid=lucid)
    drawn = step.draw("float32")
    whole = layer_cache(step, drawn, jnp.float32)
    q, k, v = (jnp.asarray(drawn[name], jnp.float32) for name in "qkv")
    mesh = jax.make_mesh((3,), ("x",), (AxisType.Auto,), devices=jax.devices()[:3])
    part, everywhere = PartitionSpec(None, None, "x"), PartitionSpec()

    def on_one(q, k, v, cached, length):
        start = 32 * jax.lax.axis_index("x")
        here = jnp.clip(length - start, 0, 32)
        return decode_attention(q, k, v, cached, here, axis_name="x", implementation=implementation)

    length = jnp.asarray(step.lengths, jnp.int32)
    o, after = jax.jit(
        jax.shard_map(
            on_one, mesh=mesh, in_specs=(*[everywhere] * 3, part, everywhere),
            out_specs=(everywhere, part),
        )
    )(q, k, v, whole, length)  # fmt: skip
    expected_o, expected = decode_attention(q, k, v, whole, length, implementation="xla")
    np.testing.assert_allclose(o, expected_o, rtol=1e-4, atol=1e-5)
    for b, n in enumerate(step.lengths):
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected)):
            # After the valid tokens, other devices hold the new token too.
            x, y = (a[b, :, : n + 1] for a in (x, y))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((1, 4, 131072, 64), 64), ((16, 4, 131072, 64), 8), ((1, 4, 2048, 64), 32),
        ((256, 8, 4096, 128), 1), ((1, 1, 5, 64), 1),
        ((1, 1, 131072, 256), 16),
    ],
)  # fmt: skip
def test_the_number_of_splits_keeps_a_gpu_busy(shape, count):
    assert pallas_triton.choose_splits(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).count == count


Q, ROW, CACHE, LENGTH = (
    jnp.zeros(s) for s in ((2, 4, 8), (2, 2, 8), (2, 2, 16, 8), (2,))
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"q must have shape \[B,H,D\]", {"q": Q[0]}),
        (ValueError, r"H must be a multiple of K; got H=3 query heads, K=2", {"q": Q[:, :3]}),
        (TypeError, r"v must have dtype float32; got bfloat16", {"v": ROW.astype(jnp.bfloat16)}),
        (ValueError, r"cached.y must have shape \[B,K,P,D\]", {"y": CACHE[:, :, 1:]}),
        (ValueError, r"cached.inverse_norms must have shape", {"norms": CACHE}),
        (TypeError, r"length must have an integer dtype", {"length": LENGTH}),
        (ValueError, r"temperature must be positive", {"temperature": 0}),
        (ValueError, r"beta must have shape \[B,K\] = \(2, 2\); got \(2,\)", {"beta": LENGTH}),
        (ValueError, r"beta is for LUCID attention; got a cache", {"beta": ROW[..., 0]}),
        (ValueError, r"must be None or one of xla, triton; got 'cuda'", {"implementation": "cuda"}),
        (ValueError, r"'triton' cannot run this call: it needs", {"implementation": "triton"}),
    ],
)  # fmt: skip
@pytest.mark.skipif(ON_GPU, reason="one error reports a missing GPU")
def test_error_messages(error, message, change):
    arguments = {
        "q": Q, "k": ROW, "v": ROW, "y": CACHE, "norms": None, "length": LENGTH.astype(jnp.int32),
        "temperature": 1.0, "implementation": None, "beta": None,
    } | change  # fmt: skip
    cached = LayerCache(CACHE, arguments.pop("y"), arguments.pop("norms"))
    q, k, v, length = (arguments.pop(name) for name in ("q", "k", "v", "length"))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: decode_attention(q, k, v, cached, length, **arguments))
