"""Processes that are workloads: each has an agent and holds memory, which leaves and returns. See `workload_main`."""

from __future__ import annotations

from support.actors import Actor


class Workload(Actor):
    """A workload that a test drives step by step, and may stop or kill at any of them."""

    MAIN = "workload_main.py"
