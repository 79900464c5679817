"""What travels in a wheel, and that an installation away from the checkout works."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_room_is_packaged():
    inits = (REPOSITORY / "mm_prm").rglob("__init__.py")
    rooms = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in inits}
    assert rooms | {"mm_prm.recipes", "mm_prm.hub_cards"} == set(PYPROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel holds, made from a copy of the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("mm_prm", "recipes", "hub_cards"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    run = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(source / run.stdout.split()[-1]) as wheel:
        wheel.extractall(target)
    return target


def test_the_wheel_holds_models_recipes_and_cards(installed):
    for package, folder in (("recipes", REPOSITORY / "recipes"), ("hub_cards", REPOSITORY / "hub_cards")):
        expected = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        found = {
            path.relative_to(installed / "mm_prm" / package) for path in (installed / "mm_prm" / package).rglob("*")
        }
        assert expected <= found
    for file in ("mini_policy/model.safetensors", "mini_policy/chat_template.jinja"):
        assert (installed / "mm_prm" / "embedded" / file).is_file()
    assert (installed / "mm_prm" / "report" / "report.html.jinja").is_file()
    assert (installed / "mm_prm" / "py.typed").is_file()
    assert not list(installed.rglob("*.pyc"))


def test_it_runs_away_from_the_checkout(installed, tmp_path):
    program = """
import sys
from importlib.resources import files
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mm_prm
from mm_prm.cli import main
from mm_prm.embedded import model_path
assert Path(mm_prm.__file__).is_relative_to(sys.argv[1]), mm_prm.__file__
assert Path(model_path("mini-policy"), "config.json").is_file()
assert (files("mm_prm.recipes") / "mini" / "train.yaml").is_file()
assert files("mm_prm.hub_cards").is_dir()
main(["--version"])
"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", program, str(installed)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, f"mm-prm {PYPROJECT['project']['version']}\n"), run.stderr
