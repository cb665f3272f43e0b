"""The result of one check, and running a tool for one."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

TOOL_WITHIN_S: Final = 10.0


class Check(msgspec.Struct, frozen=True):
    """A result. ``advice`` is the next step for the user; empty if ``result`` is ``ok``."""

    name: str
    result: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def run_tool(command: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
    """Run a program, and return its output. Raises ``OSError`` or ``subprocess.SubprocessError``."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_WITHIN_S, check=check)
