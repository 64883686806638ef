"""Eight CPU devices stand in for a mesh, and XLA compiles fast; set before jax is imported."""

import importlib.metadata
import os

import pytest
from absl import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads that wait for a product of the oracles' spin on the cores that other tests need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most tests compile for longer than they run. What runs on a GPU or TPU is what users run.
    _FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # No library for products, which would prepare itself for each when it first runs.
        "--xla_cpu_experimental_ynn_fusion_type=",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The emitters that came before compile in a third of the time; later versions have
        # the new ones alone, and do not know the flag.
        _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
else:
    # Float32 products of 11 bits, as GPUs and TPUs take them, are no error of what is tested.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()


def pytest_report_header() -> str:
    """On what the tests run: not on the device that is there, unless told."""
    import jax

    return f"jax {jax.__version__} on {jax.device_count()} × {jax.devices()[0].device_kind}"


@pytest.fixture(autouse=True)
def _log_levels():
    """Restores the levels of absl's log after each test."""
    verbosity, level = logging.get_verbosity(), logging.get_absl_logger().level
    yield
    logging.set_verbosity(verbosity)
    logging.get_absl_logger().setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Frees the programs of a file after it, because gigabytes of them slow a worker down."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """For files whose runs, groups or models are programs that an earlier one compiled."""
    import toy

    with toy.cached_compilation(tmp_path_factory.getbasetemp() / "xla"):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The source of forty short documents."""
    import toy

    return toy.write_corpus(tmp_path_factory.mktemp("corpus") / "docs")
