"""Numbers, signs and commands on the command line."""

import io
import sys

import pytest

from lucid_jax.runtime import command_line


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (12, 12),
        ("12", 12),
        ("-1", -1),
        ("0x10", 16),
        ("1e3", 1000),
        ("2.0", 2),
        (f"{2**53 + 1}", 2**53 + 1),
    ],
)
def test_integers(text, number):
    parsed = command_line.parse_integer(text)
    assert (parsed, type(parsed)) == (number, int)


@pytest.mark.parametrize("text", ["1.5", "many", "", "inf", "nan", "1e999"])
def test_no_integers(text):
    with pytest.raises(ValueError, match=r"."):
        command_line.parse_integer(text)


def test_a_terminal_without_unicode_gets_other_signs(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(command_line.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(command_line, "enable_compilation_cache", lambda: None)
    command_line.set_up_process()
    print("0–63 × 4 · é", flush=True)
    assert stream.buffer.getvalue() == b"0-63 x 4 | ?\n"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["run.py", "--config=a b.py", "--overwrite"], "python run.py '--config=a b.py'"),
        (["run.py", "--profile", "3:5", "--config=a.py"], "python run.py --config=a.py"),
        (["/site/lucid_jax/shipped/run.py", "--config=a.py"], "lucid-jax-run --config=a.py"),
    ],
)
def test_a_run_resumes_by_the_command_that_began_it(argv, command):
    assert command_line.resume_command(argv) == command
