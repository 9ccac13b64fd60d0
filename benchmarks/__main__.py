"""The command line of the benchmarks.

On the processor: ``python -m benchmarks`` measures training steps, time and memory, and its commands ``workloads``
small and large batches and inference, ``roofline`` single kernels, ``profile`` what a step consists of, ``depth``
networks of up to 3,298 layers, ``host`` the time in front of the kernels. On a GPU: ``networks`` and ``kernels``.
``python -m benchmarks table`` writes the figures of all of them into the pages.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is loaded: the profiler else announces every session

import torch
import typer

from benchmarks import depth, gpu_table, host, kernels, networks, peers, profile, roofline, table, workloads
from benchmarks.run import run
from densenet_ext import kernels as dx_kernels
from densenet_ext.errors import UserError
from densenet_ext.figures import check_picture

BATCH = Annotated[int, typer.Option(min=1, help="Images of a call.")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Choice(str, Enum):
    """What ``--network`` takes."""

    bc100 = "bc100"
    densenet121 = "densenet121"
    both = "both"


MEASURED = ("bc100", "densenet121")


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
    for name in MEASURED if network is Choice.both else [network.value]:
        chosen = peers.NETWORKS[name]
        chosen = chosen._replace(batch=batch_size or chosen.batch, image=image or chosen.image)
        start = time.perf_counter()
        typer.echo(f"{chosen.title}, {chosen.image}x{chosen.image}, batch {chosen.batch}", err=True)
        runs[name] = run(chosen, rounds, efficient, compiled, lambda text: typer.echo(f"  {text}", err=True))
        typer.echo(f"  took {time.perf_counter() - start:.0f} s", err=True)
        out.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
        for render in table.RENDERERS.values():
            typer.echo(f"\n{render({name: runs[name]})}")


DEVICE = Annotated[str, typer.Option(help="Where to measure: cuda, cuda:N or cpu.")]
SECONDS = Annotated[float, typer.Option(min=1, help="Starts nothing new after so many; the essential comes first.")]
OUT = Annotated[Path, typer.Option(help="Results file, written anew.")]


@app.command("kernels")
def measure_kernels(
    device: DEVICE = "cuda",
    seconds: SECONDS = 120.0,
    out: OUT = table.FOLDER / "gpu-kernels.json",
    batch_size: BATCH = 64,
) -> None:
    """Every operator at the shapes of DenseNet-121, DenseNet-201 and DenseNet-BC-100: time, bytes, share of a copy."""
    chosen = [peers.NETWORKS[name]._replace(batch=batch_size) for name in ("densenet121", "densenet201", "bc100")]
    where, save = _device(device), _saving(out)
    found = kernels.run(chosen, where, seconds, _say, save)
    typer.echo(gpu_table.kernels(found))


@app.command("networks")
def measure_networks(
    device: DEVICE = "cuda",
    seconds: SECONDS = 3600.0,
    out: OUT = table.FOLDER / "gpu-networks.json",
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = networks.ROUNDS,
    try_algorithms: Annotated[bool, typer.Option(help="cuDNN chooses its algorithms by trying them.")] = False,
) -> None:
    """Whole networks, training and inference, against torchvision's, compiled ones and CUDA graphs; peak memory."""
    where, save = _device(device), _saving(out)
    found = networks.run(networks.cases(), where, seconds, _say, save, rounds, try_algorithms)
    typer.echo(gpu_table.networks(found))


@app.command("workloads")
def measure_workloads(
    only: Annotated[str, typer.Option(help="Those whose network or mode has this in its name.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of everybody.")] = 2,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="With torch.compile.")] = True,
    seconds: SECONDS = 7200.0,
    out: Annotated[Path, typer.Option(help="Results file, written anew.")] = table.FOLDER / "cpu-workloads.json",
) -> None:
    """Training and inference at small and large batches, in both dtypes, against PyTorch, ONNX Runtime, OpenVINO."""
    torch.set_num_threads(threads)
    chosen = [each for each in workloads.WORKLOADS if only in each.network or only in each.mode]
    found = workloads.run(chosen, rounds, compiled, _say, _saving(out), seconds)
    typer.echo(workloads.table(found))


