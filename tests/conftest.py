"""The division of tests among pytest's processes (``-n 2``)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

pytest_plugins = ["support.descriptors"]  # no test may leak a descriptor
settings.register_profile("wooly", deadline=None, print_blob=True)  # busy machines are slow now and then
settings.load_profile("wooly")

LONGEST = (
    "tests/engines/test_parity.py",
    "tests/engines/test_parity_matrix.py",
    "tests/engines/test_parallel.py",
    "tests/hf/test_architectures.py",
    "tests/hf/test_lora.py",
    "tests/hf/test_stock_ways.py",
    "tests/engines/test_prefill_decode.py",
    "tests/engines/test_lora.py",
    "tests/hf/test_activation.py",
    "tests/catalog/test_faults.py",
    "tests/client/test_identify.py",
    "tests/sleep",
    "tests/engines",
    "tests/hf",
)
"""The longest files and folders, in the order in which they start: short ones balance the processes at the end."""


def _place(nodeid: str) -> int:
    return next((place for place, name in enumerate(LONGEST) if nodeid.startswith(name)), len(LONGEST))


@pytest.hookimpl(optionalhook=True)  # xdist's, and not needed where tests run in one process
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide tests by file, since a file's tests share fixtures; the longest files first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # it would put files with many tests first, however short those are
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first where several processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.nodeid))
