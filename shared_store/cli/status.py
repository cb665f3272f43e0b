"""``wooly status``."""

from typing import TYPE_CHECKING

from shared_store.cli.options import Json, RuntimeDir, connect
from shared_store.cli.refresh import Interval, Watch, check, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shared_store.base.status import Status


def command(
    interval_s: Interval = None,
    *,
    watch: Watch = False,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show the store's state, memory, models and clients.

    The line "shared" has the bytes that clients map, the bytes in memory, and the bytes saved by sharing. Columns: DEAD
    is memory of removed tensors, which compaction frees; PADDING is unused space between tensors; HOST COPIES are
    copies in host memory for readers that sleep (AWAY); UNIQUE is the part of a model that no other model shares;
    MAPPED and PRIVATE are shared and private bytes of a client.

    \b
    Examples:
      wooly status
      wooly status --watch 5
      wooly status --json | jq .totals.saved_bytes
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    check(watch=watch, interval_s=interval_s)
    with connect(runtime_dir) as session:

        def view(status: "Status") -> "RenderableType":
            from shared_store.cli.views import report

            return report(status, hide_client=session.client)

        show(session.status, view, watch=watch, interval_s=interval_s, as_json=as_json)
