"""How tests are divided among processes, where pytest runs in several (``-n 2 --dist loadgroup``)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, for they share fixtures; so do all with engines, which want all cores each."""
    for item in items:
        group = "engines" if item.get_closest_marker("vllm") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
