"""The reference and XLA backends of `precondition` agree with the float64 oracle."""

import pytest
from ops.cases import WIDE_CASES
from ops.conformance import PreconditionConformance


class TestReference(PreconditionConformance):
    implementation = "reference"
    modes = (("float64", "highest"), ("bfloat16", "highest"))
    quick = ("packed-float64-highest",)


class TestXla(PreconditionConformance):
    implementation = "xla"
    quick = ("packed-float64-highest", "huge_key-float32-highest", "cosine_0.99-bfloat16-None")


@pytest.mark.usefixtures("wide_panels")
class TestXlaWide(PreconditionConformance):
    implementation = "xla"
    modes = (("float64", "highest"),)
    cases = WIDE_CASES
    quick = ("length_1100_panels-float64-highest",)
