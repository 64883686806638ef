"""The persistent compilation cache of JAX, in the user's cache folder."""

import hashlib
import os
import pathlib
import platform

import jax

from lucid_jax.runtime.workdir import user_cache

_CPU_INFO = pathlib.Path("/proc/cpuinfo")


def enable_compilation_cache() -> None:
    """Keeps programs that took a second to compile, unless JAX is told of a place, or of none.

    `JAX_COMPILATION_CACHE_DIR` names another place; empty, it keeps nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = user_cache() / f"xla-{_describe_cpu()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # Without a home, compiling takes longer.
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _describe_cpu() -> str:
    """Returns what tells CPUs apart: hosts may share a home, and JAX's key has no instructions."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    digest = hashlib.sha256("".join(features).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
