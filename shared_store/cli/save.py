"""``wooly save``."""

from pathlib import Path
from typing import Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, Key, RuntimeDir, connect


def command(
    key: Key,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory to create. Its parent must exist.")],
    *,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Save a model to files.

    `wooly restore` then needs neither the checkpoint nor an engine. Writes the final tensors as safetensors files, and
    wooly.json. The directory appears once everything is on disk. An existing directory is never replaced. A model whose
    bytes do not match their digests is not saved.

    \b
    Example:
      wooly save 3f9a --to /models/llama.wooly
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    from shared_store.cli.progress import progress
    from shared_store.disk.save import save_resident
    from shared_store.transfer.resident import committed

    with connect(runtime_dir) as session:
        model = committed(session.status().models, key)
        with progress("saving", model.bytes, quiet=as_json) as done:
            saved = save_resident(session, model, to, done)
    if as_json:
        render.print_json(saved)
    else:
        print(
            f"saved {saved.name} ({saved.key}) to {saved.directory}: {render.size(saved.bytes)}, {saved.seconds:.1f} s"
        )
