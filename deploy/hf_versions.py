#!/usr/bin/env python3
"""Run the tests of `wooly_hf` with several versions of transformers (`make hf-versions`).

    python deploy/hf_versions.py                      every supported minor version
    python deploy/hf_versions.py 5.16 5.24 -- -x      these versions, with arguments for pytest

Each version has its own virtual environment, build/venv-hf-VERSION, with wooly from this source tree (editable), torch
for the CPU and no vLLM. It is created with the steps of `make install` and reused by the next run.

Exit codes: 0 all versions passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from install import MODELS, ROOT, Environment
from versions import minors, requirement, run

VERSIONS = minors("hf", "transformers")
TORCH = "torch==2.13.0"  # a CPU build is preferred if the index has one


def main() -> int:
    """Create the environments, run the tests in each, and print the results."""
    return run("transformers", VERSIONS, _environment, ["tests/hf"], __doc__ or "")


def _environment(version: str) -> Environment:
    return environment(ROOT / "build" / f"venv-hf-{version}", requirement("transformers", version))


def environment(directory: Path, transformers: str) -> Environment:
    """Create an environment for the tests of `wooly_hf`, with a requirement of transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    made = Environment(directory, use_uv=True)
    made.install("--no-deps", *MODELS)
    made.install(*project["dependencies"], *extras["dev"], *extras["demo"], TORCH, transformers)
    made.install_wooly(None)
    return made


if __name__ == "__main__":
    sys.exit(main())
