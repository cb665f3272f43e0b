"""The parts that the demos share: a temporary store, and the last line and exit code of a run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import msgspec
from rich.console import Console
from support.models.cache import CACHE
from support.servers import ServerError

from shared_store.base.errors import WoolyError

USERS = ("WOOLY", "PRIO", "VLLM_CPU_KVCACHE_SPACE")
"""The user's settings that a demo ignores: beginnings of variables' names."""


class DemoError(Exception):
    """A check of a demo failed. The message is the reason."""


class TemporaryStore:
    """A store in a directory of its own, with its embedded catalog. As a context manager, stops it on exit.

    Attributes:
        environment: of its clients, which start no store themselves.
        runtime_dir: of the store.
    """

    def __init__(self, console: Console, directory: Path, *options: str) -> None:
        self._console = console
        self._options = options
        self.runtime_dir = directory / "run"
        self.environment = {**os.environ, "WOOLY_RUNTIME_DIR": str(self.runtime_dir), "WOOLY_AUTOSTART": "0"}

    def __enter__(self) -> Self:
        self._console.print(" ".join(("starting a store with its embedded catalog", *self._options)), highlight=False)
        self.wooly("serve", "--detach", *self._options)
        return self

    def __exit__(self, *_: object) -> None:
        result = self._run("stop")
        if result.returncode:
            self._console.print(f"`wooly stop` failed ({result.returncode}): {result.stderr.strip()}", markup=False)

    def wooly(self, *arguments: str) -> str:
        """Run a command; return its output. Raises :class:`DemoError`."""
        result = self._run(*arguments)
        if result.returncode:
            output = f"{result.stdout}{result.stderr}".strip()
            last = output.rpartition("\n")[2]
            raise DemoError(
                f"`wooly {' '.join(arguments)}` failed with exit code {result.returncode}: {last}\n{output}"
            )
        return result.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shared_store.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of every demo."""
    options.add_argument("--json", action="store_true", help="print only the last line")
    options.add_argument("--keep", action="store_true", help="keep the logs of the servers, and print their directory")
    options.add_argument("--cache", type=Path, default=CACHE, help="directory in which checkpoints are made")


def run(arguments: argparse.Namespace, play: Callable[[Console, Path], dict[str, Any]]) -> int:
    """Run a demo in a temporary directory; print its result, or why it failed, as JSON; return the exit code."""
    console = Console(quiet=arguments.json)
    for name in [name for name in os.environ if name.startswith(USERS)]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Short, because a Unix socket's path is limited to 107 bytes. mkdtemp sets mode 0700.
    directory = Path(tempfile.mkdtemp(prefix="wooly-demo-", dir="/tmp"))
    began = time.monotonic()
    result: dict[str, Any]
    try:
        result, code = play(console, directory), 0
    except KeyboardInterrupt:
        result, code = {"demo": "failed", "reason": "interrupted"}, 130
    except (
        DemoError,
        ServerError,
        WoolyError,
        OSError,
        subprocess.SubprocessError,
        msgspec.MsgspecError,
    ) as error:
        console.print(str(error), markup=False, highlight=False)
        result, code = {"demo": "failed", "reason": str(error).partition("\n")[0]}, 1
    finally:
        if arguments.keep:
            console.print(f"logs: {directory}", highlight=False)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
    print(json.dumps(result))
    return code


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
