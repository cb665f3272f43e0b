"""Doing something once a module has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module as soon as its import is over; now, if it is.

    A module whose import is under way counts as imported when the next import begins after it. What ``then`` raises is
    raised where the module is imported.
    """
    module = sys.modules.get(name)
    if module is not None and not _under_way(module):
        then(module)
    else:
        sys.meta_path.insert(0, _Watch(name, then))


def _under_way(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Watch(MetaPathFinder):
    """Finds nothing itself: it sees imports begin, and has the one that it waits for end with a call."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave other modules alone, and the one that is waited for to the other finders."""
        module = sys.modules.get(self._name)
        if module is not None and not _under_way(module):
            self._done(module)
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self._done(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]  # this one module's loader
        return spec

    def _done(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._then(module)
