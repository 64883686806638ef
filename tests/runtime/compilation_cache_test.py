"""Compiled programs are kept in the user's cache folder, unless JAX is told otherwise."""

import jax
import pytest

from lucid_jax.runtime import compilation_cache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without settings; what the test sets is undone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def enabled() -> str | None:
    compilation_cache.enable_compilation_cache()
    return jax.config.jax_compilation_cache_dir


def test_the_default_is_in_the_users_cache_folder(home, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_CPU_INFO", home / "cpuinfo")
    (home / "cpuinfo").write_text("flags\t: sse avx\n")
    first = enabled()
    assert first.startswith(f"{home}/.cache/lucid_jax/xla-")
    assert enabled() == first
    jax.config.update("jax_compilation_cache_dir", None)
    (home / "cpuinfo").write_text("flags\t: sse\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "other"))
    second = enabled()
    assert second.startswith(f"{home}/other/lucid_jax/xla-")
    assert second.rpartition("-")[2] != first.rpartition("-")[2]


@pytest.mark.parametrize("place", ["/elsewhere", ""])
def test_a_place_that_the_user_chose_is_kept(home, monkeypatch, place):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    assert enabled() is None
    assert not (home / ".cache").exists()


def test_a_home_that_is_no_folder_is_not_an_error(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    assert enabled() is None
