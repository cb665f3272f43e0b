"""``wooly models``."""

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(*, as_json: Json = False, runtime_dir: RuntimeDir = None) -> None:
    """List the models in the store.

    SIZE is what a model's tensors take; UNIQUE, how much of it no other model has. One that
    nobody reads leaves when its room is needed, unless it is PINNED.

    \b
    Examples:
      wooly models
      wooly models --json | jq -r '.[].key'
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    with connect(runtime_dir) as session:
        found = session.status().models
    if as_json:
        render.print_json(found)
    elif found:
        from shared_store.cli import views

        render.console().print(views.models(found))
    else:
        print("the store has no models; an engine with `--load-format wooly` publishes what it loads")
