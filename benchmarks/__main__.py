"""``python -m benchmarks`` measures; ``python -m benchmarks table`` writes the figures into README.md."""

from __future__ import annotations

import json
import os
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is loaded: the profiler else announces every session

import torch
import typer

from benchmarks import peers, table
from benchmarks.run import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Choice(str, Enum):
    """What ``--network`` takes."""

    bc100 = "bc100"
    densenet121 = "densenet121"
    both = "both"


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    network: Annotated[Choice, typer.Option(help="What to measure.")] = Choice.both,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the network's own.")] = None,
    image: Annotated[int | None, typer.Option(min=8, help="Height and width, instead of the network's own.")] = None,
    efficient: Annotated[Path | None, typer.Option(help="A clone of gpleiss/efficient_densenet_pytorch.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="With torch.compile.")] = True,
    out: Annotated[Path, typer.Option(help="Results file; it keeps other networks' figures.")] = table.RESULTS,
) -> None:
    """Training steps in float32: seconds, bytes kept for the backward pass, peak; ours against the others'."""
    if context.invoked_subcommand is not None:
        return
    if efficient is not None and not (efficient / "models" / "densenet.py").is_file():
        raise typer.BadParameter("expected a folder with models/densenet.py", param_hint="'--efficient'")
    try:
        runs = table.load(out) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from error
    torch.set_num_threads(threads)
    for name in peers.NETWORKS if network is Choice.both else [network.value]:
        chosen = peers.NETWORKS[name]
        chosen = chosen._replace(batch=batch_size or chosen.batch, image=image or chosen.image)
        start = time.perf_counter()
        typer.echo(f"{chosen.title}, {chosen.image}x{chosen.image}, batch {chosen.batch}", err=True)
        runs[name] = run(chosen, rounds, efficient, compiled, lambda text: typer.echo(f"  {text}", err=True))
        typer.echo(f"  took {time.perf_counter() - start:.0f} s", err=True)
        out.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
        for render in table.RENDERERS.values():
            typer.echo(f"\n{render({name: runs[name]})}")


@app.command("table")
def write_table(
    results: Annotated[Path, typer.Option(help="Results file.")] = table.RESULTS,
    readme: Annotated[Path, typer.Option(help="Where the markers stand.")] = table.README,
) -> None:
    """Writes the tables of a results file into README.md, between their markers."""
    try:
        old = readme.read_text(encoding="utf-8")
        new = table.rewrite(old, table.load(results))
        readme.write_text(new, encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{readme.name}: {'unchanged' if new == old else 'tables rewritten'}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
