"""Imports point one way, down; kernels know jax alone; nobody imports a root."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Each package of the project, lowest first, and the packages that it may import, itself aside.
ALLOWED = {
    "pallas_kernels": "",
    "lucid_jax": "ops",
    "flax": "ops",
    "shipped": "",
    "config": "",
    "ops": "pallas_kernels",
    "runtime": "config",
    "parallel": "config ops",
    "models": "config ops parallel",
    "data": "config parallel runtime",
    "checkpoint": "config parallel models runtime",
    "convert": "config ops parallel models data checkpoint runtime configs",
    "inference": "config ops parallel models data checkpoint runtime",
    "evaluate": "config ops parallel models data checkpoint runtime inference",
    "training": "config ops parallel models data checkpoint runtime inference evaluate",
    "configs": "config",
    "run": "config ops parallel models data checkpoint runtime inference evaluate training",
}
PROJECT = ("lucid_jax", "pallas_kernels", "configs", "experiments", "tests", "run")


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module: str) -> str:
    """`lucid_jax.ops.rope` is of `ops`; `configs.tiny` of `configs`."""
    first, *rest = module.split(".")
    return rest[0] if first == "lucid_jax" and rest else first


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
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in files if not p.is_symlink()]


@pytest.mark.parametrize("path", [*sources(), ROOT / "run.py"], ids=module_name)
def test_imports_only_what_is_below(path):
    own = package(module_name(path))
    for name in imported(path):
        assert package(name) in (own, *ALLOWED[own].split()), f"{own} imports {name}"


def test_the_op_loads_nothing_of_training():
    """Someone who wants the op alone needs jax, and no data or checkpoint library."""
    heavy = ("flax", "optax", "orbax", "grain", "ml_collections", "matplotlib", "tensorboardX")
    code = f"import sys, lucid_jax\nprint([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]"
