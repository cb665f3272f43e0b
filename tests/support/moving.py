"""Commands of `engine.py` that move the worker of its engine off its device and back, between steps.

The engine is in this process. Each command takes one word of JSON and returns facts for the test.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [[7 + number, *range(10, 40 + 11 * (number % 4))] for number in range(4)]
STEPS = 40


def run(llm: Any, what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run a command: a method of `Moving`."""
    found: dict[str, Any] = getattr(Moving(llm), what)(**given)
    return found


class Moving:
    """An engine whose worker moves."""

    def __init__(self, llm: Any) -> None:
        from vllm.v1.core.sched.interface import PauseState

        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.pause = PauseState
        self.answers: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.moves: list[dict[str, Any]] = []
        self._move: Callable[..., None] = self.move

    def facts(self) -> dict[str, Any]:
        """Return what the worker has, and where its KV cache is."""
        mover = self._mover()
        runner = self._worker().model_runner
        return {
            **self._rpc("wooly_holdings"),
            "runner": type(runner).__module__,
            "asynchronous": self.core.batch_queue is not None,
            "blocks": self.engine.vllm_config.cache_config.num_gpu_blocks,
            "tables": len(mover._blocks),
            "ranges": [[it.address, it.nbytes] for it in mover.memory._ranges],
        }

    def answer(
        self,
        moves: tuple[int, ...] = (),
        *,
        fresh: bool = True,
        prompts: list[list[int]] | None = None,
        copies: int = 1,
        **how: Any,
    ) -> dict[str, Any]:
        """Answer prompts in one batch, and move at these steps.

        Args:
            moves: numbers of steps.
            fresh: without cached prefixes.
            prompts: other prompts.
            copies: how often each is asked.
            how: arguments of :meth:`move`.
        """
        if fresh:
            assert self.core.reset_prefix_cache() is not False
        for number, prompt in enumerate((prompts or PROMPTS) * copies):
            self._add(str(number), prompt)
        step = 0
        while self.engine.has_unfinished_requests():
            self._take(self.engine.step())
            step += 1
            if step in moves:
                self._move(**how)
        numbers = sorted(self.answers, key=int)
        return {
            "tokens": [self.answers[number] for number in numbers],
            "cached": [self.cached[number] for number in numbers],
            "moves": self.moves,
        }

    def idle(self, **how: Any) -> dict[str, Any]:
        """Move while nothing runs."""
        self.move(**how)
        return self.moves[0]

    def leave(self) -> dict[str, Any]:
        """Leave while nothing runs, and stay away."""
        self.scheduler.set_pause_state(self.pause.PAUSED_ALL)
        assert not self._rpc("wooly_save", [])
        left: dict[str, Any] = self._rpc("wooly_leave")
        self.core.reset_prefix_cache()
        return left

    def come_back(self) -> dict[str, Any]:
        """Return after :meth:`leave`."""
        assert not self._rpc("wooly_create")
        filled: dict[str, Any] = self._rpc("wooly_fill")
        self.scheduler.set_pause_state(self.pause.UNPAUSED)
        return filled

    def move(
        self,
        *,
        save: bool = True,
        most: int = 1 << 30,
        poison: bool = True,
        corrupt: bool = False,
        file_limit: int = 0,
        refused_returns: int = 0,
    ) -> None:
        """Leave and return at a step boundary.

        Args:
            save: False saves no block: a control.
            most: blocks to save, running requests' first.
            poison: memory that returns is full of ones where it is not restored or zeroed.
            corrupt: change a byte of the swap file.
            file_limit: largest file that this process may write while it leaves; 0: no limit.
            refused_returns: how often memory cannot be had on the return.
        """
        from wooly_vllm.residency import blocks

        self._drain()
        kept = blocks.choose(self.pool, most)
        facts: dict[str, Any] = {"kept": len(kept.ids), "running": kept.running, "dropped": len(kept.dropped)}
        self.moves.append(facts)
        before = _descriptors()
        with _file_limit(file_limit):
            facts["refused"] = self._rpc("wooly_prepare_leave", len(kept.ids)) or self._rpc(
                "wooly_save", kept.ids if save else []
            )
        if facts["refused"]:
            self._rpc("wooly_stay")
        else:
            blocks.drop(self.pool, kept.dropped)
            facts["resident"] = self._resident()
            facts["left"] = self._rpc("wooly_leave")
            facts["resident_away"] = self._resident()
            facts["weights_away"] = _weights()
            facts["swap_files"] = len(_swap_files())
            if corrupt:
                self._corrupt()
            facts["refusals"] = [self._refused_return() for _ in range(refused_returns)]
            facts["created"] = self._rpc("wooly_create")
            if poison:
                self._poison()
            facts["filled"] = self._rpc("wooly_fill")
            if facts["filled"]["lost"]:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
                blocks.drop_all(self.pool)
        facts["more_descriptors"] = _descriptors() - before
        self.scheduler.set_pause_state(self.pause.UNPAUSED)

    def ranks(self, moves: tuple[int, ...] = (), *, refuse: str = "") -> dict[str, Any]:
        """Answer as :meth:`answer` does, and move all workers of a tensor parallel engine at these steps.

        Args:
            moves: numbers of steps.
            refuse: the second worker may write no file while workers ``save``, or gets no memory when they ``create``.
        """
        self._move = lambda: self._move_ranks(refuse)
        return self.answer(moves)

    def _move_ranks(self, refuse: str) -> None:
        from wooly_vllm.residency import blocks

        self._drain()
        facts: dict[str, Any] = {}
        self.moves.append(facts)
        kept = blocks.choose(self.pool, 1 << 30)
        facts["saved"] = self._refusing(refuse == "save", "wooly_save", kept.ids)
        if any(facts["saved"]):
            self.core.collective_rpc("wooly_stay")
        else:
            facts["left"] = self.core.collective_rpc("wooly_leave")
            facts["created"] = self._refusing(refuse == "create", "wooly_create")
            if any(facts["created"]):
                self.core.collective_rpc("wooly_roll_back")
                facts["rolled_back"] = [it["private"] for it in self.core.collective_rpc("wooly_holdings")]
                facts["created"] = self.core.collective_rpc("wooly_create")
            facts["filled"] = self.core.collective_rpc("wooly_fill")
        self.scheduler.set_pause_state(self.pause.UNPAUSED)

    def _refusing(self, refuse: bool, method: str, *args: Any) -> list[Any]:
        """Call a method of all workers. ``refuse``: the second can make no file meanwhile."""
        if not refuse:
            return list(self.core.collective_rpc(method, args=args))
        pid = self.core.model_executor.workers[1].proc.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            return list(self.core.collective_rpc(method, args=args))
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def _drain(self) -> None:
        self.scheduler.set_pause_state(self.pause.PAUSED_ALL)
        while self.core.batch_queue:
            self._take(self.engine.step())

    def _refused_return(self) -> str:
        """Return with a limit that refuses the memory; return the reason."""
        with _file_limit(4096):
            reason: str = self._rpc("wooly_create")
        assert self._resident() == 0
        return reason

    def _poison(self) -> None:
        """Fill the memory that returned with ones, as another process's memory might be."""
        mover = self._mover()
        mover.memory.backend.zeroed = False
        for table in (*mover._blocks, *mover._others):
            table.memory.fill_(0xFF)

    def _corrupt(self) -> None:
        (path,) = _swap_files()
        with path.open("r+b", buffering=0) as file:
            file.seek(1000)
            byte = file.read(1)
            file.seek(1000)
            file.write(bytes([byte[0] ^ 1]))

    def _resident(self) -> int:
        """Return the bytes of the worker's ranges that have memory: on a CPU by the kernel (``smaps``)."""
        from support.mapped import resident_bytes

        memory = self._mover().memory
        if memory.backend.ordinal is not None:
            return memory.mapped_bytes
        return sum(resident_bytes(it.address, it.nbytes) for it in memory._ranges)

    def _mover(self) -> Any:
        from wooly_vllm.residency.move import Mover

        return Mover.of(self._worker())

    def _worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    def _rpc(self, method: str, *args: Any) -> Any:
        (result,) = self.core.collective_rpc(method, args=args)
        return result

    def _add(self, name: str, prompt: list[int]) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=STEPS, detokenize=False, ignore_eos=True)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)

    def _take(self, outputs: Any) -> None:
        for output in outputs:
            self.answers[output.request_id] = list(output.outputs[0].token_ids)
            self.cached[output.request_id] = output.num_cached_tokens or 0


class _file_limit:  # noqa: N801 - reads as a function
    """Within the block, files (memfds too) of this process cannot be larger."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.nbytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.nbytes, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _swap_files() -> list[Path]:
    """Return the paths, under ``/proc``, of files in the swap directory that this process writes."""
    directory = os.environ.get("WOOLY_SWAP_DIR", "/var/tmp")
    open_files = Path("/proc/self/fd").iterdir()
    return [
        path
        for path in open_files
        if path.is_symlink() and str(path.readlink()).startswith(directory) and _writes(path)
    ]


def _writes(path: Path) -> bool:
    """Whether a descriptor may write: those of weights only read."""
    flags = Path(f"/proc/self/fdinfo/{path.name}").read_text().split("flags:")[1].split()[0]
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _weights() -> dict[str, int]:
    """Return what the store has of shared weights in host memory and in files, and the readers that are away."""
    from shared_store.client.session import Session

    with Session.connect(autostart=False) as session:
        models = session.status().models
    return {
        "resident": sum(model.resident_bytes for model in models),
        "disk": sum(model.disk_bytes for model in models),
        "away": sum(model.away for model in models),
    }
