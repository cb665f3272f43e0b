"""The process behind `workloads.Workload`: an agent and memory that it moves, driven by lines of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.holders import Holder

from shared_store.base.workload_settings import WorkloadSettings
from shared_store.client.session import Session
from shared_store.overcommit import room
from shared_store.overcommit.agent import Agent


class Workload:
    """A workload that holds memory of `cpu`."""

    def __init__(self):
        self._agent = None
        self._holder = None

    def join(self, directory, name, nbytes, priority=0, swap=True, alone_after_s=None):
        if alone_after_s is not None:
            room.ALONE_AFTER_S = alone_after_s
        self._holder = Holder(nbytes)
        self._agent = Agent(
            lambda identity: Session.connect(Path(directory), name=name, autostart=False, identity=identity),
            self._holder,
            kind="vllm",
            name=name,
            devices=("cpu",),
            settings=WorkloadSettings(None, priority, swap),
        )
        self._agent.join()
        return self._agent.name

    def start(self, timeout_s=60.0):
        """Take memory, and allocate it. Returns the seconds that it waited."""
        waited = self._agent.take_room({"cpu": self._holder.nbytes}, timeout_s)
        self._holder.allocate()
        self._agent.joined_resident(self._holder.holdings())
        return waited

    def deep(self, directory, device):
        """Open a device, and have a helper that takes this process off it."""
        self._device = Path(device).open("rb")  # noqa: SIM115 - as long as this process lives
        self._agent.offer_checkpoints(Path(directory))

    def state(self):
        return self._agent.state.value

    def held(self):
        return self._holder.held

    def intact(self):
        return self._holder.intact()

    def use(self, timeout_s=60.0):
        """A request: returns once the memory is there, whether its content is right."""
        self._agent.ensure_resident(timeout_s)
        return self._holder.intact()

    def wanted(self):
        return self._agent.wanted()

    def unwanted(self):
        self._agent.unwanted()

    def sleep(self):
        self._agent.left_by_itself(self._holder.leave(active=True, within_s=0, reached=lambda _: None))

    def set(self, busy=None, refusal=None, stop=None):
        """Make the engine busy, let it decline to leave, or stop at a step."""
        if busy is not None:
            self._holder.busy = busy
        if refusal is not None:
            self._holder.refusal = refusal
        if stop is not None:
            self._holder.stops.add(stop)

    def fail(self, times):
        """Let returns fail for lack of memory."""
        from shared_store.base.errors import OutOfMemoryError

        self._holder.failures = [OutOfMemoryError("another process took it") for _ in range(times)]

    def go_on(self, step):
        self._holder.go_on(step)

    def at(self, step, timeout_s=20.0):
        self._holder.wait_for(step, timeout_s)

    def leaves(self):
        """How often it was moved out, or back."""
        return [call[0] for call in self._holder.calls]

    def close(self):
        self._agent.close()


def main():
    workload = Workload()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"result": getattr(workload, method)(**arguments)}
        except Exception as error:  # noqa: BLE001 - any error is sent to the calling test
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
