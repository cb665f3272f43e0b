"""Make ``benchmarks`` importable in its tests, after all installed packages: those stay the ones that are tested."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