@app.command("roofline")
def measure_roofline(
    threads: Annotated[int, typer.Option(min=1, help="Threads beside one alone.")] = 2,
    shortest: Annotated[float, typer.Option(min=0, help="Seconds of a case's calls, three at least.")] = 0.1,
    out: Annotated[Path, typer.Option(help="Results file, written anew.")] = table.FOLDER / "cpu-roofline.json",
) -> None:
    """Every kernel of the processor: flops, bytes, time, its share of the machine's best product and copy."""
    found = roofline.run(roofline.CHOSEN, sorted({1, threads}), shortest, _say, _saving(out))
    typer.echo(roofline.table(found))


@app.command("profile")
def measure_profile(
    steps: Annotated[int, typer.Option(min=1, help="Profiled steps, after two others.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    out: Annotated[Path, typer.Option(help="Results file, written anew.")] = table.FOLDER / "cpu-profile.json",
) -> None:
    """Which operator takes what share of a training step and of an inference."""
    torch.set_num_threads(threads)
    chosen = [peers.NETWORKS[name] for name in MEASURED]
    typer.echo(profile.table(profile.run(chosen, steps, _say, _saving(out))))


@app.command("depth")
def measure_depth(
    deepest: Annotated[int, typer.Option(min=40, help="No deeper networks than this.")] = 3298,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the two levels of saving.")] = 7,
    batch_size: BATCH = 64,
    image: Annotated[int, typer.Option(min=8, help="Height and width.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    out: Annotated[Path, typer.Option(help="Results file; an interrupted run goes on.")] = table.FOLDER
    / "cpu-depth.json",
    picture: Annotated[Path, typer.Option(help="Where to draw.")] = table.ROOT / "docs" / "pictures" / "depth.png",
) -> None:
    """DenseNet-BC of 40 to 3,298 layers: time and memory of a step; both levels of saving."""
    save = _saving(out)
    try:
        earlier = depth.earlier_of(out)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from error
    try:
        check_picture(picture)
    except UserError as error:
        raise typer.BadParameter(str(error), param_hint="'--picture'") from error
    chosen = [each for each in depth.DEPTHS if each.layers <= deepest]
    found = depth.run(chosen, earlier, rounds, batch_size, image, threads, _say, save)
    depth.draw(found, picture)
    typer.echo(depth.table(found))


@app.command("host")
def measure_host(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 25,
    out: Annotated[Path, typer.Option(help="Results file, written anew.")] = table.FOLDER / "cpu-host.json",
) -> None:
    """What a call costs before and between its kernels, in one thread, against PyTorch; the time of plan."""
    save = _saving(out)
    try:
        found = host.run(rounds, _say)
    except peers.Unavailable as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    save(found)
    typer.echo(host.table(found))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"expected cuda, cuda:N or cpu, got {name!r}", param_hint="'--device'") from error
    missing = dx_kernels.why_plain(device)
    if missing is not None:
        raise typer.BadParameter(f"nothing to measure on {name}: {missing}", param_hint="'--device'")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _saving(out: Path) -> Callable[[dict[str, Any]], None]:
    """Writes results to ``out``, whole or not at all: the process may be ended at any time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="'--out'") from error

    def save(found: dict[str, Any]) -> None:
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(out)

    return save


@app.command("table")
def write_table(
    results: Annotated[Path, typer.Option(help="Results file.")] = table.RESULTS,
    root: Annotated[Path, typer.Option(help="Folder of README.md and docs.")] = table.ROOT,
) -> None:
    """Writes the tables of the results file, and of a GPU's and a comparison's beside it, into README.md and docs/."""
    try:
        tables = table.of_results(results)
        old = {page: (root / page).read_text(encoding="utf-8") for page in table.PAGES}
        new = {page: table.rewrite(page, text, tables) for page, text in old.items()}
        for page, text in new.items():  # none before all are made
            (root / page).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    for page in table.PAGES:
        typer.echo(f"{page}: {'unchanged' if new[page] == old[page] else 'tables rewritten'}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
