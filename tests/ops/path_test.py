"""PaTH and LUCID-PaTH: every backend agrees with the float64 oracle; the bound; properties."""

import pytest
from ops.conformance import PathPreconditionConformance, PathSoftmaxConformance

MODES = (("float64", "highest"), ("float32", "highest"), ("bfloat16", None))


class TestPreconditionReference(PathPreconditionConformance):
    implementation = "reference"
    modes = MODES[:1]
    quick = ("path_packed-float64-highest",)


class TestPreconditionXla(PathPreconditionConformance):
    implementation = "xla"
    modes = MODES
    quick = ("path_packed-float64-highest", "path_alike-bfloat16-None")


class TestSoftmaxReference(PathSoftmaxConformance):
    implementation = "reference"
    modes = MODES[:1]
    quick = ("path_packed-float64-highest",)


class TestSoftmaxXla(PathSoftmaxConformance):
    implementation = "xla"
    modes = MODES
    quick = ("path_packed-float64-highest", "path_alike-bfloat16-None")
