"""Small batches and large ones, training and inference, float32 and bfloat16, 2-D and 3-D: ours against the others.

Everybody starts from the same weights, in one process, in interleaved rounds. Beside PyTorch's own forms inference is
measured against ONNX Runtime and OpenVINO, where they can be imported; their threads rest as soon as a call is over.
They keep weights as their kernels read them, and know of no change: so do ours at batch 1, where that counts, in a row
of their own (``dx.packed_weights``).
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import densenet_ext as dx
from benchmarks import markdown, measure, peers
from benchmarks.run import Say, machine

OURS, PACKED = "densenet_ext", "densenet_ext, packed weights"
SHORTEST = 0.1
"""Seconds of one measurement: what takes less is called so often in a row, everybody alike."""
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class Workload(NamedTuple):
    """A network at one batch size, trained or run."""

    network: str  # of peers.NETWORKS, or "monai3d"
    mode: str  # "training" or "inference"
    batch: int
    image: int

    @property
    def title(self) -> str:
        """Its name in the table."""
        network = "MONAI DenseNet-121, 3-D" if self.network == "monai3d" else peers.NETWORKS[self.network].title
        return f"{network}, {self.image}^{3 if self.network == 'monai3d' else 2}, batch {self.batch}"


WORKLOADS = (
    *(Workload("bc100", "training", batch, 32) for batch in (1, 4, 64)),
    *(Workload("densenet121", "training", batch, 224) for batch in (1, 4, 16)),
    Workload("monai3d", "training", 2, 64),
    *(Workload("bc100", "inference", batch, 32) for batch in (1, 64)),
    *(Workload("densenet121", "inference", batch, 224) for batch in (1, 16)),
)


def model_of(workload: Workload) -> nn.Module:
    """Returns the network as people have it. Raises peers.Unavailable where its library is missing."""
    if workload.network == "monai3d":
        made: nn.Module = peers.peer("monai.networks.nets.densenet").DenseNet121(3, 1, 10)
        return made
    network = peers.NETWORKS[workload.network]
    if network.small_inputs:
        return peers.efficient_densenet(None)(**network.keywords(), small_inputs=True, efficient=False)
    model: nn.Module = peers.torchvision_densenet().DenseNet(**network.keywords())
    return model


Call = Callable[[], object]


def contenders(
    workload: Workload, dtype: str, compiled: bool, until: ExitStack
) -> tuple[dict[str, Call], dict[str, str]]:
    """Returns what to measure by name, ours first, and why others are not there.

    Weights stay packed until ``until`` is left.
    """
    torch.manual_seed(0)
    plain = model_of(workload)
    volumes = workload.network == "monai3d"
    last: Any = torch.channels_last_3d if volumes else torch.channels_last
    images = torch.randn(workload.batch, 1 if volumes else 3, *[workload.image] * (3 if volumes else 2))
    labels = torch.randint(10, (workload.batch,))
    autocast = DTYPES[dtype]

    def call(model: nn.Module, layout: Any) -> Call:
        model, x = model.to(memory_format=layout), images.contiguous(memory_format=layout)  # type: ignore[call-overload]
        if workload.mode == "training":
            return measure.Step(model, x, labels, autocast)
        return measure.Inference(model, x, autocast)

    calls = {OURS: call(dx.fuse(copy.deepcopy(plain)), last)}
    if workload.mode == "inference" and workload.batch == 1:
        packed = dx.fuse(copy.deepcopy(plain))
        calls[PACKED] = call(packed, last)
        until.enter_context(dx.packed_weights(packed))
    calls["PyTorch, channels_last"] = call(copy.deepcopy(plain), last)
    calls["PyTorch, contiguous"] = call(copy.deepcopy(plain), torch.contiguous_format)
    missing = {}
    if compiled:
        model = copy.deepcopy(plain)
        model.compile()
        calls["torch.compile, channels_last"] = call(model, last)
    if workload.mode == "inference":
        for name, make in {"ONNX Runtime": onnx_runtime, "OpenVINO": open_vino}.items():
            try:
                calls[name] = make(plain.eval(), images, dtype)
            except peers.Unavailable as error:
                missing[name] = str(error)
    return calls, missing


def onnx_runtime(model: nn.Module, images: Tensor, dtype: str) -> Call:
    """Returns a call of ONNX Runtime on the exported model. Raises peers.Unavailable."""
    if dtype != "float32":
        raise peers.Unavailable("has no bfloat16 on processors")
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise peers.Unavailable("onnxruntime can't be imported") from error
    file = io.BytesIO()
    try:
        torch.onnx.export(copy.deepcopy(model), (images,), file, dynamo=False)  # type: ignore[arg-type]
    except Exception as error:  # whatever the exporter and its packages raise
        raise peers.Unavailable(peers.reason(error)) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


def open_vino(model: nn.Module, images: Tensor, dtype: str) -> Call:
    """Returns a call of OpenVINO on the converted model, at latency's settings. Raises peers.Unavailable."""
    try:
        openvino: Any = importlib.import_module("openvino")
    except ImportError as error:
        raise peers.Unavailable("openvino can't be imported") from error
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
    }
    try:
        converted = openvino.convert_model(copy.deepcopy(model), example_input=images)
        converted.reshape(list(images.shape))
        compiled = openvino.compile_model(converted, "CPU", settings)
    except Exception as error:  # whatever it raises
        raise peers.Unavailable(peers.reason(error)) from error
    request, given = compiled.create_infer_request(), images.numpy()
    return lambda: request.infer([given])


