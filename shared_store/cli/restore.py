"""``wooly restore``."""

from pathlib import Path
from typing import Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that `wooly save` wrote.")],
    *,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu, or a GPU's UUID as in nvidia-smi -L.  [default: the device it was saved from]",
        ),
    ] = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Restore a saved model into the store, under its key.

    Every byte that is read is compared with its digest. Tensors that the store has already are not read. Engines on
    that device then attach to the model instead of loading it. The store must be running.

    \b
    Examples:
      wooly serve --detach && wooly restore /models/llama.wooly
      wooly restore /models/llama.wooly --json
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    from shared_store.cli.progress import progress
    from shared_store.disk.restore import restore_resident
    from shared_store.disk.saved import SavedModel

    with (
        SavedModel(directory) as saved,
        connect(runtime_dir) as session,
        progress("restoring", saved.nbytes, quiet=as_json) as done,
    ):
        found = restore_resident(session, saved, device or saved.manifest.device, done)
    if as_json:
        render.print_json(found)
    elif found.result == "resident":
        print(f"{found.name} ({found.key}) is in the store already; nothing was read")
    else:
        print(f"restored {found.name} ({found.key}): {render.size(found.bytes_read)} read, {found.seconds:.1f} s")
