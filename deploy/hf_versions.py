#!/usr/bin/env python3
"""Run the tests of `wooly_hf` over versions of transformers: what `make hf-versions` runs.

    python deploy/hf_versions.py                      every minor version that wooly supports
    python deploy/hf_versions.py 5.16 5.23 -- -x      these, with arguments for pytest

Each version has a virtual environment of its own, build/venv-hf-VERSION, with wooly from this source tree (editable),
torch for the CPU and no vLLM; it is made by the same steps as `make install`'s and kept.

Exit codes: 0 all passed, 1 a version failed (the last lines say which), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib

from install import MODELS, ROOT, TORCH_CPU, Environment, InstallError

VERSIONS = tuple(f"5.{minor}" for minor in range(16, 24))


def main() -> int:
    """Make the environments, run the tests in each, and say how it went."""
    given, pytest_arguments = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="Arguments after -- go to pytest."
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION", help="such as 5.16 or 5.22.1")
    results = {version: _run(version, pytest_arguments) for version in parser.parse_args(given).versions}
    for version, result in results.items():
        print(f"transformers {version}: {result}", flush=True)
    return int(any(result != "passed" for result in results.values()))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what stands after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _run(version: str, pytest_arguments: list[str]) -> str:
    """Test one version: `passed`, or what went wrong."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    exactly = f"transformers=={version}" if version.count(".") > 1 else f"transformers=={version}.*"
    try:
        environment = Environment(ROOT / "build" / f"venv-hf-{version}", use_uv=True)
        environment.install("--no-deps", *MODELS)
        environment.install(*project["dependencies"], *extras["dev"], *extras["demo"], TORCH_CPU, exactly)
        environment.install_wooly(None)
    except InstallError as error:
        return f"not installed: {error}"
    command = [str(environment.python), "-m", "pytest", "tests/hf", "-q", *pytest_arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return "passed" if code == 0 else f"pytest exited with {code}"


if __name__ == "__main__":
    sys.exit(main())
