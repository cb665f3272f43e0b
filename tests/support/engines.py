"""Engine processes with real vLLM, and private stores."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.models import families
from support.preloaded import Pool
from support.waiting import process_state, wait_until

from shared_store.base.errors import StoreUnavailableError
from shared_store.base.status import Status
from shared_store.client.session import Session
from shared_store.runtime.versions import Range

ENGINE = Path(__file__).parents[1] / "engines" / "engine.py"
STARTED_WITHIN_S = 280.0
CPU_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""The environment of engines on a CPU."""
PRELOADED = Pool(("vllm.entrypoints.llm",), CPU_SETTINGS)
"""Only the imports of `engine.py`: as in a server, the plugin is registered before workers and models are imported."""
SHARING: dict[str, Any] = {"load_format": "wooly", "extra": {"fallback": False}}
"""Settings of a job: share, or fail."""


def vllm_since(version: str) -> bool:
    """Return whether the installed vLLM is this version or a later one."""
    return Range("vllm", version, "1").has(importlib.metadata.version("vllm"))


HAS_FINAL_TENSORS = vllm_since("0.30")
"""Whether this vLLM has a way to mark a layer's tensors as final. Others pack experts on a CPU at each load."""
LEFT_OUT = ({*families.SPARSE} if not HAS_FINAL_TENSORS else set()) | (set() if vllm_since("0.27") else {"mamba2"})
"""Families of models that this vLLM does not share, or (mamba2) that it does not run on a CPU."""


class EngineProcess:
    """A running ``engine.py``: its JSON lines are events, all other output is its log."""

    def __init__(self, runtime_dir: Path, job: dict[str, Any], **environment: str) -> None:
        variables = {**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir), **environment}
        self.process = PRELOADED.start(str(ENGINE), json.dumps(job), environment=variables)
        self.log: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._commands = 0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                if line.startswith('{"event"'):
                    self.events.append(json.loads(line))
                else:
                    self.log.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait(self, event: str, model: str | None = None) -> dict[str, Any]:
        """Return the first event of that kind (about that model). Fails with the engine's log if there is none."""

        def found() -> dict[str, Any] | None:
            matching = (e for e in self.events if e["event"] == event and model in (None, e.get("model")))
            return next(matching, None)

        with self._changed:
            ended = self._changed.wait_for(
                lambda: found() is not None or not self._reader.is_alive() or self.process.poll() is not None,
                timeout=STARTED_WITHIN_S,
            )
        if found() is None and ended:
            self._reader.join(timeout=10)
        result = found()
        assert result is not None, f"no {event!r} from the engine; the end of its log:\n" + "\n".join(self.log[-40:])
        return result

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def do(self, command: str) -> dict[str, Any]:
        """Run a command in an engine that obeys (see `engine.obey`); return its result."""
        self._commands += 1
        self.tell(command)
        return self.wait(f"did {self._commands}")

    def finish(self, timeout_s: float = STARTED_WITHIN_S) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(timeout=timeout_s)
        self._reader.join(timeout=10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def private_store_directory() -> Iterator[Path]:
    """Yield a directory for a store, with a short path; stop the store afterwards."""
    with tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o700)
        try:
            yield directory
        finally:
            stop_store(directory)


def stop_store(directory: Path) -> None:
    try:
        with Session.connect(directory, autostart=False) as session:
            keeper = session.status().keeper
            pids = [session.store_pid, *([keeper.pid] if keeper is not None else [])]
            session.shutdown_store()
    except StoreUnavailableError:
        return
    # Zombies have ended: when they are reaped is up to init.
    wait_until(lambda: all(process_state(pid) in {"", "Z"} for pid in pids), "store and keeper to end")


def status_of(directory: Path) -> Status:
    with Session.connect(directory, autostart=False, name="test") as session:
        return session.status()
