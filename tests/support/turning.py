"""Commands of `engine.py` that hold a whole engine in the process, and let it go on: this process plays the arbiter.

Each command takes one word of JSON and returns facts for the test.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from support.gating import PROMPTS, Gating
from support.waiting import readable, wait_until

from shared_store.compute import layout
from shared_store.compute.page import make_page, map_page
from shared_store.runtime.fds import OwnedFd


def run(llm: Any, what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run a command: a method of `Turning`."""
    found: dict[str, Any] = getattr(Turning(llm), what)(**given)
    return found


class Arbiter:
    """The arbiter's end of a compute page."""

    def __init__(self, gate: Any) -> None:
        page = make_page()
        self.words = map_page(page.dup())
        self.words[layout.CONTENDED_WORD] = 1
        self._bell, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gate.attach(page, OwnedFd(theirs.detach()), lambda: None)

    def close(self) -> None:
        self._bell.close()

    def ring(self) -> None:
        self._bell.send(b"\0")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for rings until a condition is true."""
        while not condition():
            assert readable(self._bell.fileno(), 30.0), "the workload does not ring"
            self._bell.recv(4096)

    @property
    def working(self) -> bool:
        return bool(self.words[layout.STATE_WORD] & layout.WORKING)

    @property
    def in_flight(self) -> int:
        return int(self.words[layout.STATE_WORD] & layout.IN_FLIGHT)

    @property
    def waits(self) -> bool:
        """Whether a step would begin, and nothing is in flight."""
        return bool(self.words[layout.HELD_SINCE_WORD]) and not self.in_flight


class Turning(Gating):
    """An engine that takes turns."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        assert self.workload is not None
        assert self.workload.gate is not None
        self.gate = self.workload.gate
        self.held: list[dict[str, Any]] = []

    def answer_in_turns(
        self,
        holds: tuple[int, ...] = (),
        *,
        abort: int = 0,
        swap: bool = False,
        die: bool = False,
        one_step: bool = False,
    ) -> dict[str, Any]:
        """Answer prompts in one batch, and be held at these steps.

        Args:
            holds: numbers of steps.
            abort: number of requests that are aborted while the engine is held.
            swap: whether it leaves its devices while it is held.
            die: the arbiter ends instead of letting it go on.
            one_step: it is let make one step first.
        """
        assert self.core.reset_prefix_cache()
        with self._arbiter() as arbiter:
            for number, prompt in enumerate(PROMPTS):
                self._add(str(number), prompt)
            step = 0
            while self.engine.has_unfinished_requests():
                self._step()
                step += 1
                if step in holds:
                    self._hold(arbiter, abort=abort, swap=swap, die=die, one_step=one_step)
            words = [arbiter.words[word] for word in (layout.BEGUN_WORD, layout.ENDED_WORD)]
            left = {"working": arbiter.working, "in_flight": arbiter.in_flight, "steps": words}
        return {**self._answered(), "held": self.held, "left": left, "said": self.said}

    def _hold(self, arbiter: Arbiter, *, abort: int, swap: bool, die: bool, one_step: bool) -> None:
        """Hold the engine, make a step, and let it go on meanwhile."""
        words = arbiter.words
        facts: dict[str, Any] = {}
        self.held.append(facts)
        words[layout.UNTIL_WORD] = 0

        def meanwhile() -> None:
            arbiter.wait_for(lambda: arbiter.waits)
            begun = words[layout.BEGUN_WORD]
            if one_step:
                words[layout.ALLOWED_WORD] = begun + 1
                arbiter.ring()
                arbiter.wait_for(lambda: words[layout.BEGUN_WORD] > begun and arbiter.waits)
            facts["working"] = arbiter.working
            if swap:
                self.leave()
                wait_until(lambda: not self.gate.away, "the engine to return", 60)
                arbiter.wait_for(lambda: arbiter.waits)
            if abort:
                self.engine.abort_request([str(number) for number in range(abort)])
            facts["counts"] = self.core.scheduler.get_request_counts()
            facts["begun"] = words[layout.BEGUN_WORD] - begun
            if die:
                arbiter.close()
                return
            words[layout.UNTIL_WORD] = layout.FREE
            arbiter.ring()

        thread = threading.Thread(target=meanwhile)
        thread.start()
        while thread.is_alive():
            self._step()
        thread.join()

    def prefill(self, tokens: int, ms_per_token: float, decoding: int = 0) -> dict[str, Any]:
        """Answer a long prompt three times: a more important workload works during the second time only.

        Args:
            tokens: of the prompt.
            ms_per_token: that a step takes at least.
            decoding: other requests, which decode meanwhile.

        Returns:
            The tokens that each request got, by step, for each time.
        """
        steps: list[list[int]] = []
        found: dict[str, list[list[int]]] = {}
        scheduler, model = self.core.scheduler, self.core.model_executor.driver_worker.worker.model_runner.model
        stock = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                steps.append(sorted(output.num_scheduled_tokens.values()))
            return output

        def slow_down(*_: Any) -> None:
            time.sleep(sum(steps[-1]) * ms_per_token / 1000)

        hook = model.register_forward_pre_hook(slow_down)
        scheduler.schedule = schedule
        try:
            with self._arbiter() as arbiter:
                for name, until in (("usual", 0), ("short", layout.FREE), ("after", 0)):
                    assert self.core.reset_prefix_cache()
                    arbiter.words[layout.SHORT_UNTIL_WORD] = until
                    for number in range(decoding):
                        self._add(f"{name} {number}", PROMPTS[number])
                    while sum(bool(it.output_token_ids) for it in scheduler.running) < decoding:
                        self._step()
                    steps.clear()
                    self._add(name, [3 + number % 200 for number in range(tokens)])
                    while self.engine.has_unfinished_requests():
                        self._step()
                    found[name] = list(steps)
        finally:
            scheduler.schedule = stock
            hook.remove()
        return {"steps": found, "budget": scheduler.max_num_scheduled_tokens, **self._answered()}

    @contextlib.contextmanager
    def _arbiter(self) -> Iterator[Arbiter]:
        arbiter = Arbiter(self.gate.turns.compute)
        try:
            yield arbiter
        finally:
            arbiter.close()
            wait_until(lambda: not self.gate.turns.compute.attached, "the gate to be free")
