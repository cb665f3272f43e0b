"""An engine says in its activity page whether it works: hooks around the steps of vLLM's ``EngineCore``.

A step adds two stores to memory. The first step of an engine that shares its weights starts a thread that gets the
page: over the session of a model in the same process, else, where workers are processes of their own, over the session
that speaks for the engine, or one that serves this alone. Steps never wait for the store, and no failure reaches them.

Relies on ``EngineCore.step`` and ``step_with_batch_queue``, of which the engine calls one for each step, and on
``Scheduler.get_request_counts``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from shared_store.activity.writer import ActivityWriter
from shared_store.base.errors import WoolyError
from shared_store.client.session import Session
from wooly_vllm import compat
from wooly_vllm.sharing_loader import SharingLoader, sharing_loader

_sessions: list[weakref.ref[Session]] = []
"""Sessions of models in this process that no engine reports through yet, oldest first."""


def may_report_through(session: Session) -> None:
    """Offer the session of a shared model in this process to its engine."""
    _sessions.append(weakref.ref(session))


def report_through(engine: Any, session: Session) -> None:
    """Let an engine without a model in this process report through a session that speaks for it anyway."""
    vars(engine)[_SPEAKS] = session


_SPEAKS = "_wooly_speaks"


def install_in_engine() -> None:
    """Make engines of this process write activity pages. Idempotent."""
    (core,) = compat.find("vllm.v1.engine.core", "EngineCore")
    compat.find("vllm.v1.core.sched.interface", "SchedulerInterface")
    for name in ("step", "step_with_batch_queue"):
        stock = getattr(core, name)
        if not getattr(stock, "wooly", False):
            setattr(core, name, _reporting(stock))


def _reporting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of ``EngineCore`` that makes one step."""

    @functools.wraps(stock)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        activity = _activity_of(self)
        if activity is None:
            return stock(self, *args, **kwargs)
        activity.writer.begin()
        try:
            return stock(self, *args, **kwargs)
        finally:
            activity.writer.end(*self.scheduler.get_request_counts())

    step.wooly = True  # type: ignore[attr-defined]
    return step


def report(engine: Any) -> None:
    """Say how many requests run and wait, between two steps of an engine."""
    activity = _activity_of(engine)
    if activity is not None:
        activity.writer.end(*engine.scheduler.get_request_counts())


def _activity_of(engine: Any) -> EngineActivity | None:
    """Return an engine's activity; None if it does not share weights."""
    own = vars(engine)
    if "_wooly_activity" not in own:
        loader = sharing_loader(engine.vllm_config)
        counts = getattr(engine.scheduler, "get_request_counts", None)  # of a scheduler class of the user's, too
        own["_wooly_activity"] = None if loader is None or counts is None else EngineActivity(engine, loader)
    found: EngineActivity | None = own["_wooly_activity"]
    return found


class EngineActivity:
    """The activity of one engine.

    Attributes:
        writer: of its page; before there is one, it writes to memory of its own.
    """

    def __init__(self, engine: Any, loader: SharingLoader) -> None:
        """Begin to get a page, in the background."""
        self.writer = ActivityWriter()
        self._session = _take_session() or vars(engine).get(_SPEAKS)
        self._runtime_dir = loader.options.runtime_dir
        self._name = f"vllm {engine.vllm_config.model_config.model}"
        threading.Thread(target=self._get_page, name="wooly-activity", daemon=True).start()

    def _get_page(self) -> None:
        try:
            session = self._session
            if session is None:
                session = self._session = Session.connect(
                    self._runtime_dir, name=self._name, autostart=False, kind="vllm"
                )
                weakref.finalize(self, session.close)
            session.report_activity(self.writer)
        except WoolyError as error:
            compat.logger().info("wooly: the store does not show this engine's activity: %s [%s]", error, error.code)


def _take_session() -> Session | None:
    """Take a session of a model in this process that is connected, the oldest first."""
    while _sessions:
        with contextlib.suppress(IndexError):  # another engine's thread took the last one
            session = _sessions.pop(0)()
            if session is not None and session.alive:
                return session
    return None
