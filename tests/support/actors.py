"""Client processes that a test drives step by step, and may stop or kill at any of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.waiting import process_state, readable, wait_until

from shared_store.base import errors


class Actor:
    """A process with a `client.Client` in it. Methods of that client are called as this object's own.

    `begin` and `finish` are the two halves of a call that waits for something.
    """

    MAIN = "actor_main.py"

    def __init__(self, **popen):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(self.MAIN))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            **popen,
        )
        self._unread = b""

    @property
    def pid(self):
        return self._process.pid

    def begin(self, method, **arguments):
        self._process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")

    def finish(self, timeout_s=60.0):
        """The result of what was begun. An error is raised here as the class that it was there."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not readable(self._process.stdout, max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"the client process did not answer within {timeout_s} s")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise AssertionError("the client process ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"], RuntimeError)(answer["text"])
        return answer["result"]

    def idle(self):
        """Whether what was begun has not been answered yet."""
        return not self._unread and not readable(self._process.stdout, 0)

    def __getattr__(self, method):
        def call(**arguments):
            self.begin(method, **arguments)
            return self.finish()

        return call

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", "the client process to be stopped")

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
