"""How tests are divided among processes, where pytest runs in several (``-n 2``)."""

from __future__ import annotations

from typing import Any

import pytest

pytest_plugins = ["support.descriptors"]  # no test may leak a descriptor


@pytest.hookimpl(optionalhook=True)  # xdist's, and not needed where tests run in one process
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay together, for they share fixtures; so do those with engines, which want all cores each.

    But for the longest file with engines: by itself it is what the other process has time for.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            apart = not file.startswith("tests/engines/") or file == "tests/engines/test_parity.py"
            return file if apart else "engines"

    return ByFile(config, log)
