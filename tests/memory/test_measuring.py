"""Counting: bytes that autograd saves, bytes from a trace, and a model without data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import densenet_ext as dx
from densenet_ext.memory.dry_run import checked_shape, parameter_device, parameter_dtype, refused
from densenet_ext.memory.measuring import (
    FORWARD,
    device_name,
    memory_of,
    peak_bytes,
    processor_name,
    saved_bytes,
)
from densenet_ext.memory.plan import set_level
from densenet_ext.memory.units import kept_by_unit


def test_saved_bytes_count_each_storage_once() -> None:
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x * x, leave_out=[x]) == 0
    assert saved_bytes(lambda: x * x) == 40
    assert saved_bytes(lambda: x.exp().exp(), leave_out=[x]) == 80


def test_a_trace_is_summed_in_the_order_of_time() -> None:
    def change(ts: int, size: int, device: int = 0) -> dict[str, object]:
        return {"name": "[memory]", "ts": ts, "args": {"Device Type": device, "Bytes": size}}

    forward = {"name": FORWARD, "ts": 0, "dur": 10}
    events = [change(12, 50), forward, change(5, -20), change(1, 100), change(2, 1000, 1), change(20, -130)]
    assert memory_of(events) == (80, 130)


def test_peak_bytes() -> None:
    device = torch.get_default_device()

    def step() -> None:
        (torch.empty(2**20) + 1).sum()

    peak = peak_bytes(step, device)
    assert peak is not None and 2**23 <= peak < 2**23 + 2**16
    assert peak_bytes(step, torch.device("meta")) is None


def test_names_of_devices() -> None:
    assert device_name(torch.device("cpu")) == processor_name() != ""
    assert device_name(torch.device("meta")) == "meta"


def test_parameters_tell_dtype_and_device() -> None:
    model = nn.Linear(2, 2, dtype=torch.float64)
    assert parameter_dtype(model) == torch.float64 and parameter_device(model) == model.weight.device


def test_shapes_of_a_batch() -> None:
    assert checked_shape([2, 3, 32, 32]) == (2, 3, 32, 32)
    with pytest.raises((TypeError, ValueError), match="input_shape"):
        checked_shape("2, 3")
    with pytest.raises((TypeError, ValueError), match="input_shape"):
        checked_shape([0, 3, 32, 32])
    error = refused((2, 3), RuntimeError("its own words"))
    assert isinstance(error, ValueError) and "its own words" in str(error) and "[2, 3]" in str(error)


def test_what_each_unit_keeps() -> None:
    model = dx.densenet_bc(10, 4)
    rows = [row for row in dx.report(model, (2, 3, 16, 16)) if row.kept is not None]
    assert rows and all(row.fused for row in rows)
    blocks = [unit for unit in dx.report(model).rows if unit.kind == "dense block"]
    from densenet_ext.fusing.find import find_units

    kept, whole = kept_by_unit(model, find_units(model), (2, 3, 16, 16))
    assert {name: each.now for name, each in kept.items()} == {row.name: row.kept for row in rows}
    assert 0 < whole.now < whole.unfused and {row.name for row in blocks} <= kept.keys()
    set_level(model, "features")
    assert kept_by_unit(model, find_units(model), (2, 3, 16, 16))[1].now < whole.now
