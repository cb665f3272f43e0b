"""``wooly save``."""

from pathlib import Path
from typing import Annotated

import typer

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The model's key, or an unambiguous beginning of it.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The directory to make; its parent must be there.")],
    *,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Save a model as it is in the store, to be restored without its checkpoint.

    Writes safetensors files and wooly.json. The directory appears when all of it is on the disk, and nothing is ever
    replaced. What is not what its digest says is not saved.

    \b
    Example:
      wooly save 3f9a --to /models/llama.wooly
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
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
