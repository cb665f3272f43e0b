"""The facades: what importing a package costs, how vLLM finds the plugin, and what the wheel ships."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import shared_store

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared_store", "wooly_hf", "wooly_vllm")


def _public(program: str) -> list[str]:
    """What a fresh process prints, one word a line."""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return child.stdout.split()


def test_the_store_exports_its_version_and_imports_nothing():
    """A process that only wants the version pays for no other module of wooly, and for none of the heavy ones."""
    public = {name: value for name, value in vars(shared_store).items() if not name.startswith("__")}
    names = [name for name, value in public.items() if not inspect.ismodule(value)]  # modules that others imported
    assert names == []
    assert isinstance(shared_store.__version__, str)
    program = (
        "import sys; before = set(sys.modules); import shared_store\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    assert _public(program) == ["shared_store"]


def test_the_plugin_of_vllm_exports_register_and_imports_no_engine():
    """Register is found through its entry point; importing the package imports neither vLLM nor torch."""
    program = (
        "import sys, wooly_vllm, types\n"
        "names = [n for n, v in vars(wooly_vllm).items() if n[0] != '_' and isinstance(v, types.FunctionType)]\n"
        "print(*names, *({'vllm', 'torch'} & set(sys.modules)), sep='\\n')"
    )
    assert _public(program) == ["register"]
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "wooly"]
    assert [point.value for point in found] == ["wooly_vllm:register"]
    import wooly_vllm

    assert list(inspect.signature(wooly_vllm.register).parameters) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_ships_types(package):
    """Beside the source tree, which `test_public_names.py` checks."""
    if not (wheel := os.environ.get("WOOLY_TESTED_WHEEL")):
        pytest.skip("WOOLY_TESTED_WHEEL names no wheel; `make test` builds one and sets it")
    with zipfile.ZipFile(wheel) as archive:
        assert f"{package}/py.typed" in archive.namelist()


def test_the_wheel_has_the_three_packages_and_no_other():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert tuple(build["packages"]) == PACKAGES