def run(
    workloads: Sequence[Workload],
    rounds: int,
    compiled: bool,
    say: Say,
    save: Callable[[Any], None],
    seconds: float = math.inf,
) -> Any:
    """Measures all workloads in both dtypes; gives what there is so far to ``save`` after each.

    Begins none after ``seconds``.
    """
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "rounds": rounds, "rows": []}
    for workload in workloads:
        for dtype in DTYPES:
            if time.monotonic() > end:
                say(f"{workload.title}, {workload.mode}, {dtype}: no time is left")
                continue
            try:
                rows = measured(workload, dtype, rounds, compiled)
            except peers.Unavailable as error:
                say(f"{workload.title}: {error}")
                continue
            for row in rows:
                say(f"{_name(row)}, {dtype}: {row['ratio'][0]:.2f} against {row['fastest']}")
            found["rows"] += rows
            save(found)
    return found


def measured(workload: Workload, dtype: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for each form of ours: milliseconds of everybody, and the fastest peer's time over that form's."""
    with ExitStack() as until:
        calls, missing = contenders(workload, dtype, compiled, until)
        once = {name: _seconds_of_the_second(call) for name, call in calls.items()}
        repeats = max(1, round(SHORTEST / min(once.values())))
        others = [name for name in calls if name not in (OURS, PACKED)]
        clock = functools.partial(_seconds_each, repeats)
        times = measure.interleave(calls, rounds, others, clock)
    fastest = min(others, key=lambda name: measure.median(times[name]))
    row = {
        **workload._asdict(),
        "title": workload.title,
        "dtype": dtype,
        "repeats": repeats,
        "milliseconds": {name: round(measure.median(values) * 1e3, 2) for name, values in times.items()},
        "fastest": fastest,
        "missing": missing,
    }
    return [
        {**row, "ours": name, "ratio": [round(value, 3) for value in measure.ratio(times[fastest], times[name])]}
        for name in (OURS, PACKED)
        if name in calls
    ]


def _seconds_of_the_second(call: Call) -> float:
    call()
    return measure.seconds(call)


def _seconds_each(repeats: int, call: Call) -> float:
    """Returns the seconds of one of ``repeats`` calls in a row."""

    def row() -> None:
        for _ in range(repeats):
            call()

    return measure.seconds(row) / repeats


def table(found: Mapping[str, Any]) -> str:
    """Returns the rows as a table in Markdown, and what they depend on above it."""
    head = ["workload", "dtype", "ours, ms", "fastest other", "ms", "its time over ours (range)"]
    rows = []
    for row in found["rows"]:
        times, fastest = row["milliseconds"], row["fastest"]
        cells = [_name(row), row["dtype"], times[row["ours"]], fastest, times[fastest]]
        rows.append([*cells, _ratio(row)])
    return f"{_caption(found)}\n\n{markdown.table(head, rows, 'llrlrr')}"


def summary(found: Mapping[str, Any]) -> str:
    """Returns a table with a line for each workload, both dtypes beside each other."""
    head = ["workload"]
    for dtype in DTYPES:
        head += [f"{dtype}: ours, ms", "fastest other", "its time over ours (range)"]
    lines: dict[str, dict[str, list[str]]] = {}
    for row in found["rows"]:
        cells = [f"{row['milliseconds'][row['ours']]:.1f}", row["fastest"], _ratio(row)]
        lines.setdefault(_name(row), {})[row["dtype"]] = cells
    none = ["-"] * 3
    rows = [[name, *(cell for dtype in DTYPES for cell in each.get(dtype, none))] for name, each in lines.items()]
    return f"{_caption(found)}\n\n{markdown.table(head, rows, 'lrlrrlr')}"


def _caption(found: Mapping[str, Any]) -> str:
    others = dict.fromkeys(name for row in found["rows"] for name in row["milliseconds"] if name not in (OURS, PACKED))
    where = f"{found['threads']} threads, {found['rounds']} rounds, medians: {markdown.provenance(found['machine'])}"
    return f"{where}; others: {'; '.join(others)}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['mode']}: {row['title']}{', packed weights' if row['ours'] == PACKED else ''}"


def _ratio(row: Mapping[str, Any]) -> str:
    median, low, high = row["ratio"]
    return f"**{median:.2f}** ({low:.2f} to {high:.2f})"
