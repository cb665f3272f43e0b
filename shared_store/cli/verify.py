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
        typer.Argument(
            metavar="KEY",
            show_default=False,
            help="Key of the model, or an unambiguous prefix. `wooly models` lists the keys.",
        ),
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Verify all models.")] = False,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Re-digest resident blobs; quarantine mismatches.

    Compares the tensors in memory (blobs) with their digests from publication. A blob that several models share is
    digested once. After a mismatch, the models that contain it are withdrawn: current engines keep their mappings, new
    engines load the model again. Exit code 11: a mismatch was found.

    \b
    Examples:
      wooly verify --all
      wooly verify 3f9a --json | jq '.[].result'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    if (key is None) != every:
        raise typer.BadParameter("pass a KEY, or --all")
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
            f"{sum(len(one.mismatched) for one in wrong)} blobs do not match their digests; the models that contain "
            "them are withdrawn, and the next engine that needs one loads it again"
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
