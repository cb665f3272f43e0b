"""Calls that wait until a module was imported."""

from __future__ import annotations

import sys

import pytest

from shared_store.runtime.import_hooks import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write modules that can be imported; the import system must be unchanged at the end."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert sys.meta_path == before


def test_called_once_when_the_import_has_finished(module):
    """Not before, not for other modules, and with the complete module."""
    module("awaited_one", "value = 5")
    module("other_one", "")
    seen = []
    when_imported("awaited_one", lambda found: seen.append(found.value))
    __import__("other_one")
    assert seen == []
    __import__("awaited_one")
    __import__("awaited_one")
    assert seen == [5]


def test_called_at_once_for_an_imported_module():
    seen = []
    when_imported("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_requested_from_within_the_import(module):
    """The call waits until the import has finished and the next import begins."""
    module(
        "awaited_two",
        "from shared_store.runtime.import_hooks import when_imported\n"
        "when_imported('awaited_two', lambda found: seen.append(found.late))\nseen = []\nlate = 7",
    )
    module("later_one", "")
    __import__("awaited_two")
    assert sys.modules["awaited_two"].seen == []
    __import__("later_one")
    assert sys.modules["awaited_two"].seen == [7]


def test_what_it_raises_is_raised_by_the_import(module):
    """An error is not lost; and it does not come twice."""

    def fail(_):
        raise ValueError("not this one")

    module("awaited_three", "")
    when_imported("awaited_three", fail)
    with pytest.raises(ValueError, match="not this one"):
        __import__("awaited_three")
    __import__("awaited_three")
