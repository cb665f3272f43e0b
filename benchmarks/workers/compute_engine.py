"""A vLLM engine whose core has a process of its own, as in a server, for the benchmark ``compute``.

Words are a command and, after a space, its arguments as JSON. All times are those at which this process, the engine's
client, has the tokens. On a CPU the engine's core has one core of the machine, which all engines share, and its client
has the others.

The role ``passes`` is an engine in the caller's process instead, whose gate is timed. Relies for that on the names of
the methods of :class:`~shared_store.compute.gate.ComputeGate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import statistics
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, now, play

PASSED = ("work", "may_begin", "begin", "end")
"""Methods of the gate that a step calls while its workload is alone."""


def engine(talk: Talk, job: dict[str, Any]) -> None:
    """Start an engine, then obey.

    ``job``: ``model``, ``settings`` (arguments of the engine), ``core`` (of the machine, for the engine's core; None:
    any). Waits for the word ``start`` once everything is imported.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    talk.send("imported")
    words = talk.words()
    if next(words, "") != "start":
        return
    began = now()
    every = os.sched_getaffinity(0)
    if job["core"] is not None:
        os.sched_setaffinity(0, {job["core"]})

    async def serve() -> None:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=job["model"],
                load_format="wooly",
                model_loader_extra_config={"fallback": False},
                **job["settings"],
            )
        )
        if job["core"] is not None:
            _leave_core(every - {job["core"]} or every)
        served = _Served(llm)
        await served.answer(0, 4, 8)
        talk.send("ready", seconds=now() - began)
        loop = asyncio.get_running_loop()
        while word := await loop.run_in_executor(None, next, words, ""):
            command, _, given = word.partition(" ")
            talk.send(command, **await getattr(served, command)(**json.loads(given or "{}")))

    asyncio.run(serve())


def _leave_core(cores: set[int]) -> None:
    """Let all threads of this process run on other cores than the engine's core, whose process has started."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


class _Served:
    """The engine, and the commands of a benchmark. Each returns the facts of its event."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._number = 0

    async def answer(self, number: int, length: int, tokens: int) -> list[tuple[float, int]]:
        """Answer a request; return the time of each output, and its number of tokens."""
        return [found async for found in self._outputs(number, length, tokens)]

    async def tokens(self, at: float, seconds: float, batch: int, prompt: int, room: int) -> dict[str, Any]:
        """Keep so many requests running; return the seconds between the tokens of each that came in time.

        Args:
            at: time at which to begin.
            seconds: for which.
            batch: requests at the same time.
            prompt: tokens of each prompt.
            room: tokens of each answer.
        """
        until = at + seconds
        gaps: list[float] = []
        count = 0

        async def run(number: int) -> None:
            nonlocal count
            while now() < until:
                before = 0.0
                async for came, tokens in self._outputs(number, prompt, room, until):
                    count += tokens
                    if before:
                        gaps.extend([(came - before) / tokens] * tokens)
                    before = came

        await _until(at)
        await asyncio.gather(*(run(number) for number in range(batch)))
        return {"gaps": gaps, "count": count}

    async def load(
        self, at: float, lead: float, seconds: float, concurrency: int, prompt: int, tokens: int
    ) -> dict[str, Any]:
        """Keep so many requests with long prompts in the engine; return the prompts' tokens that it finished in time.

        Args:
            at: time from which finished requests count.
            lead: seconds before that at which the first ones are sent.
            seconds: for which they count; then those that are left are aborted.
            concurrency: requests at the same time.
            prompt: tokens of each prompt.
            tokens: of each answer.
        """
        until = at + seconds
        done = 0

        async def run(number: int) -> None:
            nonlocal done
            while now() < until:
                number += concurrency
                got = sum([got async for _, got in self._outputs(number, prompt, tokens, until)])
                if got == tokens and at <= now() <= until:
                    done += 1

        await _until(at - lead)
        await asyncio.gather(*(run(number) for number in range(concurrency)))
        return {"count": done * prompt}

    async def requests(self, at: float, arrivals: list[float], prompt: int, tokens: int) -> dict[str, Any]:
        """Answer requests that arrive at given times; return the seconds of their first tokens and between others."""
        first: list[float] = []
        gaps: list[float] = []
        spans: list[tuple[float, float]] = []

        async def run(number: int, arrival: float) -> None:
            await _until(at + arrival)
            before = 0.0
            async for came, got in self._outputs(number, prompt, tokens):
                if before:
                    gaps.extend([(came - before) / got] * got)
                else:
                    first.append(came - at - arrival)
                before = came
            spans.append((at + arrival, before))

        await asyncio.gather(*(run(number, arrival) for number, arrival in enumerate(arrivals)))
        return {"first": first, "gaps": gaps, "count": len(arrivals) * tokens, "busy_s": _covered(spans)}

    async def _outputs(
        self, number: int, length: int, tokens: int, until: float | None = None
    ) -> AsyncIterator[tuple[float, int]]:
        """Send a request; yield the time of each output and its number of tokens. It is aborted at ``until``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        greedy = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": [10 + (37 * number + 101 * j) % 500 for j in range(length)]}
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(None if until is None else max(0.0, until - now())),
                contextlib.aclosing(self._llm.generate(prompt, greedy, f"{self._number:08d}")) as outputs,
            ):
                async for output in outputs:
                    if got := len(output.outputs[0].token_ids):
                        yield now(), got


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds that are in at least one of some spans."""
    covered = end = 0.0
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


