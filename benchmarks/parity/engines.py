"""The engine processes of one lane, and their store."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import MIB
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, ChildError, end_all
from benchmarks.parity.judge import Outcome, brief, judge
from benchmarks.parity.machine import Machine
from benchmarks.parity.rows import Row
from shared_store.base.errors import StoreUnavailableError

ROLES = {"stock": "auto", "publisher": "wooly", "reader": "wooly"}
"""Load formats of a row's engines, in the order in which they load."""
LEFT_MIB = 1024
"""A process whose engines leave more GPU memory allocated than this gets no further rows."""
IMPORT_TIMEOUT_S = 600
WORKER = "parity-worker"


class Engines:
    """One process for each role, reused for rows of the same kind.

    Dense and sparse models do not share a process: vLLM makes its groups for experts with a process's first model.
    """

    def __init__(self, machine: Machine, device: str, logs: Path | None, *, unproven: bool) -> None:
        """Start nothing yet.

        Args:
            machine: The machine that runs the rows.
            device: GPU of the processes, as in ``CUDA_VISIBLE_DEVICES``.
            logs: Directory to copy their logs to.
            unproven: The option of wooly's loader.
        """
        self._machine, self._device, self._logs, self._unproven = machine, device, logs, unproven
        self._node = Node(WORKER)
        self._living: dict[str, Child] = {}
        self._sparse: bool | None = None
        self.versions: dict[str, str] = {}
        self.used = False

    def compare(self, row: Row, checkpoint: Path, timeout_s: float) -> Outcome:
        """Run the engines of a row, stock first, and compare their answers."""
        if row.sparse != self._sparse:
            self.end()
            self._sparse = row.sparse
        self._start(ROLES)
        deadline = time.monotonic() + timeout_s
        answers: dict[str, list[dict[str, Any]]] = {}
        role = "stock"
        try:
            answers["stock"] = [self._answer(row, "stock", checkpoint, deadline), self._free("stock", deadline)]
            for role in ("publisher", "reader"):
                answers[role] = [self._answer(row, role, checkpoint, deadline)]
            for role in ("reader", "publisher"):
                answers[role].append(self._free(role, deadline))
        except ChildError as error:
            self.end([role] if role == "stock" else ["publisher", "reader"])
            return Outcome("stock-failed" if role == "stock" else "failed", brief(str(error)))
        self._remove_models()
        self.used = True
        return judge(answers, embeds=row.embeds)

    def renew(self) -> None:
        """Continue with new processes and a new store."""
        self.close()
        self._node = Node(WORKER)

    def close(self) -> None:
        """End all processes and the store."""
        self.end()
        self._node.close()

    def end(self, roles: Iterable[str] = ROLES) -> None:
        """End processes. The next row starts them again."""
        end_all(self._living.pop(role) for role in list(roles) if role in self._living)
        self.used = bool(self._living) and self.used
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            for log in self._node.scratch.glob("*.log"):
                shutil.copyfile(log, self._logs / f"{self._node.scratch.name}-{log.name}")

    def _start(self, roles: Iterable[str]) -> None:
        """Start missing processes at the same time: importing vLLM takes longest."""
        missing = [role for role in roles if role not in self._living]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self._machine.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = self._device
        for role in missing:
            self._living[role] = self._node.launch(role, role, {}, **environment)
        for role in missing:
            self.versions = self._living[role].wait("imported", IMPORT_TIMEOUT_S)["versions"]

    def _answer(self, row: Row, role: str, checkpoint: Path, deadline: float) -> dict[str, Any]:
        job = {
            "model": str(checkpoint),
            "load_format": ROLES[role],
            "extra": {"unproven": True} if self._unproven and ROLES[role] == "wooly" else {},
            "settings": row.settings(on_gpu=self._machine.on_gpu),
            "embeds": row.embeds,
        }
        return self._living[role].ask(json.dumps(job), "answered", deadline - time.monotonic())

    def _free(self, role: str, deadline: float) -> dict[str, Any]:
        freed = self._living[role].ask("free", "freed", deadline - time.monotonic())
        if freed["left_bytes"] > LEFT_MIB * MIB:
            self.end([role])
        return freed

    def _remove_models(self) -> None:
        """Remove all models, so that the next row publishes even if it shares a model with this one."""
        with (
            contextlib.suppress(StoreUnavailableError),  # no model was shared yet, so no store was started
            self._node.session() as session,
        ):
            for model in session.status().models:
                if model.state == "committed" and not model.readers:
                    session.remove(model.key)
