"""Questions about a whole GPU, answered by ``nvidia-smi``: CUDA answers them only to a process with a context.

Does not promise an answer: in a container ``nvidia-smi`` may be missing, and may not see processes outside.
"""

from __future__ import annotations

import subprocess

_MEBIBYTE = 1 << 20
_TIMEOUT_S = 10


def free_bytes(device: str) -> int:
    """Return the free bytes of a GPU by its UUID; 0 without an answer."""
    return int(_query("--query-gpu=memory.free", device) or 0) * _MEBIBYTE


def usage(device: str) -> str:
    """Describe which processes use a GPU's memory, for an error message."""
    return describe(_query("--query-compute-apps=pid,used_memory", device))


def describe(rows: str) -> str:
    """Describe processes from lines of ``pid, MiB``, as ``nvidia-smi`` writes them."""
    users = [[part.strip() for part in row.split(",")] for row in rows.splitlines()]
    if not users:
        return "and nvidia-smi names no process that uses it (in a container it may not see them: ask it on the host)"
    amounts = (f"pid {pid} ({used} MiB)" if used.isdigit() else f"pid {pid} (amount unknown)" for pid, used in users)
    return f"the rest is used by {', '.join(amounts)}"


def _query(query: str, device: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", device]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # the callers have a text for this
