"""Errors in the Python files of a user are one line with the place."""

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.runtime.user_file import call_in_file

_FILES = {
    "syntax": ("x = 1\ndef f(:\n", (), "{path}:2: SyntaxError: invalid syntax"),
    "import": ("import nosuch\n", (), "{path}:1: ModuleNotFoundError: No module named 'nosuch'"),
    "raises": (
        "def f():\n    return undefined\n",
        (),
        "{path}:2: NameError: name 'undefined' is not defined",
    ),
    "raises in a library": (
        "import json\ndef f():\n    return json.loads('{')\n",
        (),
        "{path}:3: JSONDecodeError: Expecting property name",
    ),
    "many lines": (
        "def f():\n    raise ValueError('one\\ntwo')\n",
        (),
        "{path}:2: ValueError: one",
    ),
    "no function": ("f = 1\n", (), "{path}: defines no function f()"),
    "too many": ("def f(): ...\n", ("a",), "{path}: f() was given 'a': too many positional"),
    "too few": ("def f(size): ...\n", (), "{path}: f(size) was given nothing: missing a req"),
    "ConfigError": (
        "from lucid_jax.config import ConfigError\ndef f():\n    raise ConfigError('no')\n",
        (),
        "{path}: no",
    ),
}


@pytest.mark.parametrize(("text", "arguments", "message"), _FILES.values(), ids=_FILES)
def test_an_error_is_one_line(tmp_path, text, arguments, message):
    path = tmp_path / "file.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        call_in_file(path, "f", *arguments)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "none.py", "."])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^no file '{name}'$"):
        call_in_file(name, "f")


def test_returns_the_result_of_the_function(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("y = 1\ndef f(x):\n    return x, y\n")
    assert call_in_file(path, "f", 2) == (2, 1)
