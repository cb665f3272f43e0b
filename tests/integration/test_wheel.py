"""`make test` tests the built wheel, as installed, and not the source tree in which pytest runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("shared_store", "wooly_hf", "wooly_vllm")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def wheel():
    path = os.environ.get("WOOLY_TESTED_WHEEL")
    if path is None:
        pytest.skip("WOOLY_TESTED_WHEEL is not set; `make test` builds a wheel and sets it")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_imported_from_site_packages(package):
    """In this process, and in a child that is started in the source tree."""
    expected = Path(sysconfig.get_path("purelib")) / package / "__init__.py"
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert Path(spec.origin) == expected
    program = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(child.stdout.strip()) == expected


def test_installed_files_are_the_wheels(wheel):
    """Byte for byte: otherwise tests could pass on outdated code."""
    site_packages = Path(sysconfig.get_path("purelib"))
    modules = [name for name in wheel.namelist() if name.split("/")[0] in PACKAGES]
    assert modules
    differing = [name for name in modules if (site_packages / name).read_bytes() != wheel.read(name)]
    assert differing == []


def test_wheel_has_every_source_file_and_nothing_else(wheel):
    """The wheel contains all files of the packages' folders, the licence, and no tests."""
    sources = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
