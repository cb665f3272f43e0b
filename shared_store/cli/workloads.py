"""``wooly workloads``."""

from typing import TYPE_CHECKING

from shared_store.cli.options import Json, RuntimeDir, connect_for_workloads
from shared_store.cli.refresh import Interval, Watch, check, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shared_store.base.status import Status
    from shared_store.base.workloads import Workloads


def command(
    interval_s: Interval = None,
    *,
    watch: Watch = False,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """List the workloads, and the memory that they share.

    A workload is an engine with all its processes, or a transformers process. STATE is where its memory is; PRIVATE and
    SHARED are its bytes on its devices, AWAY those that it lacks until it returns. WAITS FOR has the workloads whose
    memory it waits for. SHARE is of its devices' time among workloads of its priority, USED what it had of that time in
    the last 10 seconds, DEVICE TIME what it used in all (~: a part is estimated), HELD how long it was held for others.
    FREE is what could be granted now, beside the reserve. Below the table are the reasons of those that wait, are held,
    or are never swapped out or held.

    \b
    Examples:
      wooly workloads
      wooly workloads --watch 1
      wooly workloads --json | jq -r '.workloads[] | select(.state == "swapped") | .name'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    check(watch=watch, interval_s=interval_s)
    with connect_for_workloads(runtime_dir) as session:
        show(session.status, _view, watch=watch, interval_s=interval_s, as_json=as_json, json=_json)


def _json(status: "Status") -> "Workloads":
    from shared_store.base.workloads import Workloads

    return Workloads(workloads=status.workloads)


def _view(status: "Status") -> "RenderableType":
    from shared_store.cli.workload_views import report

    return report(status.workloads, status.devices)
