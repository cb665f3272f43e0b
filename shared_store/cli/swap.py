"""``wooly swap``."""

import enum
from typing import Annotated

import typer

from shared_store.cli.options import RuntimeDir, WorkloadName, connect_for_workloads


class Direction(enum.StrEnum):
    """Where a workload's memory goes."""

    OUT = "out"
    IN = "in"


def command(
    direction: Annotated[
        Direction,
        typer.Argument(metavar="out|in", help="out: off its devices. in: back.", show_default=False),
    ],
    name: WorkloadName,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the swap is complete.")] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Swap a workload out, or in.

    A workload that is out returns by itself when a request arrives. Running requests are not lost, and go on after the
    return. `wooly swap in` takes memory as a request does: other workloads may have to leave. Exit code 22: the
    workload declined; the message has the reason.

    \b
    Examples:
      wooly swap out chat
      wooly swap in chat --wait
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    out = direction is Direction.OUT
    with connect_for_workloads(runtime_dir) as session:
        session.workloads.move(name, out=out, wait=wait)
    done = ("swapped out" if out else "swapped in") if wait else f"asked to swap {direction.value}"
    print(f"{done}: {name}")
