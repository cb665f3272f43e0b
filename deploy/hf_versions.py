#!/usr/bin/env python3
"""Run the tests of `wooly_hf` over versions of transformers: what `make hf-versions` runs.

    python deploy/hf_versions.py                      every minor version that wooly supports
    python deploy/hf_versions.py 5.16 5.23 -- -x      these, with arguments for pytest

Each version has a virtual environment of its own, build/venv-hf-VERSION, with wooly from this source tree (editable),
torch for the CPU and no vLLM; it is made by the same steps as `make install`'s and kept.

Exit codes: 0 all passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import sys
import tomllib

from install import MODELS, ROOT, Environment
from versions import requirement, run

VERSIONS = tuple(f"5.{minor}" for minor in range(16, 24))
TORCH = "torch==2.13.0"  # a build for the CPU is preferred where one is found


def main() -> int:
    """Make the environments, run the tests in each, and say how it went."""
    return run("transformers", VERSIONS, _environment, ["tests/hf"], __doc__ or "")


def _environment(version: str) -> Environment:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    environment = Environment(ROOT / "build" / f"venv-hf-{version}", use_uv=True)
    environment.install("--no-deps", *MODELS)
    wanted = [*project["dependencies"], *extras["dev"], *extras["demo"], TORCH, requirement("transformers", version)]
    environment.install(*wanted)
    environment.install_wooly(None)
    return environment


if __name__ == "__main__":
    sys.exit(main())
