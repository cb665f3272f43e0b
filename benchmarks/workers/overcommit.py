"""A vLLM engine in one process that is swapped between its steps, for the benchmark ``overcommit``.

Words are a command and, after a space, its arguments as JSON. Between two steps no thread of the engine is in a step,
so that a swap begins at once, with all requests running; the next step waits for the return.

Relies on the names of the methods of :class:`wooly_vllm.residency.engine_mover.EngineMover`, which are timed here.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

from benchmarks.harness.worker import Talk, now, play

PROMPT = 64
"""Tokens of the shortest prompt; others have up to 64 more."""

SETTLE_TIMEOUT_S = 60.0


def engine(talk: Talk, job: dict[str, Any]) -> None:
    """Start an engine, then obey.

    ``job``: ``model``, ``settings`` (arguments of the engine), ``workload`` (its name), ``batch`` (requests),
    ``tokens`` (of each answer), ``adapter`` (directory of a LoRA adapter, or empty). Waits for the word ``start`` once
    everything is imported.
    """
    from vllm import LLM

    import wooly_vllm

    wooly_vllm.register()  # vLLM calls it only if wooly is installed, not if it is just on the path
    moves: list[dict[str, Any]] = []
    _record_moves(moves)
    talk.send("imported")
    words = talk.words()
    if next(words, "") != "start":
        return
    began = now()
    llm = LLM(
        job["model"],
        load_format="wooly",
        model_loader_extra_config={"fallback": False, "workload": job["workload"]},
        **job["settings"],
    )
    swapped = _Swapped(llm, job, moves)
    talk.send("ready", seconds=now() - began)
    for word in words:
        command, _, given = word.partition(" ")
        talk.send(command, **getattr(swapped, command)(**json.loads(given or "{}")))


def _record_moves(moves: list[dict[str, Any]]) -> None:
    """Record the duration and the parts of each move."""
    from wooly_vllm.residency.engine_mover import EngineMover

    mover: Any = EngineMover
    for name in ("leave", "come_back"):
        stock = getattr(mover, name)

        @functools.wraps(stock)
        def timed(*args: Any, _stock: Any = stock, **kwargs: Any) -> Any:
            began = now()
            found = _stock(*args, **kwargs)
            moves.append(
                {"move": _stock.__name__, "s": now() - began, "moved": found.moved, "steps": dict(found.steps)}
            )
            return found

        setattr(mover, name, timed)


class _Swapped:
    """The engine, and the commands of a benchmark. Each returns the facts of its event."""

    def __init__(self, llm: Any, job: dict[str, Any], moves: list[dict[str, Any]]) -> None:
        from wooly_vllm.residency.engine import workload_of

        self._engine = llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._workload: Any = workload_of(self._core)
        self._job = job
        self._moves = moves
        self._number = 0
        self._right: list[list[int]] = []

    def facts(self) -> dict[str, Any]:
        """Return which parts of vLLM this engine has, and why it is never swapped (empty: it is)."""
        runner = getattr(self._core.model_executor, "driver_worker", None)
        runner = getattr(getattr(runner, "worker", runner), "model_runner", None)
        return {
            "runner": type(runner).__module__,
            "asynchronous": self._core.batch_queue is not None,
            "refusal": self._row().refusal if self._workload is not None else "no workload",
            "kv_blocks": self._engine.vllm_config.cache_config.num_gpu_blocks,
        }

    def batch(self, swaps: int = 0, first: int = 3) -> dict[str, Any]:
        """Answer the batch, and leave the device ``swaps`` times, at steps evenly spaced from step ``first``.

        The first batch of the process is what later ones are compared with.
        """
        every = max(1, (int(self._job["tokens"]) - first - 2) // max(1, swaps))
        at = {first + every * number for number in range(swaps)}
        answers: dict[str, list[int]] = {}
        found: list[dict[str, Any]] = []
        self._add_all()
        step = 0
        while self._engine.has_unfinished_requests():
            if step in at:
                found.append(self._swap(answers))
            self._step(answers)
            step += 1
        tokens = [answers[name] for name in sorted(answers)]
        self._right = self._right or tokens
        different = sum(one != right for one, right in zip(tokens, self._right, strict=True))
        return {"swaps": found, "different": different, "requests": len(tokens), "steps": step}

    def leave(self) -> dict[str, Any]:
        """Leave the device without requests."""
        self._settle()
        began = now()
        self._move_out()
        return {"s": now() - began, **self._last("leave")}

    def steps(self, seconds: float) -> dict[str, Any]:
        """Decode for some seconds with the whole batch; return the durations of the steps."""
        answers: dict[str, list[int]] = {}
        names = self._add_all(tokens=1 << 20)
        for _ in range(8):  # prompts, and the first steps after them
            self._step(answers)
        found = []
        before = now()
        end = before + seconds
        while before < end and self._engine.has_unfinished_requests():
            self._step(answers)
            ended = now()
            found.append(ended - before)
            before = ended
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests() or self._core.batch_queue:  # also batches in flight
            self._step(answers)
        return {"steps": found}

    def _swap(self, answers: dict[str, list[int]]) -> dict[str, Any]:
        """Leave with all requests running, and make the step that waits for the return."""
        self._settle()
        running = self._core.scheduler.get_request_counts()[0]
        asked = now()
        self._move_out()
        away = now()
        self._step(answers)
        return {
            "running": running,
            "out_s": away - asked,
            "in_s": now() - away,
            "out": self._last("leave"),
            "in": self._last("come_back"),
        }

    def _last(self, move: str) -> dict[str, Any]:
        return next((one for one in reversed(self._moves) if one["move"] == move), {})

    def _move_out(self) -> None:
        from shared_store.client.session import Session

        with Session.connect(name="benchmark", autostart=False) as session:
            session.workloads.move(self._workload.agent.name, out=True)

    def _settle(self) -> None:
        """Wait until the store knows that this engine is resident."""
        deadline = now() + SETTLE_TIMEOUT_S
        while self._row().state != "resident":
            if now() > deadline:
                raise TimeoutError(f"the engine is not resident after {SETTLE_TIMEOUT_S:.0f} s: {self._row()}")
            time.sleep(0.002)

    def _row(self) -> Any:
        from shared_store.client.session import Session

        with Session.connect(name="benchmark", autostart=False) as session:
            return next(one for one in session.status().workloads if one.name == self._workload.agent.name)

    def _add_all(self, tokens: int = 0) -> list[str]:
        """Add the requests of the batch; return their ids."""
        from vllm import SamplingParams

        room = self._engine.vllm_config.model_config.max_model_len - 2 * PROMPT - 1
        wanted = min(tokens or int(self._job["tokens"]), room)
        names = []
        for number in range(int(self._job["batch"])):
            prompt = [10 + (37 * number + 101 * j) % 500 for j in range(PROMPT + 8 * (number % 9))]
            greedy = SamplingParams(temperature=0, max_tokens=wanted, detokenize=False, ignore_eos=True)
            self._number += 1
            names.append(f"{self._number:08d}")
            self._engine.add_request(
                names[-1], {"prompt_token_ids": prompt}, greedy, lora_request=self._adapter(number)
            )
        return names

    def _adapter(self, number: int) -> Any:
        """Return the adapter for every other request, if there is one."""
        if not self._job.get("adapter") or number % 2:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self._job["adapter"])

    def _step(self, answers: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)


def main() -> None:
    """Run the role given on the command line."""
    play({"engine": engine})
