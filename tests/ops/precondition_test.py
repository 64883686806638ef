"""The reference and XLA backends of `precondition` agree with the float64 oracle."""

import pytest
from ops.cases import WIDE_CASES, Case
from ops.conformance import BetaConformance, LucidBetaConformance, PreconditionConformance


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


class TestReferenceBeta(BetaConformance):
    implementation = "reference"
    modes = (("float64", "highest"),)
    quick = ("zero_keys-float64-highest",)


class TestXlaBeta(BetaConformance):
    implementation = "xla"
    quick = ("packed-float64-highest", "identical_keys-float16-None")


class TestLucidXlaBeta(LucidBetaConformance):
    implementation = "xla"
    modes = (("float32", "highest"),)
    cases = (Case("gqa", length=200, heads=4, kv_heads=2),)
    quick = ("gqa-float32-highest",)
