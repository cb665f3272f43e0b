"""The devices on which this version moves workloads. Elsewhere they join, run as ever, and say why they stay."""

from __future__ import annotations

from typing import Final

GPUS: Final[bool] = False
"""Whether workloads on GPUs take memory before they start, leave, and return.

False until the tests in ``tests/gpu`` and ``python benchmarks overcommit`` have passed on one with this code.
"""

REFUSAL: Final = "this version moves workloads in the memory of the host only: overcommit of GPUs is not enabled"
