"""Whole networks on a GPU: training and inference, ours against the others', interleaved in one process.

Cases are ordered by importance, so that a short time gives the essential ones; within a case everybody starts from the
same weights, is weighed alone, and then runs in turns. What runs out of memory is a result, not an end.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks import measure, peers
from benchmarks.graphs import Captured
from benchmarks.peers import COMPILED, LAYOUTS, PLAIN, Contender, Network, Unavailable
from benchmarks.run import Say, copy_state, machine

ROUNDS = 5
AUTOTUNED = "torch.compile, max-autotune"
GRAPH = ", CUDA graph"
OUT_OF_MEMORY = "OOM"
# Seconds that a contender needs before it runs for the first time, about, for a network of 121 layers.
PREPARATION = {COMPILED: 90.0, AUTOTUNED: 400.0}
# Each measurement takes at least so long, with as many calls as that needs.
SHORTEST = 0.03


class Case(NamedTuple):
    """What is measured."""

    network: Network  # with its batch
    training: bool
    dtype: torch.dtype  # bfloat16: autocast
    compiled: bool = False  # torch.compile against the best of the others, which takes minutes

    @property
    def key(self) -> str:
        """One text that tells it from every other case."""
        precision = str(self.dtype).removeprefix("torch.")
        mode = "training" if self.training else "inference"
        end = ", compiled" if self.compiled else ""
        return f"{self.network.name}, {mode}, {precision}, batch {self.network.batch}{end}"


def cases() -> list[Case]:
    """All cases, the most important first: large batches of DenseNet-121 in bfloat16, then what most people run."""
    bf16, f32 = torch.bfloat16, torch.float32

    def case(name: str, training: bool, dtype: torch.dtype, batch: int, compiled: bool = False) -> Case:
        return Case(peers.NETWORKS[name]._replace(batch=batch), training, dtype, compiled)

    essential = [
        case("densenet121", True, bf16, 256),
        case("densenet121", True, bf16, 64),
        case("densenet121", False, bf16, 256),
        case("densenet121", True, f32, 64),
        case("densenet121", False, bf16, 1),
        case("bc100", True, bf16, 64),
        case("densenet201", True, bf16, 64),
        case("densenet264", True, bf16, 64),
        case("densenet121", True, bf16, 1),
        case("bc100", True, f32, 64),
        case("densenet121", True, bf16, 64, compiled=True),
        case("densenet121", False, bf16, 64, compiled=True),
    ]
    every = [
        case(name, training, dtype, batch)
        for batch in (64, 256, 16, 1)
        for dtype in (bf16, f32)
        for training in (True, False)
        for name in ("densenet121", "densenet201", "densenet264", "bc100")
    ]
    more = [case(name, True, bf16, 64, compiled=True) for name in ("densenet201", "densenet264", "bc100")]
    return list(dict.fromkeys([*essential, *every, *more]))


def contenders(case: Case) -> Iterator[Contender]:
    """Who is measured in a case. Those with a graph come last: it holds its memory as long as it lives.

    The usual network is torchvision's; where that is missing, and for 32x32 images, a look-alike of the efficient
    implementation's in the same formulation.
    """
    found = list(peers.contenders(case.network, compiled=False))
    whose = next((c.who for c in found if not c.ours and usable(c)), peers.LOOK_ALIKE)
    plain = [c for c in found if c.who == whose and c.how == PLAIN]
    if case.compiled:
        fastest = next(c for c in plain if c.layout == "channels_last")
        yield from (c for c in found if c.who == "densenet_ext" and c.layout == "channels_last")
        yield fastest
        yield fastest._replace(how=COMPILED, build=lambda: compiled(fastest.build(), "default"))
        yield fastest._replace(how=AUTOTUNED, build=lambda: compiled(fastest.build(), "max-autotune"))
        return
    ours = [c for c in found if c.who == "densenet_ext" and (case.training or c.how == peers.LEVELS[0])]
    efficient = [c for c in found if c.who == whose and c.how != PLAIN and case.training]
    yield from (*ours, *plain, *efficient)
    for contender in (*ours, *plain):
        if contender.layout == "channels_last":
            yield contender._replace(how=contender.how + GRAPH)


def usable(contender: Contender) -> bool:
    """Whether its network can be built here."""
    try:
        with torch.device("meta"):
            contender.build()
    except Unavailable:
        return False
    return True


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """``model``, compiled in place: its parameters keep their names."""
    torch._dynamo.reset()  # it stops compiling code that it has seen in too many forms
    model.compile(mode=mode)
    return model


class Prepared:
    """A contender that has its weights, has run and is weighed."""

    def __init__(self, case: Case, contender: Contender, weights: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.contender, self.device = contender, images.device
        self.start_bytes = _allocated(self.device)
        with self.device:
            model = contender.build()
        copy_state(weights, model)
        layout = LAYOUTS[contender.layout]
        model.to(memory_format=layout)  # type: ignore[call-overload]  # torch leaves this keyword out of its types
        images = images.contiguous(memory_format=layout)
        autocast = None if case.dtype == torch.float32 else case.dtype
        call: Callable[[], object]
        if case.training:
            call = measure.Step(model, images, labels, autocast)
        else:
            call = measure.Inference(model, images, autocast)
        if contender.how.endswith(GRAPH):
            call = Captured(call)
        self.call = call
        for _ in range(2):
            call()  # compiles, chooses algorithms, allocates the optimizer's state
        self.peak_bytes = self._peak()
        seconds = measure.seconds(call, self.device)
        self.repeats = max(1, math.ceil(SHORTEST / seconds))
        self.seconds = seconds * self.repeats  # about, of one measurement

    def _peak(self) -> int | None:
        """Bytes: the most that is allocated in a call, over what was there before this contender was built."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        if not isinstance(self.call, Captured):  # a graph's memory was allocated when it was captured
            torch.cuda.reset_peak_memory_stats(self.device)
            self.call()
        return torch.cuda.max_memory_allocated(self.device) - self.start_bytes

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self.call()


