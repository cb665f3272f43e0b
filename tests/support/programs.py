"""Python programs in separate processes. Imports no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def start_program(program, *arguments, **popen):
    """Start a Python process with the import paths of the tests."""
    path = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{program}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def finish_program(process, timeout_s=90):
    """Return the output of a program, which must exit with 0."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out.strip()
