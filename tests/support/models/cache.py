"""A cache of checkpoint directories: each is made once and then reused by tests and benchmarks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "checkpoints"
"""Default directory of the cache: ``.cache/checkpoints`` in the repository."""

VERSION = 1
"""Part of each cached directory's name. Raise it when the content of checkpoints changes."""


def made_once(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory ``cache/name-vVERSION``; call ``make`` to fill it if it does not exist.

    Safe for concurrent processes: each fills a directory of its own, and the first rename wins. A directory that exists
    is therefore complete.
    """
    target = cache / f"{name}-v{VERSION}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
