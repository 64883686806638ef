"""Work directories: where one can be, and its saved configuration."""

import errno
import pathlib

import pytest

from lucid_jax.config import Config, ConfigError
from lucid_jax.runtime.workdir import (
    describe_disk_error,
    local_directory,
    new_directory,
    read_config,
    remove_run,
    save_config,
)


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


@pytest.mark.parametrize("content", [b'{"seed": 3', b"\xff\xfe{}", b""])
def test_a_damaged_configuration_is_set_aside(tmp_path, caplog, content):
    (tmp_path / "config.json").write_bytes(content)
    assert read_config(tmp_path) is None
    assert f"{tmp_path}/config.json is not JSON: it is now config.json.damaged" in caplog.text
    assert (tmp_path / "config.json.damaged").read_bytes() == content
    assert not (tmp_path / "config.json").exists()


def test_a_full_disk_is_found_under_other_errors():
    full = OSError(errno.ENOSPC, "No space left on device")
    library = ValueError(f"RESOURCE_EXHAUSTED: Error writing: {full.strerror} [code='28']")
    outer, during = RuntimeError("a save failed"), RuntimeError("closing")
    outer.__cause__, during.__context__ = library, outer
    for error in (full, library, outer, during):
        assert describe_disk_error(error).startswith("No space left on device; ")
    assert describe_disk_error(OSError(errno.ENOENT, "No such file")) is None


def test_a_run_is_removed_with_nothing_else(tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoints/4/state", "tensorboard/events", "tasks/samples.jsonl", "mine.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    save_config(run, Config())
    for source in (run, run / "checkpoints", f"{run}/checkpoints/../checkpoints/4"):
        with pytest.raises(ConfigError, match=r"would remove checkpoint\.init_from='"):
            remove_run(run, str(source))
    assert (run / "checkpoints" / "4").exists()
    remove_run(run, str(tmp_path / "other"))
    assert sorted(path.name for path in run.iterdir()) == ["mine.txt", "tasks"]
