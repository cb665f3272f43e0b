"""Calls that wait until a module was imported, without importing it.

Relies on the import system's meta path (PEP 451) and on ``__spec__._initializing``, which CPython sets while a module's
import is in progress.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module as soon as its import has finished; now, if it has.

    A module whose import is in progress counts as imported when the next import begins after it. An exception of
    ``then`` is raised by the statement that imports the module.
    """
    module = sys.modules.get(name)
    if module is not None and not _in_progress(module):
        then(module)
    else:
        sys.meta_path.insert(0, _Watch(name, then))


def _in_progress(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Watch(MetaPathFinder):
    """Finds no module itself. It sees imports begin, and wraps the loader of the module that it waits for."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the other finders' spec of the awaited module with a wrapped loader; None for other modules."""
        module = sys.modules.get(self._name)
        if module is not None and not _in_progress(module):
            self._finish(module)
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_finish(module: ModuleType) -> None:
                execute(module)
                self._finish(module)

            spec.loader.exec_module = execute_and_finish  # type: ignore[method-assign]  # a loader of this module alone
        return spec

    def _finish(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._then(module)
