"""The versions of an engine that wooly supports, read from the extras of its own distribution."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re

_DISTRIBUTION = "wooly"


@dataclasses.dataclass(frozen=True)
class Range:
    """Versions of a distribution from ``first`` up to, and without, ``end``, compared as numbers."""

    distribution: str
    first: str
    end: str

    def has(self, version: str) -> bool:
        """True for a version in the range. False for pre-releases of ``end``, and for a text without a number."""
        return _numbers(self.first) <= _numbers(version) < _numbers(self.end)

    def follows(self, version: str) -> bool:
        """True for a version before the range."""
        return _numbers(version) < _numbers(self.first)

    def __str__(self) -> str:
        """Return the requirement as pip reads it."""
        return f"{self.distribution}>={self.first},<{self.end}"


def range_of(distribution: str) -> Range | None:
    """Return the supported versions; None if wooly runs from a source tree that is not installed."""
    try:
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in required:
        asked, _, condition = requirement.replace(" ", "").partition(";")
        if "extra==" in condition and re.match(r"[A-Za-z0-9._-]+", asked)[0] == distribution:  # type: ignore[index]  # all have a name
            bounds = dict(re.findall(r"(>=|<)([0-9.]+)", asked))
            return Range(distribution, bounds[">="], bounds["<"])
    return None


def named(distribution: str) -> str:
    """Return the supported versions in words, for an error's advice."""
    found = range_of(distribution)
    return f"a {distribution} that wooly's pyproject.toml names" if found is None else f"'{found}'"


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