def _allocated(device: torch.device) -> int:
    """Bytes that are allocated on ``device``; also makes it the start of what "peak" looks back at."""
    _free_memory(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def run_case(case: Case, device: torch.device, end: float, rounds: int, say: Say) -> dict[str, Any]:
    """Measures everybody in ``case``; ``end``: the time (monotonic) after which nothing new is prepared."""
    network = case.network
    torch.manual_seed(0)
    images = torch.randn(network.batch, 3, network.image, network.image, device=device)
    labels = torch.randint(network.num_classes, (network.batch,), device=device)
    with device:
        weights = next(peers.contenders(network)).build()
    prepared: dict[str, Prepared] = {}
    skipped: list[dict[str, str]] = []
    for contender in contenders(case):
        left = end - time.monotonic()
        needed = PREPARATION.get(contender.how, 0.0)
        try:
            if left < needed or left <= 0:
                raise Unavailable(f"needs about {needed:.0f} s, {max(left, 0):.0f} s were left")
            prepared[contender.name] = _prepare(case, contender, weights, images, labels)
        except Unavailable as error:
            skipped.append({"contender": contender.name, "reason": str(error)})
            say(f"  {contender.name}: {error}")
    if not prepared:
        return _result(case, 0, {}, {}, skipped)
    once = sum(made.seconds for made in prepared.values())
    rounds = max(2, min(rounds, int((end - time.monotonic()) / max(once, 1e-9))))
    theirs = [name for name, made in prepared.items() if not made.contender.ours]
    try:
        times = _interleave(prepared, rounds, theirs, device)
    except torch.OutOfMemoryError:
        graphs = [name for name, made in prepared.items() if made.contender.how.endswith(GRAPH)]
        if not graphs:
            raise
    else:
        graphs = []
    if graphs:  # each had room alone, and what they hold is missing to the others
        for name in graphs:
            del prepared[name]
            skipped.append({"contender": name, "reason": f"{OUT_OF_MEMORY} beside the others"})
        _free_memory(device)
        times = _interleave(prepared, rounds, [name for name in theirs if name not in graphs], device)
    return _result(case, rounds, prepared, times, skipped)


def _interleave(
    prepared: dict[str, Prepared], rounds: int, theirs: Sequence[str], device: torch.device
) -> dict[str, list[float | None]]:
    steps = cast(dict[str, Callable[[], object]], prepared)
    return measure.interleave(steps, rounds, theirs, lambda call: measure.seconds(call, device))


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _prepare(case: Case, contender: Contender, weights: nn.Module, images: Tensor, labels: Tensor) -> Prepared:
    """Raises Unavailable with a reason that can be shown; what the attempt has allocated is free again."""
    try:
        return Prepared(case, contender, weights, images, labels)
    except torch.OutOfMemoryError:
        reason = OUT_OF_MEMORY  # the error holds the frames, and these what they allocated, until this block ends
    except Unavailable:
        raise
    except Exception as error:  # whatever a compiler may raise; for the others a capture that fails
        if contender.how not in PREPARATION and not contender.how.endswith(GRAPH):
            raise
        reason = peers.reason(error)
    _free_memory(images.device)
    raise Unavailable(reason)


def _result(
    case: Case,
    rounds: int,
    prepared: dict[str, Prepared],
    times: dict[str, list[float | None]],
    skipped: list[dict[str, str]],
) -> dict[str, Any]:
    peers_of_it = [name for name, made in prepared.items() if not made.contender.ours]
    return {
        "title": case.network.title,
        "network": case.network.name,
        "training": case.training,
        "dtype": str(case.dtype).removeprefix("torch."),
        "autocast": case.dtype != torch.float32,
        "tf32": torch.backends.cudnn.allow_tf32,
        "batch": case.network.batch,
        "image": case.network.image,
        "rounds": rounds,
        "baseline": next((name for name in peers_of_it if prepared[name].contender.how == PLAIN), None),
        "rows": [_row(case, made, times[name], times) for name, made in prepared.items()],
        "skipped": skipped,
    }


def _row(
    case: Case, made: Prepared, mine: Sequence[float | None], times: dict[str, list[float | None]]
) -> dict[str, Any]:
    """One contender's figures; ``ratios``: its time over that of each of ours in channels_last, paired in rounds."""
    contender, seconds = made.contender, measure.median(mine) / made.repeats
    ratios = {}
    for save in peers.LEVELS:
        reference = times.get(f"densenet_ext, {save}, channels_last")
        if reference is not None:
            ratios[save] = measure.ratio(mine, reference)
    return {
        "contender": contender.name,
        "who": contender.who,
        "how": contender.how,
        "layout": contender.layout,
        "ours": contender.ours,
        "seconds": seconds,
        "seconds_per_round": [None if value is None else value / made.repeats for value in mine],
        "repeats": made.repeats,
        "images_per_second": round(case.network.batch / seconds, 2),
        "ratios": {save: ratio._asdict() for save, ratio in ratios.items()},
        "peak_bytes": made.peak_bytes,
    }


def run(
    chosen: Sequence[Case],
    device: torch.device,
    seconds: float,
    say: Say,
    save: Callable[[dict[str, Any]], None],
    rounds: int = ROUNDS,
    try_algorithms: bool = False,
) -> dict[str, Any]:
    """Measures the cases in their order for at most about ``seconds``; returns a results file.

    ``save`` is called with what there is after every case. ``try_algorithms``: cuDNN chooses its algorithms by trying
    them, for everybody, which takes much of a short time.
    """
    end = time.monotonic() + seconds
    torch.backends.cudnn.benchmark = try_algorithms
    found: dict[str, Any] = {"machine": machine(device), "cudnn_benchmark": try_algorithms, "runs": {}, "left_out": 0}
    gc.collect()
    gc.freeze()  # every measurement collects garbage, and what is alive by now need not be looked through each time
    try:
        for case in chosen:
            if time.monotonic() > end:
                found["left_out"] += 1
                continue
            start = time.monotonic()
            say(case.key)
            try:
                found["runs"][case.key] = run_case(case, device, end, rounds, say)
            except torch.OutOfMemoryError:
                nobody = [{"contender": "everybody", "reason": OUT_OF_MEMORY}]
                found["runs"][case.key] = _result(case, 0, {}, {}, nobody)
            say(f"  took {time.monotonic() - start:.0f} s")
            save(found)
    finally:
        gc.unfreeze()
    save(found)
    return found