async def _until(at: float) -> None:
    await asyncio.sleep(max(0.0, at - now()))


def passes(talk: Talk, job: dict[str, Any]) -> None:
    """Start an engine in this process; for each word, decode for some seconds and send times of steps and of the gate.

    ``job``: as for :func:`engine`; the core is not used. An event has medians of steps: ``step_s``, and the part of it
    in the gate, ``gate_s``, without the cost of timing it; and ``calls``: calls of the gate in a step.
    """
    from vllm import LLM, SamplingParams

    import wooly_vllm
    from shared_store.compute.gate import ComputeGate

    wooly_vllm.register()  # vLLM calls it only if wooly is installed, not if it is just on the path
    talk.send("imported")
    words = talk.words()
    if next(words, "") != "start":
        return
    spent = [0.0, 0.0]
    llm = LLM(job["model"], load_format="wooly", model_loader_extra_config={"fallback": False}, **job["settings"])
    for name in PASSED:
        _time(ComputeGate, name, spent)
    timing = _cost_of_timing()
    talk.send("ready")
    for number, word in enumerate(words):
        given = json.loads(word)
        greedy = SamplingParams(temperature=0, max_tokens=given["tokens"], detokenize=False, ignore_eos=True)
        core = llm.llm_engine
        core.add_request(f"{number:08d}", {"prompt_token_ids": list(range(10, 42))}, greedy)
        core.step()  # the prompt
        steps, gates, calls = (statistics.median(several) for several in zip(*_steps(core, spent), strict=True))
        talk.send("passed", step_s=steps, gate_s=gates - calls * timing, calls=calls)


def _steps(core: Any, spent: list[float]) -> Iterator[tuple[float, float, float]]:
    """Make steps; yield the seconds of each, those in the gate, and the calls of the gate."""
    while core.has_unfinished_requests():
        spent[:] = 0.0, 0.0
        began = now()
        core.step()
        yield now() - began, spent[0], spent[1]


def _cost_of_timing(calls: int = 10_000) -> float:
    """Return the seconds that :func:`_time` adds for each call of a method."""
    spent = [0.0, 0.0]

    class Empty:
        def method(self, *, has: bool) -> None:
            """Do nothing."""

    empty = Empty()
    _time(Empty, "method", spent)
    for _ in range(calls):
        empty.method(has=True)
    return spent[0] / calls


def _time(owner: Any, name: str, spent: list[float]) -> None:
    """Add the duration of all future calls of a method, and their number, to ``spent``."""
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = now()
        try:
            return stock(*args, **kwargs)
        finally:
            spent[0] += now() - began
            spent[1] += 1

    setattr(owner, name, timed)


def main() -> None:
    """Run the role given on the command line."""
    play({"engine": engine, "passes": passes})
