"""`verify` measures without leaving a trace; `report` is a table of what runs fused and what does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.fusing.verify import _error
from densenet_ext.units import around
from tests.support import lookalikes
from tests.support.helpers import DEVICE, generator


def net(**kwargs: Any) -> lookalikes.DenseNet:
    torch.manual_seed(0)
    return lookalikes.DenseNet(**{"growth_rate": 4, "num_init_features": 8, "bn_size": 2, **kwargs}).double()


def generator_state() -> Tensor:
    """The state of the generator from which models draw on the device of the run."""
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_verify_compares_everything_and_leaves_no_trace(training: bool, fused: bool) -> None:
    model = net(drop_rate=0.2).train(training)
    if fused:
        dx.fuse(model, save="features")
    x = images()
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random_state, attributes = generator_state(), {n: dict(m.__dict__) for n, m in model.named_modules()}
    result = dx.verify(model, x)
    assert torch.equal(generator_state(), random_state)
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None and torch.equal(p.grad, gradient)
    assert x.grad is None and not x.requires_grad

    assert set(result.gradients) == {"input", *(name for name, _ in model.named_parameters())}
    assert set(result.buffers) == {name for name, _ in model.named_buffers()}
    assert result.max_output < 1e-12 and result.max_gradient < 1e-8 and result.max_buffer < 1e-12
    assert result.fused_units == 6 and result.rounding is None
    lines = str(result).splitlines()
    assert lines[0].split()[:3] == ["max", "relative", "error"] and lines[2].startswith("outputs")
    assert lines[5] == "6 units ran fused" and lines[6] == "dropout of the dense layers was off"


def test_verify_in_float32_shows_what_float32_costs() -> None:
    result = dx.verify(net().float(), images().float())
    assert result.rounding is not None
    assert 0 < result.rounding.max_output < 1e-4 and 0 < result.max_output < 1e-4
    assert result.max_gradient < 20 * result.rounding.max_gradient + 1e-6


def test_verify_of_memory_mode_and_of_own_models() -> None:
    result = dx.verify(net(efficient=True), images())
    assert "the library's own memory mode was off: it moves running statistics twice" in result.notes
    assert result.max_buffer < 1e-12
    own = dx.verify(dx.DenseNet(4, (2, 2), 8, num_classes=3, drop_rate=0.1, small_inputs=True).double(), images())
    assert own.fused_units == 4 and own.max_gradient < 1e-8 and own.max_output > 0


def test_verify_finds_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        around, "transition", lambda x, *args, **kwargs: nn.functional.avg_pool2d(x[:, : args[1].shape[0]], 2)
    )
    result = dx.verify(net(), images())
    assert result.max_output > 1e-3 and result.gradients["features.transition1.conv.weight"] == float("inf")


def test_verify_says_when_nothing_was_fused() -> None:
    result = dx.verify(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), images())
    assert result.fused_units == 0 and "nothing runs fused" in str(result)
    with pytest.raises(TypeError, match="verify: x: expected a tensor, got list"):
        dx.verify(net(), [images()])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("got", "wanted", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.tensor([float("nan"), 2.0]), torch.tensor([float("nan"), 2.0]), 0.0),
        (torch.tensor([float("nan"), 2.0]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")]), 0.0),
        (torch.tensor([1.0]), torch.tensor([0.0]), float("inf")),
        (torch.tensor(3), torch.tensor(2), 0.5),
        (torch.tensor([1.0]), None, float("inf")),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), float("inf")),
        (torch.zeros(0), torch.zeros(0), 0.0),
    ],
)
def test_relative_error(got: Tensor, wanted: Tensor | None, error: float) -> None:
    assert _error(got, wanted, same_dtype=True) == error


def test_report_is_a_table() -> None:
    model = dx.fuse(net(small_inputs=False))
    model.features.denseblock2.denselayer1.relu1 = nn.PReLU()  # type: ignore[union-attr]
    report = dx.report(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["unit", "name", "fused", "save", "why", "not"]
    assert [(row.kind, row.name) for row in report][:4] == [
        ("head", ""),
        ("stem", "features"),
        ("dense block", "features.denseblock1"),
        ("transition", "features.transition1"),
    ]
    assert len(report) == 7 and lines[2].split() == ["head", "(model)", "yes"]
    assert any(line.endswith("denselayer1.relu1 is a PReLU, not a ReLU") for line in lines)
    assert lines[-1].startswith(f"float64 on {DEVICE.type}: ")


def test_report_says_who_computes() -> None:
    with kernels.force_plain():
        notes = dx.report(net()).notes
    assert len(notes) == 1 and notes[0].startswith(
        f"float64 on {DEVICE.type}: plain PyTorch computes, with the same memory: "
    )


def test_report_of_what_was_never_fused() -> None:
    assert {row.reason for row in dx.report(net(small_inputs=False))} == {"densenet_ext.fuse has not been called"}
    assert "no dense block" in str(dx.report(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="report: model: expected a torch.nn.Module, got NoneType"):
        dx.report(None)  # type: ignore[arg-type]


def test_report_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dx.fuse(net())
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *args: pytest.fail("a convolution ran"))
    assert {row.reason for row in dx.report(model)} == {
        "a class or function of PyTorch was replaced, which may see or change the operations"
    }
