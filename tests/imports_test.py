"""Imports point one way, down; kernels know jax alone; nobody imports a root."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Each package or module of lucid_jax and what of the project it may import, itself aside.
OPS = ("lucid_jax.ops",)
MODEL = (
    "lucid_jax.config", "lucid_jax.ops", "lucid_jax.parallel.mesh", "lucid_jax.parallel.context_attention",
    "lucid_jax.models.attention",
)  # fmt: skip
ALLOWED = {
    "lucid_jax.config": (),
    "lucid_jax.runtime.user_file": ("lucid_jax.config",),
    "lucid_jax.runtime.workdir": ("lucid_jax.config",),
    "lucid_jax.runtime.environment": (),
    "lucid_jax.ops": ("pallas_kernels",),
    "lucid_jax.ops.attention": ("pallas_kernels", *OPS),
    "lucid_jax.parallel.stripes": (),
    "lucid_jax.parallel.context_shard": ("lucid_jax.parallel.stripes", *OPS),
    "lucid_jax.parallel.context_solve": ("lucid_jax.parallel.context_shard", *OPS),
    "lucid_jax.parallel.context_softmax": ("lucid_jax.parallel.context_shard", *OPS),
    "lucid_jax.parallel.context_attention": (
        "lucid_jax.parallel.context_shard", "lucid_jax.parallel.context_solve", "lucid_jax.parallel.context_softmax", *OPS,
    ),
    "lucid_jax.parallel.mesh": ("lucid_jax.config", "lucid_jax.parallel.stripes"),
    "lucid_jax.models.attention": MODEL,
    "lucid_jax.models.transformer": MODEL,
    "lucid_jax.inference.kv_cache": MODEL,
    "lucid_jax.inference.decoder": (*MODEL, "lucid_jax.models.transformer", "lucid_jax.inference.kv_cache"),
    "lucid_jax.inference.sampling": ("lucid_jax.config",),
    "lucid_jax.inference.generator": (
        *MODEL, "lucid_jax.models.transformer", "lucid_jax.inference.kv_cache", "lucid_jax.inference.decoder", "lucid_jax.inference.sampling",
    ),
    "lucid_jax.models.loss": (*MODEL, "lucid_jax.models.transformer"),
    "lucid_jax.training.optimizer": ("lucid_jax.config",),
    "lucid_jax.runtime.preemption": (),
    "lucid_jax.runtime.distributed": ("lucid_jax.config",),
    "lucid_jax.checkpoint.manager": (
        "lucid_jax.config", "lucid_jax.checkpoint.record", "lucid_jax.checkpoint.checksum",
        "lucid_jax.checkpoint.retention",
    ),
    "lucid_jax.checkpoint.retention": (),
    "lucid_jax.checkpoint.checksum": (),
    "lucid_jax.checkpoint.record": (),
    "lucid_jax.convert": (
        *MODEL, "lucid_jax.models.transformer", "lucid_jax.checkpoint.manager", "lucid_jax.data.tokenizer",
        "lucid_jax.runtime.workdir",
    ),
    "lucid_jax.data": ("lucid_jax.config", "lucid_jax.parallel.stripes", "lucid_jax.runtime.workdir"),
    "lucid_jax.training.step": (*MODEL, "lucid_jax.models.transformer", "lucid_jax.models.loss", "lucid_jax.training.optimizer"),
    "lucid_jax.checkpoint.restore": (
        *MODEL, "lucid_jax.models.transformer", "lucid_jax.checkpoint.manager", "lucid_jax.runtime.workdir",
    ),
    "lucid_jax.inference.complete": (
        *MODEL, "lucid_jax.data", "lucid_jax.inference.generator", "lucid_jax.checkpoint.restore", "lucid_jax.inference.sampling",
    ),
    "lucid_jax.evaluate": (
        *MODEL, "lucid_jax.models.transformer", "lucid_jax.models.loss", "lucid_jax.checkpoint.manager",
        "lucid_jax.checkpoint.checksum", "lucid_jax.data", "lucid_jax.inference.generator",
        "lucid_jax.runtime.preemption", "lucid_jax.checkpoint.restore", "lucid_jax.runtime.workdir", "lucid_jax.runtime.environment",
    ),
    "lucid_jax.evaluate.scores": (),
    "lucid_jax.evaluate.tasks": (
        "lucid_jax.config", "lucid_jax.data", "lucid_jax.evaluate.scores",
    ),
    "lucid_jax.metrics": ("lucid_jax.config", "lucid_jax.parallel.mesh", "lucid_jax.evaluate"),
    "lucid_jax.training.hlo": (),
    "lucid_jax.training.compile": (
        *MODEL, "lucid_jax.models.transformer", "lucid_jax.training.step", "lucid_jax.training.hlo",
        "lucid_jax.data.packing", "lucid_jax.training.flops",
    ),
    "lucid_jax.training.loop": ("lucid_jax",),
    "lucid_jax.training.sweep": ("lucid_jax",),
    "pallas_kernels": (),
    "configs": ("configs", "lucid_jax.config"),
    "run": ("lucid_jax",),
}  # fmt: skip
PROJECT = ("lucid_jax", "pallas_kernels", "configs", "experiments", "tests", "run")


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported(path: pathlib.Path) -> set[str]:
    """Project modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` names a module; `from module import f` does not.
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            exists = {n for n in submodules if find(n)}
            names |= exists or {str(node.module)}
    return {name for name in names if name.split(".")[0] in PROJECT}


def find(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def sources() -> list[pathlib.Path]:
    folders = ("lucid_jax", "pallas_kernels", "configs")
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [*sources(), ROOT / "run.py"], ids=module_name)
def test_imports_only_what_is_below(path):
    module = module_name(path)
    if module == "lucid_jax":
        allowed: tuple[str, ...] = OPS
    else:
        # The most specific rule decides.
        owner = max((name for name in ALLOWED if inside(module, name)), key=len, default=None)
        assert owner, f"{module} has no rule: add one to ALLOWED"
        allowed = (*ALLOWED[owner], owner)
    for name in imported(path):
        assert any(inside(name, package) for package in allowed), f"{module} imports {name}"


def test_the_op_loads_nothing_of_training():
    """Someone who wants the op alone needs jax, and no data or checkpoint library."""
    heavy = ("flax", "optax", "orbax", "grain", "ml_collections", "matplotlib", "tensorboardX")
    code = f"import sys, lucid_jax\nprint([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]"
