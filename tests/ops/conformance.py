"""The tests that every backend passes: the output and every gradient, by name.

A backend joins by subclassing and naming itself:

    class TestMyBackend(PreconditionConformance):
        implementation = "my_backend"
        quick = ("packed-float32-highest",)  # The ids of a default run.

Tolerances, all on `‖out − ref‖ / ‖ref‖` against float64 on the same rounded inputs:

    float64   1e-12
    float32   1e-5, at precision="highest"
    bfloat16  twice the error that rounding the normalised keys, A (or the softmax weights) and
    float16   the outputs to that dtype causes in float64, measured in the same test; of identical
              keys the larger of two, with keys as they are and as the kernels scale them
    either of the two at precision="highest": one rounding of the result

The errors of `q̄` and `k̄` are relative to their norms before a final cancellation; see the
gradients in `oracle`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ops import oracle
from ops.cases import BETA_CASES, CASES, PATH_CASES, Case

from lucid_jax import Transitions, precondition, softmax_attention

# That of the kernels' keys of 16 columns, but for a power of two (`pallas_kernels.scaling`).
_KERNEL_SCALE = math.log2(math.e) ** 0.5
FIXED_TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
# (dtype, precision): the modes that users run, and full precision on 16-bit inputs.
MODES = (
    ("float64", "highest"),
    ("float32", "highest"),
    ("bfloat16", None),
    ("bfloat16", "highest"),
    ("float16", None),
)


def slow(*values):
    """Returns parameters that a default run leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def parametrize(metafunc, names: tuple[str, ...], runs, quick: tuple[str, ...]):
    """Parametrizes a test; the runs whose ids are not in `quick` are slow."""
    runs = {"-".join(map(str, run)): run for run in runs}
    assert runs.keys() >= set(quick), f"no such id: {set(quick) - runs.keys()}"
    params = [
        pytest.param(*run, id=id_, marks=[] if id_ in quick else [pytest.mark.slow])
        for id_, run in runs.items()
    ]
    metafunc.parametrize(names, params)


def rounding(dtype: str, factor: float = 1):
    """Returns a function that rounds a float64 array, times a factor, to `dtype` and back."""
    to = ml_dtypes.finfo(dtype).dtype
    return lambda x: (np.asarray(x) * factor).astype(to).astype(np.float64) / factor


def assert_close(name, out, ref, tolerance, scale=None):
    """Asserts `‖out − ref‖ ≤ tolerance·scale`; the scale is `‖ref‖` unless given."""
    out = np.asarray(out, np.float64)
    assert out.shape == ref.shape, f"{name}: shape {out.shape}, expected {ref.shape}"
    assert np.isfinite(out).all(), f"{name}: {np.count_nonzero(~np.isfinite(out))} not finite"
    scale = np.linalg.norm(ref) if scale is None else scale
    error = np.linalg.norm(out - ref)
    assert error <= tolerance * scale, (
        f"{name}: error {error:.3e} exceeds {tolerance:.1e} of the scale {scale:.3e}"
    )


def twice_the_error(dtype: str, low, ref, scale=None) -> float:
    """Returns twice the relative error of `low`, the float64 oracle with rounded operands."""
    # The output of a backend is rounded even where `low` is exact.
    floor = float(ml_dtypes.finfo(dtype).eps)
    scale = np.linalg.norm(ref) if scale is None else scale
    return max(floor, 2 * np.linalg.norm(low - ref) / scale) if scale else floor


