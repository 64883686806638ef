"""The reference and XLA backends of `precondition` agree with the float64 oracle."""

import pytest
from ops.cases import WIDE_CASES
from ops.conformance import PreconditionConformance


class TestReference(PreconditionConformance):
    implementation = "reference"
    modes = (("float64", "highest"), ("bfloat16", "highest"))


class TestXla(PreconditionConformance):
    implementation = "xla"


@pytest.mark.usefixtures("wide_panels")
class TestXlaWide(PreconditionConformance):
    implementation = "xla"
    modes = (("float64", "highest"),)
    cases = WIDE_CASES
