"""``wooly verify``."""

from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.base.errors import DigestMismatchError
from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect

if TYPE_CHECKING:
    from rich.table import Table

    from shared_store.transfer.verify import Verified


def command(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", show_default=False, help="The model's key, or an unambiguous beginning of it."),
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All models.")] = False,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Digest what is resident again, and take out of service what has changed.

    What several models share is digested once. Engines that read a changed blob go on; new ones load it anew. Exit
    code 11: something had changed.

    \b
    Examples:
      wooly verify --all
      wooly verify 3f9a --json | jq '.[].result'
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    if (key is None) != every:
        raise typer.BadParameter("give a KEY, or --all")
    from shared_store.cli.progress import progress
    from shared_store.transfer.resident import committed
    from shared_store.transfer.verify import verify

    with connect(runtime_dir) as session:
        models = session.status().models
        chosen = [model for model in models if model.state == "committed"] if key is None else [committed(models, key)]
        with progress("digesting", sum(model.bytes for model in chosen), quiet=as_json) as done:
            found = list(verify(session, chosen, done))
    if as_json:
        render.print_json(found)
    elif found:
        render.console().print(_table(found))
    else:
        print("the store has no models")
    wrong = [one for one in found if one.result == "mismatch"]
    if wrong:
        raise DigestMismatchError(
            f"{sum(len(one.mismatched) for one in wrong)} blobs are not what their digests say; the models that have "
            "them are out of service, and the next engine that needs one loads it again"
        )


def _table(found: "list[Verified]") -> "Table":
    return render.table(
        ("KEY", "MODEL", "DEVICE", ">BLOBS", ">SIZE", ">SECONDS", "RESULT"),
        [
            (
                *(render.short_key(one.key), one.name, one.device),
                *(str(one.blobs), render.size(one.bytes), f"{one.seconds:.3f}", one.result),
            )
            for one in found
        ],
    )
