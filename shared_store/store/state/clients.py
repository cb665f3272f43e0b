"""Clients: the connected processes, and the private bytes that they report."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared_store.protocol.messages.identity import Identity


@dataclass
class Client:
    """A connected process.

    Attributes:
        number: of the connection.
        pid: 0 if the process is in another PID namespace.
        uid: its user id.
        name: printable and of bounded length.
        groups: its group ids.
        identity: its description of itself, cleaned.
        private_bytes: by model key, bytes that it has in private memory, as it reports them.
    """

    number: int
    pid: int
    uid: int
    name: str
    groups: frozenset[int] = frozenset()
    identity: Identity = field(default_factory=Identity)
    private_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def pid_known(self) -> bool:
        """True if ``pid`` is a number of this store's PID namespace."""
        return self.pid > 0

    @property
    def process(self) -> str:
        """The process for people: its pid, or the pod that it runs in, or ``unknown``."""
        return f"pid {self.pid}" if self.pid_known else self.identity.place or "process unknown"

    def __str__(self) -> str:
        """Return a form for log lines."""
        return f"client {self.number} ({self.process})"
