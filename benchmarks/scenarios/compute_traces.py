"""Engines and their requests for the simulated devices of ``compute_sim``, and other ways to share a device.

Steps, slices and turns are measurements of one H100 (``docs/decisions/0032-turns.md`` lists them). How often requests
come, how long they are, and the pauses between steps are assumed, and stated here. Equal seeds give equal traces.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from support.compute_world import Decide, Work, World

from shared_store.compute.decision import Decision, History, Kind, Permit, Settings, Snapshot, decide

DECODE_S = 1.73e-3
"""A step that decodes."""

PREFILL_S = 22.7e-3
"""A step of long prompts."""

PROMPT_S = 10e-3
"""What the prompt of a request adds to a step."""

TOKENS = 64
"""Tokens of a request."""

DEVICE = "gpu"


@dataclass
class Stream:
    """Steps of one length, always. A step is a token."""

    step_s: float

    def step(self, now: float) -> float:
        """Return the length of the next step."""
        del now
        return self.step_s

    def ended(self, now: float) -> None:
        """Take no note."""


@dataclass
class Requests:
    """Requests that come at random; their tokens are decoded together, and a prompt is computed beside them.

    Attributes:
        arrivals: seconds, in order.
        first: seconds from each request to its first token.
        between: seconds between tokens of one request.
    """

    arrivals: deque[float]
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    running: list[tuple[int, float]] = field(default_factory=list)
    comes: float | None = None

    def step(self, now: float) -> float | None:
        """Return the length of the next step; None: no request is there."""
        self.comes = self.arrivals.popleft() if self.arrivals and self.arrivals[0] <= now else None
        if self.comes is None and not self.running:
            return None
        return (DECODE_S if self.running else 0.0) + (PROMPT_S if self.comes is not None else 0.0)

    def ended(self, now: float) -> None:
        """Take note of the tokens of a step."""
        self.between += [now - last for _, last in self.running]
        self.running = [(left - 1, now) for left, _ in self.running if left > 1]
        if self.comes is not None:
            self.first.append(now - self.comes)
            self.running.append((TOKENS - 1, now))
            self.comes = None

    def bind(self, world: World, number: int) -> None:
        """Let the workload see its requests."""
        for at in self.arrivals:
            world.at(at, lambda: world.wake(number))


def poisson(chance: random.Random, load: float, seconds: float) -> Requests:
    """Return requests that use a fraction of the device, each alone."""
    rate = load / (PROMPT_S + (TOKENS - 1) * DECODE_S)
    arrivals: deque[float] = deque()
    at = chance.expovariate(rate)
    while at < seconds:
        arrivals.append(at)
        at += chance.expovariate(rate)
    return Requests(arrivals)


def work(number: int, priority: int, source: Stream | Requests, *, share: float = 0.0, gap_s: float = 0.0) -> Work:
    """Return a workload on the device."""
    return Work(number, priority, (DEVICE,), source.step, source.ended, share=share, gap_s=gap_s)


def strict(snapshot: Snapshot, settings: Settings, now: float) -> Decision:
    """Let one step begin at a time, in the order in which workloads began to wait."""
    del settings
    permits = {member.number: Permit(Kind.HELD) for member in snapshot.members}
    granted = {number: at for number, at in snapshot.history.forced.items() if number in permits}
    waiting = [(member.held_since, member.number) for member in snapshot.members if member.held_since is not None]
    pending = {number: granted[number] for since, number in waiting if granted.get(number, since - 1) >= since}
    if not pending and waiting and not any(member.in_flight for member in snapshot.members):
        pending = {min(waiting)[1]: now}
    permits |= {number: Permit(Kind.ONE_STEP, at) for number, at in pending.items()}
    return Decision(permits, history=History(now, forced=granted | pending))


WAYS: dict[str, tuple[Decide | None, Settings]] = {
    "free": (None, Settings()),
    "turns": (strict, Settings()),
    "hold_0": (decide, Settings()),
    "hold_2": (decide, Settings(max_hold_s=2.0)),
}
"""Ways to share a device: as the driver does, one step after the other, and this arbiter."""

Source = Callable[[], Stream | Requests]
