"""Fixtures of the tests with real engines on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.engine_fixtures import checkpoint, engine, module_runtime_dir, runtime_dir
from support.engines import CPU_SETTINGS, PRELOADED

__all__ = ["checkpoint", "engine", "module_runtime_dir", "runtime_dir"]


@pytest.fixture(scope="session", autouse=True)
def preloaded() -> None:
    """Start importing vLLM before the first test."""
    PRELOADED.begin()


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """Run every engine, server and script of a test with one compute thread, not bound to a processor.

    Threads synchronise after each operation. With more threads than processors, most of the time goes into waiting for
    a thread that is not scheduled.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_SETTINGS.items():
            patch.setenv(name, value)
        yield
