"""The program of a store that reports unreachable objects, and the classes that no test may find among them."""

from __future__ import annotations

from pathlib import Path

PROGRAM = (str(Path(__file__).with_name("cycles_store_main.py")),)
OF_A_CONVERSATION = (
    *("Connection", "Exchange", "_Running", "Pending", "Session", "Asking", "_Asked", "Tickets"),
    *("Decoder", "Outbox", "ProcessWatch", "OwnedFds", "Client"),
)
