"""Options that are read and refused in the words of the library, and how errors end a command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import typer

from densenet_ext import checks


def option(help: str, metavar: str, kind: type, check: Callable[..., Any], *limits: Any) -> Any:
    """An option whose text is read as ``kind``; ``check`` refuses what is wrong."""

    def parse(text: Any) -> Any:
        with contextlib.suppress(ValueError):  # what is no number stays a text, for the check to refuse
            text = kind(text)
        try:
            return check("", text, *limits)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error).removeprefix(": ")) from error

    return typer.Option(parser=parse, metavar=metavar, help=help)


def choice(help: str, choices: tuple[str, ...]) -> Any:
    """An option that takes one of ``choices``."""
    return option(help, "|".join(choices), str, checks.choice, choices)


SAVE = choice("What blocks keep for the backward pass.", checks.LEVELS)


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the command with a sentence instead of a traceback: exit code 2 for the user's errors, 1 for others."""
    try:
        from densenet_ext.training.errors import LossError, LostError, TrainingError, UserError
        from densenet_ext.training.interruption import Interrupted

        # All processes raise these.
        everywhere: tuple[type[Exception], ...] = (UserError, LossError, LostError, Interrupted)
        try:
            yield
        except (UserError, TrainingError, Interrupted) as error:
            code = error.exit_code if isinstance(error, Interrupted) else 2 if isinstance(error, UserError) else 1
            rank = int(os.environ.get("RANK", "0"))
            if rank == 0 or not isinstance(error, everywhere):
                where = f" in process {rank}" if rank else ""
                word = "" if isinstance(error, Interrupted) else f"Error{where}: "
                typer.echo(f"{word}{error}", err=True)
            raise typer.Exit(code) from error
    except ModuleNotFoundError as error:
        typer.echo(f"Error: this needs {error.name}: pip install 'densenet_ext[train]'", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("stopped at once: what the last checkpoint holds is kept", err=True)
        raise typer.Exit(130) from error
