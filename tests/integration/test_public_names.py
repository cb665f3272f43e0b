"""The public names of the plugins are those of ``__all__``, each in a process of its own: importing one has effects."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = {"wooly_vllm": ["register"], "wooly_hf": ["Stats", "stats", "unshare"]}
NEEDS = {"wooly_vllm": "torch", "wooly_hf": "transformers"}

_SHOW = """
import importlib, json, sys
package = importlib.import_module(sys.argv[1])
missing = [name for name in package.__all__ if not hasattr(package, name)]
documented = [bool(getattr(package, name).__doc__) for name in package.__all__]
print(json.dumps([sorted(package.__all__), missing, documented]))
"""


@pytest.mark.parametrize("plugin", NAMES)
def test_a_plugin_exports_its_public_names(plugin: str) -> None:
    """All of them exist and have a docstring; a name that is added or removed is a change of the public interface."""
    if importlib.util.find_spec(NEEDS[plugin]) is None:
        pytest.skip(f"needs {NEEDS[plugin]}")
    run = subprocess.run([sys.executable, "-c", _SHOW, plugin], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names, missing, documented = json.loads(run.stdout.splitlines()[-1])
    assert names == NAMES[plugin]
    assert missing == []
    assert all(documented)


@pytest.mark.parametrize("package", ["shared_store", "wooly_vllm", "wooly_hf"])
def test_a_package_declares_that_it_is_typed(package: str) -> None:
    """Type checkers of other projects read its annotations (PEP 561)."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()
