"""A wall clock that a test sets, for processes that it starts: see `clock.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class Clock:
    """`environment` is for the processes; `shift` moves their wall clock at once."""

    def __init__(self, directory):
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler on PATH, for a library that shifts a process's clock")
        library = Path(directory) / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        self._file = Path(directory) / "shift"
        self._file.write_bytes(bytes(8))
        self.environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self._file)}

    def shift(self, seconds):
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
