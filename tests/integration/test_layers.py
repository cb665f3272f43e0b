"""Tests and their support do not depend on the benchmarks; the benchmarks depend on ``tests/support``."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _importers(folder, package):
    files = sorted(folder.rglob("*.py"))
    return [str(file) for file in files if any(name.split(".")[0] == package for name in _imported(file))]


def test_tests_import_nothing_from_benchmarks():
    assert _importers(TESTS, "benchmarks") == []


def test_import_of_benchmarks_would_be_found():
    """The same search finds the benchmarks' imports of ``support``."""
    assert _importers(TESTS.parent / "benchmarks", "support")
