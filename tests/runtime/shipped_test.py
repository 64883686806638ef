"""An installed package has run.py and the configurations, beside a user's own `configs`."""

import importlib.util
import runpy
import sys

import pytest
import toy

from lucid_jax.runtime import console
from lucid_jax.runtime.command_line import load_config

OWN = "def get_config():\n    from configs import helper, common\n    return common.base()\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a package of a user's own that is named `configs`, as the working directory."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "helper.py").touch()
    (tmp_path / "configs" / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(x for x in sys.path if x != str(toy.ROOT))])
    before = dict(sys.modules)
    for name in [name for name in before if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    yield tmp_path
    sys.modules.clear()
    sys.modules.update(before)


def test_a_users_configuration_imports_its_own_modules_and_the_shipped_ones(elsewhere):
    assert load_config("configs/own.py").steps == 100_000


def test_a_shipped_configuration_is_found_and_imports_shipped_ones(elsewhere):
    (elsewhere / "configs" / "__init__.py").touch()
    (elsewhere / "configs" / "lucid_1b.py").touch()
    own = importlib.import_module("configs.lucid_1b")
    assert own.__file__ == str(elsewhere / "configs" / "lucid_1b.py")
    assert load_config("configs/softmax_1b.py:smoke").model.attention == "softmax"


def test_the_links_lead_to_the_sources():
    shipped = toy.ROOT / "lucid_jax" / "shipped"
    for name in ("run.py", "configs"):
        assert (shipped / name).resolve() == toy.ROOT / name


def test_commands_run_the_programs_or_name_the_extra_that_they_lack(monkeypatch):
    def run_module(module, **options):
        assert importlib.util.find_spec(module)
        raise ModuleNotFoundError("No module named 'absl'", name="absl")

    monkeypatch.setattr(runpy, "run_module", run_module)
    for command in (console.run, console.convert):
        with pytest.raises(SystemExit, match=r"No module named 'absl'; pip install 'lucid-jax\["):
            command()
