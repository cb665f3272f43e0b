"""Processes that map memory of a device in phases: see `mapping_main.py`."""

import subprocess
import sys
from pathlib import Path

from support.waiting import readable

ROUNDS = 20


class MappingProcess:
    """A process that is connected, and begins with :meth:`go`. ``phases``: 0 stays inside of one."""

    def __init__(self, directory, device, journal, phases=0):
        command = [sys.executable, Path(__file__).with_name("mapping_main.py"), directory, device, journal, phases]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.hear("connected")

    def hear(self, word):
        assert readable(self.process.stdout, 60)
        assert self.process.stdout.readline() == f"{word}\n"

    def go(self):
        self.process.stdin.write("go\n")

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def map_in_turn(directory, device, journal):
    """Let two processes map at the same time; fail if a phase begins before another has ended."""
    children = [MappingProcess(directory, device, journal, ROUNDS) for _ in range(2)]
    try:
        for child in children:
            child.go()
        for child in children:
            assert child.process.wait(120) == 0
    finally:
        for child in children:
            child.end()
    lines = journal.read_text().splitlines()
    assert len(lines) == 2 * 2 * ROUNDS
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert all((first.split()[0], second) == ("begin", f"end {first.split()[1]}") for first, second in pairs), lines
    assert len({first for first, _ in pairs}) == 2
