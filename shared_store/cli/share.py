"""``wooly share``."""

from typing import Annotated

import typer

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.cli.options import RuntimeDir, WorkloadName, connect_for_workloads


def command(
    name: WorkloadName,
    percent: Annotated[
        str,
        typer.Argument(
            metavar="PERCENT", help="1 to 100, or 0 for an equal part of what the others leave.", show_default=False
        ),
    ],
    *,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Set the share of a workload in its devices' time.

    Workloads of one priority on one device are held to their shares while they all have work. What one does not use,
    the others get. It lasts until the workload ends.

    \b
    Example:
      wooly share chat 75
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    try:
        share = envs.COMPUTE_SHARE.parse(percent)
    except ValueError as error:
        raise ConfigError(f"share {percent!r}: {error}") from error
    with connect_for_workloads(runtime_dir) as session:
        session.workloads.set_share(name, share)
    print(f"{name} has a share of {share:g}%" if share else f"{name} has an equal part")
