"""The steps that the profiler records."""

import re

import jax
import pytest

from lucid_jax.config import ConfigError
from lucid_jax.training.profiler import StepProfiler, parse_steps


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "5:5", "6:5", "-1:5"])
def test_malformed_steps_to_profile(text):
    with pytest.raises(ConfigError, match=re.escape(f"FIRST < LAST; got {text!r}")):
        parse_steps(text)


@pytest.mark.parametrize(
    ("text", "expected", "recorded"),
    [
        (None, [], ""),
        ("2:4", [], "none of these 2"),  # Past, as the run resumes at step 7.
        ("5:9", ["start", "stop after 9"], "2 of these 4"),
        ("8:10", ["start", "stop after 10"], ""),
        ("18:100", ["start", "stop after 20"], "2 of these 82"),
        ("20:21", [], "none of these 1"),
    ],
)
def test_profiled_steps_outside_the_run_are_a_warning(
    tmp_path, monkeypatch, caplog, text, expected, recorded
):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(f"stop after {step}"))
    profiler = StepProfiler(tmp_path, parse_steps(text))
    profiler.check(range(7, 20))
    if recorded:
        assert f"the run makes steps 7 to 20, so {recorded} steps can be recorded" in caplog.text
    else:
        assert caplog.text == ""
    for step in range(7, 20):
        profiler.before_step(step)
        step += 1
        profiler.after_step(step, None, last=step == 20)
    assert calls == expected
