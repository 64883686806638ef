"""Errors in the Python files of a user are one line with the place."""

import sys

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.runtime.user_file import call_in_file

# The text of a file, and the message behind its path.
_FILES = {
    "syntax": ("x = 1\ndef f(:\n", ":2: SyntaxError: invalid syntax"),
    "import": ("import nosuch\n", ":1: ModuleNotFoundError: No module named 'nosuch'"),
    "raises": ("def f():\n    return x\n", ":2: NameError: name 'x' is not defined"),
    "raises in a library": (
        "import json\ndef f():\n    return json.loads('{')\n",
        ":3: JSONDecodeError: Expecting property name",
    ),
    "many lines": ("def f():\n    raise ValueError('one\\ntwo')\n", ":2: ValueError: one"),
    "no function": ("f = 1\n", ": defines no function f()"),
    "too few": ("def f(size): ...\n", ": f(size) was given nothing: missing a req"),
    "ConfigError": (
        "from lucid_jax.config import ConfigError\ndef f():\n    raise ConfigError('no')\n",
        ": no",
    ),
}


@pytest.mark.parametrize(("text", "message"), _FILES.values(), ids=_FILES)
def test_an_error_is_one_line(tmp_path, text, message):
    path = tmp_path / "file.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        call_in_file(path, "f")
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "none.py", "."])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^no file '{name}'$"):
        call_in_file(name, "f")


def test_a_file_imports_from_its_own_folder(tmp_path):
    (tmp_path / "beside_the_config.py").write_text("SIZE = 3\n")
    path = tmp_path / "file.py"
    path.write_text(
        "import beside_the_config\ndef f():\n"
        "    from beside_the_config import SIZE\n    return beside_the_config.SIZE + SIZE\n"
    )
    before = list(sys.path)
    assert call_in_file(path, "f") == 6
    assert sys.path == before
