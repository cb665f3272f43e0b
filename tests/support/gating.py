"""Commands of `engine.py` that move a whole engine in the process, by request of the store, and answer meanwhile.

Each command takes one word of JSON and returns facts for the test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shared_store.base.errors import WoolyError
from shared_store.client.session import Session

PROMPTS = [[7 + number, *range(10, 40 + 11 * (number % 4))] for number in range(4)]
TOKENS = 40


def run(llm: Any, what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run a command: a method of `Gating`."""
    found: dict[str, Any] = getattr(Gating(llm), what)(**given)
    return found


class Gating:
    """An engine with a gate."""

    def __init__(self, llm: Any) -> None:
        from wooly_vllm.residency.engine import workload_of

        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.workload = workload_of(self.core)
        self.answers: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.said: list[Any] = []

    def facts(self) -> dict[str, Any]:
        """Return the state, and what the engine has."""
        assert self.workload is not None
        found = self.workload._mover.holdings()
        return {
            "state": self.workload.agent.state.value,
            "away": self.workload.gate is not None and self.workload.gate.away,
            "asynchronous": self.core.batch_queue is not None,
            "private": dict(found.private),
            "stays": dict(found.stays),
            "needs": dict(found.needs),
            "sleeping": self.core.is_sleeping(),
            "counts": self.core.scheduler.get_request_counts(),
        }

    def answer(
        self, swaps: tuple[int, ...] = (), *, fresh: bool = True, restore: bool = True, abort: int = 0
    ) -> dict[str, Any]:
        """Answer prompts in one batch, and leave the device at these steps; the next step returns.

        Args:
            swaps: numbers of steps.
            fresh: without cached prefixes.
            restore: False: blocks are zero on the return.
            abort: number of requests that are aborted while the engine is away.
        """
        if fresh:
            assert self.core.reset_prefix_cache()
        for number, prompt in enumerate(PROMPTS):
            self._add(str(number), prompt)
        step = 0
        while self.engine.has_unfinished_requests():
            self._step()
            step += 1
            if step in swaps:
                with _Forgetting(active=not restore):
                    self.leave()
                    self.engine.abort_request([str(number) for number in range(abort)])
                    self._step()
        return {**self._answered(), "said": self.said}

    def leave(self) -> dict[str, Any]:
        """Leave the device, by request of the store, while no step is made."""
        assert self.workload is not None
        name = self.workload.agent.name

        def move() -> str:
            with Session.connect(autostart=False) as session:
                return session.workloads.move(name, out=True)

        _, error = _in_a_thread(move)
        self.said.append(error or self.workload.agent.state.value)
        return {"said": self.said}

    def queue_and_abort(self) -> dict[str, Any]:
        """Add a request while the engine is away, and abort it again."""
        counts = [self.core.scheduler.get_request_counts()]
        self._add("queued", PROMPTS[0])
        counts.append(self.core.scheduler.get_request_counts())
        self.engine.abort_request(["queued"])
        counts.append(self.core.scheduler.get_request_counts())
        return {"each": counts, **self.facts()}

    def reset(self) -> dict[str, Any]:
        """Reset the prefix cache."""
        return {"reset": self.core.reset_prefix_cache(), **self.facts()}

    def rpc(self, method: str) -> dict[str, Any]:
        """Call a method of the workers."""
        return {"workers": len(self.core.collective_rpc(method))}

    def pause_around_a_swap(self) -> dict[str, Any]:
        """Pause with requests in the queue, leave, and look at it."""
        assert self.core.reset_prefix_cache()
        self.core.pause_scheduler(mode="keep", clear_cache=False)
        paused = [self.core.is_scheduler_paused()]
        for number, prompt in enumerate(PROMPTS):
            self._add(str(number), prompt)
        self.leave()
        paused += [self.core.is_scheduler_paused(), self.core.is_sleeping()]
        self.engine.step()
        return {"paused": paused, **self.facts()}

    def resume(self) -> dict[str, Any]:
        """Go on after :meth:`pause_around_a_swap`."""
        self.core.resume_scheduler()
        while self.engine.has_unfinished_requests():
            self._step()
        return self._answered()

    def decline(self) -> dict[str, Any]:
        """Ask the engine to leave if it has nothing to do, while it has."""
        assert self.workload is not None
        mover = self.workload._mover
        self._add("running", PROMPTS[0])
        self._step()
        _, error = _in_a_thread(lambda: mover.leave(active=False, within_s=5.0, reached=self.said.append))
        self.engine.abort_request(["running"])
        return {"declined": error}

    def fail_to_return(self) -> dict[str, Any]:
        """Leave, and return to contents that cannot be restored; return the errors of the next steps."""
        from wooly_vllm.residency import rows

        def restore(*_: object) -> None:
            raise RuntimeError("contents are lost")

        self.leave()
        rows.restore = restore
        self._add("lost", PROMPTS[0])
        errors = []
        for _ in range(2):
            try:
                self.engine.step()
            except Exception as error:  # noqa: BLE001 - returned to the test
                errors.append(f"{type(error).__name__}: {error}")
        return {"errors": errors, "away": self.workload.gate.away}  # type: ignore[union-attr]  # it is gated

    def _answered(self) -> dict[str, Any]:
        names = sorted(self.answers)
        return {
            "tokens": {name: self.answers[name] for name in names},
            "cached": {name: self.cached[name] for name in names},
        }

    def _step(self) -> None:
        for output in self.engine.step():
            self.answers[output.request_id] = list(output.outputs[0].token_ids)
            self.cached[output.request_id] = output.num_cached_tokens or 0

    def _add(self, name: str, prompt: list[int]) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)


def _in_a_thread(function: Callable[[], Any]) -> tuple[Any, str]:
    """Return a function's result, and the error that it raised, or ""."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.extend((function(), ""))
        except WoolyError as error:
            results.extend((None, f"{error} [{error.code}]"))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0], results[1]


class _Forgetting:
    """Within the block, nothing is copied back."""

    def __init__(self, *, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        from wooly_vllm.residency import rows

        self._stock = rows.restore
        if self._active:
            rows.restore = lambda *_: None

    def __exit__(self, *_: object) -> None:
        from wooly_vllm.residency import rows

        rows.restore = self._stock
