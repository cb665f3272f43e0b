"""``wooly compact``."""

from typing import Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(
    *,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="cpu, or a GPU by its UUID.  [default: every device]"),
    ] = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Pack models that nobody reads into less memory.

    A tensor that several models share keeps all of its segment in memory when the other tensors there have gone, and a
    small model takes 2 MiB at least. This copies what is left into full segments, and frees the old ones. Segments that
    somebody maps stay. An idle store does it by itself in host memory; GPU memory needs this command, on that machine.

    \b
    Examples:
      wooly compact
      wooly compact --device cpu --json | jq '.[].freed_bytes'
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    from shared_store.client.compact import compact

    with connect(runtime_dir) as session:
        devices = [device] if device else [one.id for one in session.status().devices]
        done = [compact(session, one) for one in devices]
    if as_json:
        render.print_json([one._asdict() for one in done])
        return
    rows = [(one.device, str(one.segments), render.size(one.moved_bytes), render.size(one.freed_bytes)) for one in done]
    render.console().print(render.table(("DEVICE", ">SEGMENTS MADE", ">MOVED", ">FREED"), rows))
