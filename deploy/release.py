#!/usr/bin/env python3
"""Build the source distribution and the wheel, check both, and run the wheel in a fresh environment: `make release`.

    python deploy/release.py             build, check, try; the files are in dist/
    python deploy/release.py --tools     install the extra `release` of pyproject.toml into this environment
    python deploy/release.py --version   print the version of the source tree

Nothing is uploaded, tagged or committed. The wheel is built from the source distribution, so that a file missing there
is noticed. Exit codes: 0 done, 1 a step failed (its output says why).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


class ReleaseError(Exception):
    """A step failed; the message says which."""


def main() -> int:
    """Run the step that the command line names; by default all of a release."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--tools", action="store_true", help="install the tools of a release into this environment")
    choice.add_argument("--version", action="store_true", help="print the version of the source tree")
    arguments = parser.parse_args()
    try:
        if arguments.version:
            print(version())
        elif arguments.tools:
            _run(sys.executable, "-m", "pip", "install", "--quiet", *tools())
        else:
            release()
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def version() -> str:
    """Return the version that `shared_store/__init__.py` declares."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "shared_store" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise ReleaseError("shared_store/__init__.py declares no __version__")
    return found[1]


def tools() -> list[str]:
    """Return the requirements of the extra `release`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return list(extras["release"])


def release() -> None:
    """Build into an empty `dist`, check the metadata, and run the wheel's command. Raises :class:`ReleaseError`."""
    shutil.rmtree(DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT))
    files = sorted(DIST.iterdir())
    wheel = next((file for file in files if file.suffix == ".whl"), None)
    if wheel is None:
        raise ReleaseError(f"no wheel among {[file.name for file in files]}")
    if not wheel.name.startswith(f"wooly-{version()}-"):
        raise ReleaseError(f"{wheel.name} is not of version {version()}")
    _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, files))
    run_wheel(wheel)
    print(f"release: wooly {version()} is in {DIST}: {', '.join(file.name for file in files)}")


def run_wheel(wheel: Path) -> None:
    """Install a wheel into a fresh environment, and compare the version that its command prints."""
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        _run(f"{directory}/bin/python", "-m", "pip", "install", "--quiet", str(wheel))
        # In another directory, and without the inherited import path, so that the installed package runs.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [f"{directory}/bin/wooly", "--version"]
        found = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        if found.returncode or version() not in found.stdout.split():
            raise ReleaseError(f"`wooly --version` of {wheel.name}: {found.stdout}{found.stderr}")


def _run(*command: str) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise ReleaseError(f"this failed, and its output above says why: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
