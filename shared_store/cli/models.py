"""``wooly models``."""

from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect


def command(*, as_json: Json = False, runtime_dir: RuntimeDir = None) -> None:
    """List the models in the store.

    SIZE is the size of a model's tensors, UNIQUE the part that no other model shares, READERS the number of processes
    that map it, AWAY the number of its readers that sleep. RESIDENT, HOST and DISK are its bytes on its device, in host
    copies, and in files alone. A model without readers is evicted when memory is needed, unless it is PINNED.

    \b
    Examples:
      wooly models
      wooly models --json | jq -r '.[].key'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    with connect(runtime_dir) as session:
        found = session.status().models
    if as_json:
        render.print_json(found)
    elif found:
        from shared_store.cli import views

        render.console().print(views.models(found))
    else:
        print("the store has no models; an engine with `--load-format wooly` publishes the model that it loads")
