"""The command line: all commands, and the exit code of an error."""

import sys
from typing import Annotated

import typer

from shared_store.base.errors import WoolyError
from shared_store.cli.compact import command as compact
from shared_store.cli.doctor import command as doctor
from shared_store.cli.events import command as events
from shared_store.cli.models import command as models
from shared_store.cli.pin import command as pin
from shared_store.cli.priority import command as priority
from shared_store.cli.restore import command as restore
from shared_store.cli.rm import command as rm
from shared_store.cli.save import command as save
from shared_store.cli.serve import command as serve
from shared_store.cli.share import command as share
from shared_store.cli.status import command as status
from shared_store.cli.stop import command as stop
from shared_store.cli.swap import command as swap
from shared_store.cli.unpin import command as unpin
from shared_store.cli.upgrade import command as upgrade
from shared_store.cli.verify import command as verify
from shared_store.cli.version import command as version
from shared_store.cli.why import command as why
from shared_store.cli.workloads import command as workloads

app = typer.Typer(
    name="wooly",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: fast, and equal at a terminal and in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve)
app.command("stop")(stop)
app.command("status")(status)
app.command("models")(models)
app.command("workloads")(workloads)
app.command("swap")(swap)
app.command("priority")(priority)
app.command("share")(share)
app.command("why")(why)
app.command("rm")(rm)
app.command("verify")(verify)
app.command("save")(save)
app.command("restore")(restore)
app.command("events")(events)
app.command("upgrade")(upgrade)
app.command("pin")(pin)
app.command("unpin")(unpin)
app.command("compact")(compact)
app.command("doctor")(doctor)
app.command("version")(version)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _wooly(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Share one copy of a model's weights among all processes on this node.

    The store is the process that allocates the memory. Engines connect to it, publish the models that they load, and
    map models that others have published.

    \b
    vllm serve MODEL --load-format wooly    share a model; starts the store if it is not running
    wooly status                            show shared models and their readers
    wooly workloads                         show engines, their memory, and which are swapped out
    wooly doctor                            check this machine for problems
    """  # noqa: D301 - typer's mark for lines that are not wrapped


def main() -> int:
    """Run the command line. Returns the exit code, or raises SystemExit with it."""
    try:
        app(prog_name="wooly")
    except WoolyError as error:
        print(f"wooly: {error} [{error.code}]", file=sys.stderr)
        return error.exit_code
    return 0
