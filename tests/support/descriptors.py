"""Finds descriptors that a test leaks: in the test process, and in the store and keeper that it used.

`pytest_plugins` of `tests/conftest.py` registers the module, so every test is checked.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest

PATIENCE_S = 10.0  # threads and other processes close descriptors a moment after the test has seen their result
_POLL_S = 0.01
_STEADY_S = 0.1


def descriptors(pid="self"):
    """The open files of a process by descriptor: paths, or kinds with inode numbers (`socket:[123]`)."""
    directory = Path(f"/proc/{pid}/fd")
    found = {}
    for name in os.listdir(directory):  # noqa: PTH208 - closed before its entries are read: it is not listed itself
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed, such as that of the listing
            found[int(name)] = os.readlink(directory / name)  # noqa: PTH115 - the text, which is not always a path
    return found


def kinds(pid):
    """How many descriptors of each kind a process has: numbers differ from time to time, kinds do not."""
    return Counter(re.sub(r"\d+", "N", target) for target in descriptors(pid).values())


# In the test process.


class _Lasting:
    """Descriptors that fixtures of a module or the session opened during the current test: they may stay open."""

    def __init__(self):
        self.opened = {}


_lasting = pytest.StashKey[_Lasting]()
_failed = pytest.StashKey[bool]()


@contextlib.contextmanager
def lasting(config):
    """Exempt descriptors that the block opens from the check of the current test: they are closed later."""
    before = descriptors()
    try:
        yield
    finally:
        found = config.stash.setdefault(_lasting, _Lasting())
        found.opened |= dict(descriptors().items() - before.items())


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope == "function":
        return (yield)
    with lasting(request.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.excinfo is not None:
        item.stash[_failed] = True
    return (yield)


@pytest.fixture(autouse=True)
def _no_leaked_descriptors(request):
    """Fail a test that ends with descriptors that were not open when it began.

    Of the fixtures for one test this is set up first, so it ends last: after they closed theirs.
    """
    exempt = request.config.stash.setdefault(_lasting, _Lasting())
    exempt.opened = {}
    before = descriptors()
    yield
    if request.node.stash.get(_failed, False):
        return  # the traceback has references to whatever the test had open
    if request.node.get_closest_marker("gpu"):
        return  # the driver opens descriptors when it first needs them, and keeps them

    def leaked():
        return dict(descriptors().items() - before.items() - exempt.opened.items())

    if leaked():
        request.node.funcargs.clear()  # pytest drops the values of fixtures only after the last of them has ended
        gc.collect()  # cycles own descriptors until then
    deadline = time.monotonic() + PATIENCE_S
    while found := leaked():
        if time.monotonic() > deadline:
            pytest.fail(f"descriptors were leaked: {found}", pytrace=False)
        time.sleep(_POLL_S)


# In other processes.


def steady(pid):
    """The descriptors of a process by kind, once they do not change any more."""
    deadline = time.monotonic() + PATIENCE_S
    found, since = kinds(pid), time.monotonic()
    while time.monotonic() - since < _STEADY_S:
        assert time.monotonic() < deadline, f"process {pid} opens and closes descriptors without pause"
        time.sleep(_POLL_S)
        if (now := kinds(pid)) != found:
            found, since = now, time.monotonic()
    return found


@contextlib.contextmanager
def no_leak_in(*pids):
    """Fail if processes have other descriptors after the block than before it.

    The block connects clients and closes them. Models that it publishes must be gone when it ends.
    """
    before = {pid: steady(pid) for pid in pids}
    yield
    deadline = time.monotonic() + PATIENCE_S
    while different := {pid: found for pid in pids if (found := _difference(steady(pid), before[pid]))}:
        assert time.monotonic() < deadline, f"processes have other descriptors than before: {different}"


def _difference(now, before):
    return {kind: now[kind] - before[kind] for kind in now | before if now[kind] != before[kind]}
