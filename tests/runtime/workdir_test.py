"""Work directories: where one can be, and its saved configuration."""

import pathlib

import pytest

from lucid_jax.config import Config, ConfigError
from lucid_jax.runtime.workdir import local_directory, new_directory, read_config, save_config


def test_a_directory_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for path in (tmp_path, tmp_path / "a" / "b", "a/b", "."):
        assert local_directory(path) == pathlib.Path(path)
    assert local_directory("~/run") == pathlib.Path("/home/me/run")


@pytest.mark.parametrize("below", ["", "/run", "/a/b"])
def test_no_directory_can_be_at_a_file(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"at '.*file{below}': {tmp_path}/file is a file$"):
        local_directory(f"{tmp_path}/file{below}")


def test_a_new_directory_appears_once_it_is_complete(tmp_path):
    with new_directory(tmp_path / "a" / "b") as directory:
        (directory / "file").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").exists()
    with pytest.raises(ConfigError, match="a/b already exists"), new_directory(tmp_path / "a/b"):
        pass
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a" / "c"):
        1 / 0  # noqa: B018
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_saved_configuration_is_read_back(tmp_path):
    assert read_config(tmp_path / "run") is None
    save_config(tmp_path / "run", config := Config(seed=3))
    assert read_config(tmp_path / "run") == config
