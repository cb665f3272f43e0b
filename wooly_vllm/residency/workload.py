"""An engine as a workload of the store: joins before its workers exist, takes memory, and says when it is there.

A store that does not list workloads, or none that answers, changes nothing for an engine: it starts and serves as ever.
Memory that the store cannot grant in time is an error, which says which workloads have it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from shared_store.base import envs
from shared_store.base.errors import ConfigError, ExclusiveError, OutOfMemoryError, TimedOutError, WoolyError
from shared_store.client.session import Session
from shared_store.compute import mps
from shared_store.overcommit.agent import Agent
from shared_store.overcommit.mover import Holdings
from shared_store.protocol.messages.identity import Identity
from wooly_vllm import compat
from wooly_vllm.residency import activity, exemptions, needs, refusals
from wooly_vllm.residency.engine_mover import EngineMover
from wooly_vllm.residency.gate import Gate
from wooly_vllm.sharing_loader import SharingLoader

GUARDED = ("collective_rpc", "execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids")
"""Methods of an executor that reach workers."""


class EngineWorkload:
    """One engine.

    Attributes:
        agent: speaks for it.
        gate: its gate; None before it has started.
    """

    def __init__(self, vllm_config: Any, loader: SharingLoader) -> None:
        """Describe an engine that will start. Nothing is connected."""
        self._config = vllm_config
        self._loader = loader
        self._mover = EngineMover()
        self._refusal = refusals.by_configuration(vllm_config)
        self._exemption = exemptions.by_process() or exemptions.by_configuration(vllm_config)
        self.gate: Gate | None = None
        self._session: Session | None = None
        self.agent = Agent(
            self._connect,
            self._mover,
            kind="vllm",
            name=str(vllm_config.model_config.served_model_name or vllm_config.model_config.model),
            devices=needs.devices_of(vllm_config),
            refusal=self._refusal,
            settings=loader.options.workload_settings,
        )

    def _connect(self, identity: Identity) -> Session:
        options, name = self._loader.options, f"vllm {self._config.model_config.model}"
        self._session = Session.connect(options.runtime_dir, name=name, identity=identity)
        return self._session

    def take_room(self) -> None:
        """Join, and wait for the memory of a start.

        Raises:
            ConfigError: a setting of the workload cannot be obeyed here.
            TimedOutError: there was none in time. The message says which workloads have it.
            OutOfMemoryError: there will never be so much.
            ExclusiveError: a workload has the devices for itself, or this one would, and others use them.
        """
        mps.cap(self.agent.devices)  # CUDA starts with the workers, which do not exist yet
        try:
            self.agent.join()
        except (ConfigError, ExclusiveError):
            raise
        except WoolyError as error:
            compat.logger().warning("wooly: this engine starts without a store: %s [%s]", error, error.code)
            return
        if not self.agent.listed:
            return
        room = needs.of_a_start(self._config, self._loader)
        waited = self._wait_for(room, "start")
        if waited > 1.0:
            compat.logger().info("wooly: this engine waited %.1f s for memory to start", waited)

    def _wait_for(self, room: dict[str, int], purpose: str) -> float:
        def progress(reason: str) -> None:
            compat.logger().info("wooly: waiting for memory to %s: %s", purpose, reason)

        if self.agent.devices != ("cpu",) and not compat.swaps_on_gpus():
            return 0.0  # memory of GPUs is not granted by measure yet
        try:
            return self.agent.take_room(room, envs.START_TIMEOUT.get(), progress)
        except (TimedOutError, OutOfMemoryError, ExclusiveError):
            raise
        except WoolyError as error:
            compat.logger().warning("wooly: this engine does not wait for memory: %s [%s]", error, error.code)
            return 0.0

    @contextlib.contextmanager
    def members(self) -> Iterator[None]:
        """Let processes and sessions that are made in this context belong to the workload."""
        name, before = envs.MEMBER_OF.name, os.environ.get(envs.MEMBER_OF.name)
        os.environ[name] = self.agent.workload
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before

    def is_all_of_this_process(self) -> None:
        """Let every later session of this process belong to the workload."""
        os.environ[envs.MEMBER_OF.name] = self.agent.workload

    def started(self, engine: Any) -> None:
        """Make the engine swappable, or say why it is not, and end the grant of its start."""
        refusal = self._refusal or refusals.by_parts(engine)
        found = weakref.ref(engine)
        if self._session is not None:
            activity.report_through(engine, self._session)
        exemption = self._exemption or exemptions.by_parts(engine)
        self.gate = Gate(engine, self.agent, lambda: activity.report(found()), exemption)
        if refusal:
            self.agent.refuse(refusal)
            compat.logger().warning("wooly: this engine cannot be swapped out: %s", refusal)
        self.gate.guard(engine.model_executor, GUARDED)
        self._mover.attach(self.gate, refusal)
        self.agent.joined_resident()
        if exemption:
            compat.logger().info("wooly: this engine is never held for others: %s", exemption)
        self.agent.compute(self.gate.turns.compute, exemption)

    def offer_checkpoints(self) -> None:
        """Let the store have the engine's processes taken off their GPU while it is swapped, if they may be.

        Only for an engine in a process of its own: in its caller's, any code may call CUDA.
        """
        if self._refusal or len(self.agent.devices) != 1 or self.agent.devices == ("cpu",):
            return
        if self._config.parallel_config.data_parallel_size > 1:
            return  # engines share the process that started them
        self.agent.offer_checkpoints(self._loader.options.runtime_dir or envs.RUNTIME_DIR.get())

    def close(self) -> None:
        """Leave the store. Idempotent."""
        if self.gate is not None:
            self.gate.boundary.close()
            self.gate.turns.close()
        self.agent.close()

    # vLLM's sleep mode.

    def fell_asleep(self) -> None:
        """Say that the user put the engine to sleep: it stays away until it is woken up."""
        self.agent.left_by_itself()

    def take_room_to_wake(self) -> None:
        """Wait for the memory of an engine that its user put to sleep. Raises as :meth:`take_room` does."""
        if self.agent.listed and self.agent.asleep:
            self._wait_for(dict(self._mover.holdings().needs), "wake up")

    def woke_up(self) -> None:
        """Say that all of the engine is back."""
        self.agent.joined_resident()


class ListedEngine:
    """An engine that does not share its weights: a running store lists it, and never swaps it out."""

    def __init__(self, vllm_config: Any) -> None:
        """Join in the background, if a store runs. Nothing that fails reaches the engine."""
        self._config = vllm_config
        self._agent: Agent | None = None
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._join, name="wooly-list", daemon=True).start()

    def _join(self) -> None:
        config = self._config
        try:
            agent = Agent(
                self._connect,
                EngineMover(),
                kind="vllm",
                name=str(config.model_config.served_model_name or config.model_config.model),
                devices=needs.devices_of(config),
                refusal=f"its weights are not shared (load format {config.load_config.load_format})",
            )
            agent.join()
        except (WoolyError, AttributeError, OSError, RuntimeError, ValueError) as error:  # of a platform, too
            compat.logger().debug("wooly: no store lists this engine: %s", error)
            return
        agent.joined_resident(Holdings())
        with self._lock:
            self._agent = agent
            closed = self._closed
        if closed:
            agent.close()

    def _connect(self, identity: Identity) -> Session:
        name = f"vllm {self._config.model_config.model}"
        return Session.connect(name=name, identity=identity, autostart=False, timeout_s=_LIST_TIMEOUT_S)

    def close(self) -> None:
        """Leave the store. Idempotent."""
        with self._lock:
            self._closed, agent = True, self._agent
        if agent is not None:
            agent.close()


_LIST_TIMEOUT_S = 2.0
