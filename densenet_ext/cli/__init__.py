"""The command line: ``densenet-ext`` and ``python -m densenet_ext``, a file for each command.

What the user got wrong ends with exit code 2, what went wrong with 1.
"""

from __future__ import annotations

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("densenet-ext: the command line needs typer: pip install 'densenet_ext[train]'") from error

from densenet_ext.cli.arguments import with_options
from densenet_ext.cli.plan import plan
from densenet_ext.cli.reuse import reuse
from densenet_ext.cli.training import compare, train

app = typer.Typer(
    help="DenseNets over one buffer per dense block.", no_args_is_help=True, pretty_exceptions_enable=False
)
for _command in (with_options(train), with_options(compare, compared=True), reuse, plan):
    app.command()(_command)


def main() -> None:
    """Runs the command line: the entry point of ``densenet-ext`` and of ``python -m densenet_ext``."""
    app(prog_name="densenet-ext")
