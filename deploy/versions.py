"""Tests with several versions of an engine, each in its own environment: `hf_versions.py` and `vllm_versions.py`."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence

from install import ROOT, Environment, InstallError


def run(
    engine: str, versions: Sequence[str], make: Callable[[str], Environment], tests: Sequence[str], about: str
) -> int:
    """Run the command line `[VERSION ...] [-- PYTEST_ARGUMENT ...]`, and return the exit code.

    Args:
        engine: the engine's name in the output.
        versions: the versions to test by default.
        make: creates the environment of a version.
        tests: arguments for pytest, before those of the command line.
        about: the script's docstring.
    """
    given, pytest_arguments = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=about.partition("\n\n")[0], epilog="Arguments after -- go to pytest.")
    parser.add_argument("versions", nargs="*", default=versions, metavar="VERSION", help=f"such as {versions[0]}")
    chosen = parser.parse_args(given).versions
    results = {version: _test(make, version, [*tests, "-q", *pytest_arguments]) for version in chosen}
    for version, result in results.items():
        print(f"{engine} {version}: {result}", flush=True)
    return int(any(result != "passed" for result in results.values()))


def minors(extra: str, distribution: str) -> tuple[str, ...]:
    """Return the minor versions that an extra in pyproject.toml admits, such as 5.16 to 5.24."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = re.compile(rf"{distribution}>=(\d+)\.(\d+),<\1\.(\d+)")
    (found,) = filter(None, map(bounds.fullmatch, extras[extra]))
    major, first, end = found.groups()
    return tuple(f"{major}.{minor}" for minor in range(int(first), int(end)))


def requirement(distribution: str, version: str) -> str:
    """Return the requirement for pip: the newest patch of a minor version, or the exact version."""
    return f"{distribution}=={version}" if version.count(".") > 1 else f"{distribution}=={version}.*"


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _test(make: Callable[[str], Environment], version: str, arguments: list[str]) -> str:
    """Test one version. Returns `passed`, or the failure."""
    try:
        environment = make(version)
    except InstallError as error:
        return f"not installed: {error}"
    code = subprocess.run([str(environment.python), "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode
    return "passed" if code == 0 else f"pytest exited with {code}"