class _Conformance:
    """Compares one op of one backend with its oracle over all cases and modes."""

    implementation: str
    modes = MODES
    cases = CASES
    quick: tuple[str, ...] = ()
    inputs: tuple[str, ...]
    cotangent: str
    op = None

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        """Returns the output, the gradients by name, and the scales that are not plain norms."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            runs = ((case, *mode) for mode in self.modes for case in self.cases)
            parametrize(metafunc, ("case", "dtype", "precision"), runs, self.quick)

    @pytest.fixture(scope="class")
    @classmethod
    def compiled(cls):
        """Maps a precision to a jitted function of the op and its VJP."""

        @functools.cache
        def for_precision(precision):
            @jax.jit
            def run(arrays, segment_ids, cotangent):
                op = functools.partial(
                    cls.op,
                    segment_ids=segment_ids,
                    implementation=cls.implementation,
                    precision=precision,
                )
                out, pull_back = jax.vjp(op, *arrays)
                return out, pull_back(cotangent)

            return run

        return for_precision

    def test_forward_and_gradients(self, case: Case, dtype, precision, compiled):
        drawn = case.draw()
        names = (*self.inputs, self.cotangent)
        # The oracle reads the same rounded inputs as the backend.
        exact = {name: rounding(dtype)(drawn[name]) for name in names}
        arguments = [exact[name] for name in self.inputs], exact[self.cotangent]
        ref, gradients, scales = self.oracle(
            *arguments, drawn["segment_ids"], rounding=oracle.identity
        )
        if dtype in FIXED_TOLERANCE:
            budget = dict.fromkeys((*gradients, "out"), FIXED_TOLERANCE[dtype])
        elif precision == "highest":
            budget = dict.fromkeys((*gradients, "out"), float(ml_dtypes.finfo(dtype).eps))
        else:
            # Identical keys have one error, which depends on the scale at which they are rounded.
            factors = (1, _KERNEL_SCALE) if case.keys == "identical" else (1,)
            budget = dict.fromkeys((*gradients, "out"), 0.0)
            for factor in factors:
                low, low_gradients, _ = self.oracle(
                    *arguments, drawn["segment_ids"], rounding=rounding(dtype, factor)
                )
                for name, x in {**low_gradients, "out": low}.items():
                    want = ref if name == "out" else gradients[name]
                    error = twice_the_error(dtype, x, want, scales.get(name))
                    budget[name] = max(budget[name], error)

        with jax.enable_x64(dtype == "float64"):
            arrays = [jnp.asarray(exact[name], dtype) for name in self.inputs]
            cotangent = jnp.asarray(exact[self.cotangent], dtype)
            out, found = compiled(precision)(arrays, drawn["segment_ids"], cotangent)
            assert out.dtype == dtype
            assert_close("out", out, ref, budget["out"])
            for name, gradient in zip(self.inputs, found):
                assert gradient.dtype == dtype
                assert_close(
                    f"gradient of {name}",
                    gradient,
                    gradients[name],
                    budget[name],
                    scales.get(name),
                )


class PreconditionConformance(_Conformance):
    """Tests of `precondition`."""

    from lucid_jax import precondition as op

    inputs = ("k", "v")
    cotangent = "y_bar"

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        k, v, *beta = arrays
        arguments = segment_ids, rounding, *beta
        y = oracle.precondition(k, v, *arguments)
        gradients, scale = oracle.precondition_gradients(k, v, cotangent, *arguments)
        return y, gradients, {"k": scale}


def with_beta(op):
    """Returns `op` with β as its last positional argument."""

    def run(*arrays, **options):
        return op(*arrays[:-1], beta=arrays[-1], **options)

    return run


class BetaConformance(PreconditionConformance):
    """Tests of `precondition` with β of 0, 1e-6, 1e-3, 1 and numbers between."""

    op = with_beta(PreconditionConformance.op)
    cases = BETA_CASES
    inputs = ("k", "v", "beta")


class SoftmaxConformance(_Conformance):
    """Tests of `softmax_attention`."""

    from lucid_jax import softmax_attention as op

    inputs = ("q", "k", "v")
    cotangent = "o_bar"

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        o = oracle.softmax_attention(*arrays, segment_ids, rounding=rounding)
        gradients, sizes = oracle.softmax_attention_gradients(
            *arrays, cotangent, segment_ids, rounding=rounding
        )
        return o, gradients, sizes


def with_transitions(op, count):
    """Returns `op` of `count` arrays, then `w` and `w_beta`."""

    def run(*arrays, **options):
        *arrays, w, beta = arrays
        assert len(arrays) == count
        return op(*arrays, transitions=Transitions(w, beta), **options)

    return staticmethod(run)


class PathPreconditionConformance(_Conformance):
    """Tests of `precondition` with transitions."""

    op = with_transitions(precondition, 2)
    cases = PATH_CASES
    inputs = ("k", "v", "w", "w_beta")
    cotangent = "y_bar"

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        return oracle.path_precondition(*arrays, cotangent, segment_ids, rounding)


class PathSoftmaxConformance(_Conformance):
    """Tests of `softmax_attention` with transitions."""

    op = with_transitions(softmax_attention, 3)
    cases = PATH_CASES
    inputs = ("q", "k", "v", "w", "w_beta")
    cotangent = "o_bar"

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        return oracle.path_attention(*arrays, cotangent, segment_ids, rounding)


class LucidConformance(_Conformance):
    """Tests of `lucid_attention`."""

    from lucid_jax import lucid_attention as op

    inputs = ("q", "k", "v")
    cotangent = "o_bar"

    def oracle(self, arrays, cotangent, segment_ids, rounding):
        q, k, v, *beta = arrays
        y = oracle.precondition(k, v, segment_ids, rounding, *beta)
        o = oracle.softmax_attention(q, k, y, segment_ids, rounding=rounding)
        outer, sizes = oracle.softmax_attention_gradients(
            q, k, y, cotangent, segment_ids, rounding=rounding
        )
        inner, size = oracle.precondition_gradients(
            k, v, rounding(outer["v"]), segment_ids, rounding, *beta
        )
        gradients = {**inner, "q": outer["q"], "k": outer["k"] + inner["k"]}
        return o, gradients, sizes | {"k": sizes["k"] + size}


class LucidBetaConformance(LucidConformance):
    """Tests of `lucid_attention` with β."""

    op = with_beta(LucidConformance.op)
    inputs = ("q", "k", "v", "beta")
