"""Options that are read and refused in the words of the library, and how errors end a command."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from densenet_ext import checks
from densenet_ext.training.options import SETTINGS, Setting, flag


def option(help: str, metavar: str, kind: type, check: Callable[..., Any], *limits: Any) -> Any:
    """Returns an option whose text is read as ``kind``; ``check`` refuses what is wrong."""

    def parse(text: Any) -> Any:
        with contextlib.suppress(ValueError):  # what is no number stays a text, for the check to refuse
            text = kind(text)
        try:
            return check("", text, *limits)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error).removeprefix(": ")) from error

    return typer.Option(parser=parse, metavar=metavar, help=help)


SAVE = option("What blocks keep for the backward pass.", "|".join(checks.LEVELS), str, checks.choice, checks.LEVELS)


def with_options(command: Callable[..., None], compared: bool = False) -> Callable[..., None]:
    """Returns ``command`` with an option for every field of Options (``compared``: those that compare has).

    Its first argument gets those that the command line sets, by name.
    """
    names = [name for name, setting in SETTINGS.items() if setting.compared or not compared]

    @functools.wraps(command)
    def call(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        with errors_told():
            command(given, **values)

    _, *others = inspect.signature(command, eval_str=True).parameters.values()
    asked = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, setting))
        for name, setting in SETTINGS.items()
        if name in names
    ]
    parameters = [*asked, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in others)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call


def _annotation(name: str, setting: Setting) -> Any:
    if setting.kind is bool:
        shown = typer.Option(f"{flag(name)}/--no-{name.replace('_', '-')}", help=setting.help)
    elif setting.check is None:
        shown = typer.Option(help=setting.help, metavar=setting.metavar)
    else:
        shown = option(setting.help, setting.metavar, setting.kind, setting.check, *setting.limits)
    return Annotated[setting.kind | None, shown]


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the command with a sentence instead of a traceback: exit code 2 for the user's errors, 1 for others."""
    from densenet_ext.training.errors import Ended, TrainingError

    try:
        try:
            yield
        except RuntimeError as error:
            # The DataLoader raises it when the signal arrives that a worker has died, wherever the process is then.
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a process that loads images has died, probably for want of memory: {error}; try fewer --workers; "
                "the last checkpoint is kept"
            ) from error
    except Ended as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not error.everywhere:
            word = "" if error.exit_code > 128 else "Error: " if rank == 0 else f"Error in process {rank}: "
            typer.echo(f"{word}{error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except ModuleNotFoundError as error:
        typer.echo(f"Error: this needs {error.name}: pip install 'densenet_ext[train]'", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("stopped at once: what the last checkpoint holds is kept", err=True)
        raise typer.Exit(130) from error
