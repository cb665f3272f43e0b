"""Clients: the connected processes, and the private bytes that they report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Client:
    """A connected process. ``private_bytes``: by model key, bytes that it holds privately, as it reports them."""

    number: int
    pid: int
    uid: int
    name: str
    private_bytes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a form for log lines."""
        return f"client {self.number} (pid {self.pid})"
