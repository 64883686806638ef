"""The prompt before its completion: in colour on a terminal, or not at all."""

import io

import pytest

from lucid_jax.inference.prompt import echo_of


@pytest.mark.parametrize(
    ("terminal", "echo", "no_color", "expected"),
    [
        (True, None, "", "\x1b[36mprompt\x1b[0m"),
        (True, None, "1", "prompt"),
        (True, False, "", ""),
        (False, None, "", ""),
        (False, True, "", "prompt"),
    ],
)
def test_echo(monkeypatch, terminal, echo, no_color, expected):
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert echo_of("prompt", echo, stream) == expected
