"""One run at a time owns a work directory."""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile

import pytest

from lucid_jax.config import ConfigError
from lucid_jax.runtime.lock import locked


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    directory = tmp_path / "a" / "run"
    me = f"process {os.getpid()} on {socket.gethostname()} since 20"
    for _ in range(2):  # The second time over the file that the first left.
        with locked(directory):
            for _ in range(2):  # A refusal does not release the lock.
                with pytest.raises(ConfigError, match=f"^{directory} is in use by {me}.*--workdir"):
                    locked(directory).__enter__()
            with locked(tmp_path / "another"):
                pass
    with pytest.raises(ZeroDivisionError), locked(directory):
        1 / 0  # noqa: B018
    with locked(directory):
        (directory / ".lock").write_text('{"host"')
        with pytest.raises(ConfigError, match="in use by another process: stop that run"):
            locked(directory).__enter__()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path), locked(tmp_path):
        assert f"{tmp_path} is not locked" in caplog.text


def test_a_lock_that_another_user_made_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=f"^cannot write to the work directory {tmp_path}: "):
        locked(tmp_path).__enter__()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    def fail(**arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    message = f"^cannot write to the work directory {tmp_path}: {os.strerror(number)}$"
    with pytest.raises(ConfigError, match=message), contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path))
