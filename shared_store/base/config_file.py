"""Configuration files of ``KEY=VALUE`` lines, which complete the environment.

Two files are read: that of ``WOOLYAI_CLIENT_CONFIG``, and ``wooly/config`` in ``$XDG_CONFIG_HOME`` (default
``~/.config``), which is also the file of WoolyAI's client. The first has precedence. Keys of other programs are
ignored. A file is read again when it changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from shared_store.base.errors import ConfigError

CLIENT_CONFIG: Final = "WOOLYAI_CLIENT_CONFIG"
"""Environment variable with the path of a configuration file."""

_read: dict[Path, tuple[tuple[int, ...], Mapping[str, str]]] = {}
"""Identity and content of each file when it was read last."""


def lookup(names: Sequence[str]) -> tuple[str, str, Path] | None:
    """Return the first of these keys in the first file that has one, with its value and the file, or None.

    Raises:
        ConfigError: a file cannot be read.
    """
    for path, values in files():
        for name in names:
            if values.get(name):
                return name, values[name], path
    return None


def files() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Yield path and values of every file that exists, in order of precedence. Raises :class:`ConfigError`."""
    given = os.environ.get(CLIENT_CONFIG)
    if given:
        path = Path(given).expanduser()
        try:
            yield path, _values(path)
        except OSError as error:
            raise ConfigError(f"{CLIENT_CONFIG}={given!r}: {error.strerror}; correct the path or unset it") from error
    path = default_path()
    try:
        values = _values(path)
    except OSError:
        return  # it is optional, and $HOME may be a directory of another user, as in containers
    yield path, values


def default_path() -> Path:
    """Return the path of the user's file, which need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "wooly" / "config"  # noqa: PTH111 - Path.expanduser fails for a user without a home


def _values(path: Path) -> Mapping[str, str]:
    found = path.stat()
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    known = _read.get(path)
    if known is None or known[0] != identity:
        known = _read[path] = identity, parse(path.read_text(encoding="utf-8", errors="replace"), path)
    return known[1]


def parse(text: str, path: Path) -> Mapping[str, str]:
    """Parse lines of ``KEY=VALUE``. Empty lines, comments (``#``), spaces and quotes around a value are left out.

    Raises:
        ConfigError: a line has another form. The message names the file and the line.
    """
    values = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        key, equals, value = content.removeprefix("export ").partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{path}, line {number}: {content!r} is not of the form KEY=VALUE")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[key.strip()] = value
    return values
