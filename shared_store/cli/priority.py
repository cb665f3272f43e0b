"""``wooly priority``."""

from typing import Annotated

import typer

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.cli.options import RuntimeDir, WorkloadName, connect_for_workloads


def command(
    name: WorkloadName,
    priority: Annotated[str, typer.Argument(metavar="P", help="0 (highest) to 4, or P0 to P4.", show_default=False)],
    *,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Set the priority of a workload.

    It lasts until the workload ends. `wooly serve --max-priority` may limit it for the workload's user.

    \b
    Example:
      wooly priority chat 2
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    try:
        number = envs.PRIORITY.parse(priority)
    except ValueError as error:
        raise ConfigError(f"priority {priority!r}: {error}") from error
    with connect_for_workloads(runtime_dir) as session:
        session.workloads.set_priority(name, number)
    print(f"{name} has priority P{number}")
