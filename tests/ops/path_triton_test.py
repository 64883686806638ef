"""PaTH and LUCID-PaTH by the Triton kernels."""

import jax.numpy as jnp
import pytest
from ops.cases import MANY_DOCUMENTS, PATH_CASES
from ops.conformance import PathPreconditionConformance, PathSoftmaxConformance
from ops.interpreter import ON_GPU

from lucid_jax import Prefix, Transitions, precondition
from lucid_jax.ops.precondition import triton_schedule

# The interpreter is slow, so that here no case repeats what another shows about the kernels.
MODES = (("float32", "highest"), ("bfloat16", None))
CASES = tuple(
    case
    for case in PATH_CASES
    if case.name.removeprefix("path_") in ("two_rows", "length_257_odd_width", "alike", "packed")
)
if ON_GPU:
    MODES += (("bfloat16", "highest"), ("float16", None))
    CASES = PATH_CASES
CASES += (MANY_DOCUMENTS,)


@pytest.mark.usefixtures("triton_interpreter")
class TestPrecondition(PathPreconditionConformance):
    implementation = "triton"
    modes, cases = MODES, CASES
    quick = ("many-bfloat16-None",)


@pytest.mark.usefixtures("triton_interpreter")
class TestSoftmax(PathSoftmaxConformance):
    implementation = "triton"
    modes, cases = MODES, CASES
    quick = ("many-bfloat16-None",)


@pytest.fixture
def much_work(monkeypatch):
    monkeypatch.setattr(triton_schedule, "_MUCH_ROWS", 0)


@pytest.mark.usefixtures("triton_interpreter", "much_work")
class TestPreconditionMuchWork(PathPreconditionConformance):
    """The schedules of calls that are too large for the oracle."""

    implementation = "triton"
    modes = (("bfloat16", None),)
    cases = CASES if ON_GPU else (MANY_DOCUMENTS,)


@pytest.mark.usefixtures("triton_interpreter")
def test_a_prefix_is_refused():
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    transitions = Transitions(x, x[..., 0])
    prefix = Prefix(x, x, transitions=transitions)
    with pytest.raises(ValueError, match="it takes no transitions with a prefix"):
        precondition(x, x, prefix=prefix, transitions=transitions, implementation="triton")
