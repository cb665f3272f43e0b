"""``wooly status``."""

import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect

if TYPE_CHECKING:
    from shared_store.base.status import Status
    from shared_store.client.session import Session

INTERVAL_S = 2.0


def command(
    interval_s: Annotated[
        float | None,
        typer.Argument(metavar="SECONDS", min=0.1, show_default=False, help="Interval of --watch.  [default: 2]"),
    ] = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted (Ctrl-C).")] = False,
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
    if interval_s is not None and not watch:
        raise typer.BadParameter("SECONDS goes with --watch")
    with connect(runtime_dir) as session:
        if not watch:
            _show(session.status(), session, as_json=as_json)
            return
        try:
            _watch(session, interval_s or INTERVAL_S, as_json=as_json)
        except KeyboardInterrupt:
            return  # the user ended it


def _show(status: "Status", session: "Session", *, as_json: bool) -> None:
    if as_json:
        render.print_json(status)
    else:
        from shared_store.cli.views import report

        render.console().print(report(status, hide_client=session.client))


def _watch(session: "Session", interval_s: float, *, as_json: bool) -> None:
    pause = threading.Event()
    if as_json or not sys.stdout.isatty():
        while True:
            _show(session.status(), session, as_json=as_json)
            pause.wait(interval_s)
    from rich.live import Live

    from shared_store.cli.views import report

    with Live(console=render.console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(report(session.status(), hide_client=session.client), refresh=True)
            pause.wait(interval_s)
