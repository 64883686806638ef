"""Every backend of `precondition` against the float64 oracle."""

from ops.conformance import PreconditionConformance


class TestReference(PreconditionConformance):
    implementation = "reference"
    modes = (("float64", "highest"), ("bfloat16", "highest"))


class TestXla(PreconditionConformance):
    implementation = "xla"
