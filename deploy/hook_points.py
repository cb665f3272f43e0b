#!/usr/bin/env python3
"""Fingerprint the names of the installed engine that wooly uses.

    python deploy/hook_points.py wooly_hf transformers     JSON on stdout; run it with the Python of an environment

The names are read from wooly's source, so that no list can be forgotten: what a module imports from the engine; the
texts with which it looks up a module and names in it (``find("vllm.logger", "init_logger")``); and the methods of such
classes whose names occur in the source. A fingerprint is a signature and a digest of the code without comments and
docstrings. A name that this version does not have is left out.

Exit codes: 0 done, 1 the engine cannot be imported.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOOKUPS = {"find", "replace_function", "import_module", "getattr", "hasattr", "setattr", "isinstance"}
"""Functions of wooly and Python whose arguments name modules of an engine, and names in them."""


def main() -> int:
    """Print the fingerprints as JSON, and return the exit code."""
    package, engine = sys.argv[1:]
    try:
        importlib.import_module(engine)
    except ImportError as error:
        print(f"hook_points: cannot import {engine}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(fingerprints(ROOT / package, engine), indent=1, sort_keys=True))
    return 0


def fingerprints(package: Path, engine: str) -> dict[str, dict[str, str]]:
    """Return the fingerprint of each name of ``engine`` that the modules below ``package`` use."""
    sources = [ast.parse(file.read_text()) for file in sorted(package.rglob("*.py"))]
    words = {word for source in sources for word in _words(source)}
    found: dict[str, dict[str, str]] = {}
    for module, name in sorted({used for source in sources for used in names_used(source, engine)}):
        thing = _look_up(module, name)
        if thing is None:
            continue
        found[f"{module}.{name}"] = _fingerprint(thing)
        if inspect.isclass(thing):
            for member in (word for word in dir(thing) if word in words and _is_of_engine(thing, word, engine)):
                found[f"{module}.{name}.{member}"] = _fingerprint(inspect.getattr_static(thing, member))
    return found


def names_used(source: ast.Module, engine: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that a module of wooly asks of the engine."""
    constants = {
        target.id: node.value.value
        for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and _is_module(node.module, engine):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.FunctionDef) or node is source:
            scope = _without_functions(node) if node is source else list(ast.walk(node))
            texts = {text for part in scope for text in _texts(part, constants)}
            modules = {text for text in texts if _is_module(text, engine)}
            yield from ((module, text) for module in modules for text in texts - modules if text.isidentifier())


def _without_functions(module: ast.AST) -> list[ast.AST]:
    """Return the nodes of a module outside of its functions and classes."""
    waiting, found = list(ast.iter_child_nodes(module)), []
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node)
            waiting += ast.iter_child_nodes(node)
    return found


def _texts(node: ast.AST, constants: dict[str, Any]) -> Iterator[str]:
    """Yield the texts that a call of a look-up or a table names, with module constants replaced by their values."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        parts = node.args if called in LOOKUPS else []
    elif isinstance(node, ast.Tuple):
        parts = node.elts
    for part in parts:
        value = constants.get(part.id) if isinstance(part, ast.Name) else getattr(part, "value", None)
        if isinstance(value, str):
            yield value


def _words(source: ast.Module) -> Iterator[str]:
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.FunctionDef):
            yield node.name  # overrides a method of the engine


def _is_module(text: str | None, engine: str) -> bool:
    return text == engine or (text or "").startswith(f"{engine}.")


def _look_up(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None  # a module of another device, or one that this version does not have


def _is_of_engine(cls: type, member: str, engine: str) -> bool:
    """Return True for a method of the engine's own code, not of a base class such as torch's."""
    owner = next((one for one in cls.__mro__ if member in vars(one)), None)
    if owner is None or member.startswith("__") or not _is_module(owner.__module__, engine):
        return False
    return callable(inspect.unwrap(getattr(cls, member)))


def _fingerprint(thing: Any) -> dict[str, str]:
    """Return ``kind``, ``signature`` and ``code``, where the thing has them."""
    thing = thing.__func__ if isinstance(thing, (classmethod, staticmethod)) else thing
    if inspect.isclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        return {"kind": "class", "signature": f"({bases}) {' '.join(fields)}".strip()}
    if not callable(thing):
        return {"kind": type(thing).__name__}
    function = inspect.unwrap(thing)
    try:
        return {"kind": "function", "signature": str(inspect.signature(function)), "code": _digest(function)}
    except (TypeError, ValueError, OSError):
        return {"kind": type(thing).__name__}  # compiled


def _digest(function: Any) -> str:
    """Return a digest of a function's code, without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
