"""The machine that runs tests or benchmarks."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the CPU's model name as in ``/proc/cpuinfo``, or the architecture if it has none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
