#!/usr/bin/env python3
"""Run the tests of `wooly_vllm` over versions of vLLM on a CPU: what `make vllm-versions` runs.

    python deploy/vllm_versions.py                    every minor version that wooly supports and that CPUs have
    python deploy/vllm_versions.py 0.26 0.29 -- -x    these, with arguments for pytest

Each version has a virtual environment of its own, build/venv-vllm-VERSION, with wooly from this source tree (editable)
and the torch that this vLLM wants; it is made by the same steps as `make install`'s and kept. A version that PyPI has
no build of for CPUs runs on the kernels of the one before, with that one's torch.

Exit codes: 0 all passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import vllm_cpu_shim
from install import ROOT, Environment
from versions import requirement, run

VERSIONS = tuple(f"0.{minor}" for minor in range(26, 34))
KERNELS = {"0.33": "0.32"}
"""Versions that PyPI has no build of for CPUs, and whose kernels their Python code is run on."""
NEW_IMPORTS = {"0.33": ("orjson",)}
"""What that code imports and the version with the kernels does not."""
TESTS = ("tests/engines", "tests/client/test_options.py", "tests/client/test_unnamed.py")


def main() -> int:
    """Make the environments, run the tests in each, and say how it went."""
    return run("vLLM", VERSIONS, _environment, TESTS, __doc__ or "")


def _environment(version: str) -> Environment:
    environment = Environment(ROOT / "build" / f"venv-vllm-{version}", use_uv=True)
    environment.install_engine("vllm-cpu", requirement("vllm-cpu", KERNELS.get(version, version)))
    if version in KERNELS:
        _put_over_kernels(environment, version)
    environment.install_wooly(None)
    return environment


def _put_over_kernels(environment: Environment, version: str) -> None:
    """Put the Python code of the build for GPUs in the place of vllm-cpu's, and leave its kernels where they are."""
    installed = environment.site_packages()
    shim = vllm_cpu_shim.find("vllm", installed)
    if shim is not None and shim.version.startswith(f"{version}."):
        return
    environment.install(*NEW_IMPORTS[version])
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
