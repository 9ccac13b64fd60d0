"""The command line: ``densenet-ext`` and ``python -m densenet_ext``.

What the user got wrong ends with exit code 2, what went wrong with 1, Ctrl-C and SIGTERM with 130 and 143.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from densenet_ext.arguments import integer
from densenet_ext.errors import Ended, Interrupted
from densenet_ext.memory import command as planning
from densenet_ext.training.options import ASKED, flag


def train(out: Path | None, resume: bool, download: bool, **given: Any) -> None:
    """Trains a DenseNet on images: the paper's recipe unless options say otherwise.

    The recipe is SGD with Nesterov momentum 0.9, weight decay 1e-4 and a learning rate that is divided by 10 at 50 %
    and 75 % of the epochs. Ctrl-C and SIGTERM save and leave; --resume goes on to the same numbers. Several processes:
    torchrun --nproc-per-node N -m densenet_ext train ...
    """
    from densenet_ext.training import running

    running.train(given, out, resume, download)


def compare(seeds: int, out: Path | None, download: bool, **given: Any) -> None:
    """Trains a DenseNet fused and unfused, side by side, and shows the difference in results, time and memory.

    Both forms start from the same weights and go through the same batches, step by step in turns, with the recipe of
    densenet-ext train. Their difference, seed by seed, comes as a table, as a picture and as files.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at the first profile: PyTorch's profiler else announces it
    from densenet_ext.compare import command

    command.compare(given, seeds, out, download)


def reuse(**asked: Any) -> None:
    """Draws how strongly each layer of a DenseNet uses each earlier one, from the weights in a checkpoint.

    This is figure 5 of the paper (Huang et al. 2017), for the checkpoint of any library.
    """
    from densenet_ext.reuse import command

    print(command.reuse(**asked))


def plan(**asked: Any) -> None:
    """Prints what a training step needs in memory at each level of saving, without running it."""
    print(planning.plan(**asked))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("densenet-ext", description="DenseNets over one buffer per dense block.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Any) -> Any:
        words = command.__doc__
        one = commands.add_parser(
            command.__name__, help=words.partition("\n")[0], description=words, allow_abbrev=False
        )
        one.set_defaults(command=command)
        return one.add_argument

    for command in (train, compare):
        argument = add(command)
        for name, asked in ASKED.items():
            if asked["compared"] or command is train:
                argument(flag(name), default=None, **asked["argument"])
        argument("--download", action="store_true", help="Let CIFAR be downloaded into --root.")
        argument("--out", type=Path, help="Folder of the run. Default: a new one below runs.")
        if command is train:
            argument("--resume", action="store_true", help="Go on with the run in --out, with its options.")
        else:
            argument("--seeds", default=5, help="Train with seeds 0 to N - 1. Default: 5.", **integer(1))
    argument = add(reuse)
    argument("checkpoint", type=Path, help="Of any DenseNet, from torch.save or as .safetensors.")
    argument("--out", type=Path, help="The picture: .png, .svg or .pdf. Default: beside the checkpoint.")
    argument("--new-first", action="store_true", help="Layers put new features first; libraries append them.")
    planning.add_arguments(add(plan))
    return parser


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the process with a sentence instead of a traceback, for what happens to a run from outside."""
    rank = int(os.environ.get("RANK", "0"))

    def end(words: object, code: int, error: BaseException) -> NoReturn:
        word = "" if code > 128 else "Error: " if rank == 0 else f"Error in process {rank}: "
        print(f"{word}{words}", file=sys.stderr)
        raise SystemExit(code) from error

    try:
        yield
    except Ended as error:
        if rank == 0 or not error.everywhere:
            end(error, error.exit_code, error)
        if not isinstance(error, Interrupted):
            # Where one process has ended torchrun ends all, and the first one may still have the sentence to say.
            time.sleep(10)
        raise SystemExit(error.exit_code) from error
    except ModuleNotFoundError as error:
        end(f"this needs {error.name}: pip install 'densenet_ext[train]'", 1, error)
    except KeyboardInterrupt as error:
        end("stopped at once; the last checkpoint is kept", 130, error)
    except (OSError, RuntimeError) as error:
        # The DataLoader raises a RuntimeError when the signal arrives that a worker has died, wherever the process is
        # then; a connection is reset when a batch is on its way out of a worker whose end is not known yet.
        words = f"DataLoader worker ended: {error}" if isinstance(error, ConnectionResetError) else str(error)
        if "DataLoader worker" in words:
            words += " (try fewer --workers; the last checkpoint is kept)"
        elif isinstance(error, RuntimeError):
            raise
        end(words, 1, error)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command that ``words`` ask for, by default those of the command line. Raises SystemExit if it fails."""
    asked = vars(_parser().parse_args(words))
    command = asked.pop("command")
    with errors_told():
        command(**asked)
