"""``wooly why``."""

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, WorkloadName, connect_for_workloads


def command(name: WorkloadName, *, as_json: Json = False, runtime_dir: RuntimeDir = None) -> None:
    """Explain a workload's state: what it waits for, the workloads that have it, and what would help.

    That is memory, or its devices' time: the workloads for which it is held.

    \b
    Example:
      wooly why chat
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    with connect_for_workloads(runtime_dir) as session:
        found = session.workloads.explain(name)
    if as_json:
        render.print_json({"lines": found.lines, "blocked_by": found.blocked_by})
        return
    for line in found.lines:
        print(render.plain(line))
