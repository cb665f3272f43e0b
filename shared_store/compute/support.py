"""The devices on which this version holds workloads. Elsewhere they count for the status, and are never held."""

from __future__ import annotations

from typing import Final

GPUS: Final[bool] = False
"""Whether workloads on GPUs take turns.

False until the tests in ``tests/gpu`` and ``python benchmarks compute`` have passed on one with this code.
"""

UNGATED: Final = "this version holds workloads on CPUs only: turns on GPUs are not enabled"
