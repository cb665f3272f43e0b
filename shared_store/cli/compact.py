"""``wooly compact``."""

from typing import Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(
    *,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="DEVICE", help="cpu, or a GPU's UUID as in nvidia-smi -L.  [default: all devices]"
        ),
    ] = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Compact the segments of idle models.

    The store allocates memory in segments of at least 2 MiB. A segment is freed only when all of its tensors are gone,
    so one tensor that other models share can occupy a large segment. This command copies the remaining tensors into
    full segments, and frees the old ones. Segments with readers are skipped. An idle store compacts host memory by
    itself (`wooly serve --compact-share`). GPU memory needs this command, with cuda-bindings installed.

    \b
    Examples:
      wooly compact
      wooly compact --device cpu --json | jq '.[].freed_bytes'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    from shared_store.client.compact import compact

    with connect(runtime_dir) as session:
        devices = [device] if device else [one.id for one in session.status().devices]
        done = [compact(session, one) for one in devices]
    if as_json:
        render.print_json([one._asdict() for one in done])
        return
    rows = [(one.device, str(one.segments), render.size(one.moved_bytes), render.size(one.freed_bytes)) for one in done]
    render.console().print(render.table(("DEVICE", ">NEW SEGMENTS", ">MOVED", ">FREED"), rows))
