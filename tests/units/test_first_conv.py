"""A network's first convolution as one operation: in evaluation alone, and only where nobody would see its call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.units.parts import Probe
from tests.support.fusing_helpers import net
from tests.support.helpers import DEVICE, assert_as_good

pytestmark = pytest.mark.skipif(
    kernels.backend("cpu") != "compiled" or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of every call of the operation."""
    found: list[Tensor] = []
    ops = kernels.select(torch.empty(0))
    run = ops.first_conv

    def noted(x: Tensor, *args: Any) -> None:
        found.append(x)
        run(x, *args)

    monkeypatch.setattr(ops, "first_conv", noted)
    return found


@pytest.fixture(params=["torchvision", "imagenet", "cifar"])
def plain(request: pytest.FixtureRequest) -> Any:
    """An unfused network in evaluation, with statistics of its own."""
    torch.manual_seed(0)
    if request.param == "torchvision":
        return evaluated(net(block_config=(2, 1)).float(), 64)
    small = {"block_config": (2, 1), "growth_rate": 8, "num_classes": 10}
    return evaluated(dx.unfuse(dx.DenseNet(small_inputs=request.param == "cifar", **small)), 64)


def evaluated(model: Any, size: int) -> Any:
    for _ in range(3):
        model(torch.randn(4, 3, size, size))
    return model.eval()


def images(*layouts: torch.memory_format) -> Iterator[Tensor]:
    for layout in layouts or (torch.contiguous_format, torch.channels_last):
        yield torch.randn(2, 3, 61, 64).contiguous(memory_format=layout)


@pytest.mark.parametrize("lowered", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_network_in_evaluation(
    plain: nn.Module, lowered: torch.dtype | None, without: Any, calls: list[Tensor]
) -> None:
    fused = dx.fuse(copy.deepcopy(plain))
    for x in images():
        with without(), torch.autocast("cpu", lowered or torch.bfloat16, enabled=lowered is not None):
            got, eager = fused(x), plain(x)
        with without():
            exact = copy.deepcopy(plain).double()(x.double())
        assert len(calls) == 1 and calls.pop() is x  # not a copy of it in another layout
        assert_as_good([got], [eager], [exact], factor=3.0, floor=16.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_network_of_another_dtype(plain: nn.Module, dtype: torch.dtype, calls: list[Tensor]) -> None:
    model = plain.to(dtype)
    fused = dx.fuse(copy.deepcopy(model))
    with torch.no_grad():
        x = next(images()).to(dtype)
        got, eager, exact = fused(x), model(x), copy.deepcopy(model).double()(x.double())
    assert len(calls) == 1
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact)
    else:
        assert_as_good([got], [eager], [exact], factor=3.0, floor=16.0)


def first(model: Any) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def test_an_intermediate_result_has_eagers_layout(plain: Any, calls: list[Tensor]) -> None:
    fused = dx.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        for x in images():
            seen: list[Tensor] = []
            for model in (fused, plain):
                handle = model.features.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
                model(x)
                handle.remove()
            assert seen[0].stride() == seen[1].stride() and len(calls) >= 1


def test_not_with_gradients(plain: nn.Module, calls: list[Tensor]) -> None:
    fused = dx.fuse(plain)
    out = fused(next(images()))
    out.sum().backward()
    assert not calls and first(fused).weight.grad is not None
    fused.train()(next(images()))
    assert not calls


def test_not_where_somebody_sees_the_call(plain: nn.Module, calls: list[Tensor]) -> None:
    fused = dx.fuse(plain)
    conv, x, seen = first(fused), next(images()), []
    expected = fused.eval()(x).detach()

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        if module is conv:
            seen.append(out)

    with torch.no_grad():
        for register in (conv.register_forward_hook, nn.modules.module.register_module_forward_hook):
            handle = register(note)
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
        assert len(seen) == 2 and not calls
        conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign]
        assert not torch.allclose(fused(x), expected, rtol=1e-2, atol=1e-3) and not calls
        del conv.forward
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1


def test_probes_hear_of_it(plain: nn.Module, calls: list[Tensor]) -> None:
    fused, heard = dx.fuse(plain), []
    first(fused).register_forward_pre_hook(Probe(lambda: heard.append("before")))
    first(fused).register_forward_hook(Probe(lambda: heard.append("after")))
    with torch.no_grad():
        fused(next(images()))
    assert heard == ["before", "after"] and len(calls) == 1


@pytest.mark.parametrize(
    "settings",
    [{"padding_mode": "reflect"}, {"dilation": (2, 2)}, {"padding": "same", "stride": (1, 1)}, {"stride": 2}],
    ids=str,
)
def test_not_for_other_convolutions(settings: dict[str, Any], calls: list[Tensor]) -> None:
    plain = evaluated(net(block_config=(2, 1)).float(), 64)
    old = first(plain)
    if "stride" in settings and isinstance(settings["stride"], int):
        old.stride = settings["stride"]  # type: ignore[assignment]
    else:
        conv = nn.Conv2d(3, old.out_channels, 7, bias=True, **{"padding": 3, "stride": 2, **settings})
        plain.features[0] = conv
    fused = dx.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        x = next(images())
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not calls


def test_inputs_that_do_not_fit_are_refused_as_before(plain: nn.Module, calls: list[Tensor]) -> None:
    fused = dx.fuse(plain)
    with torch.no_grad():
        for x, words in (
            (torch.randn(2, 4, 64, 64), "expected 3 channels"),
            (torch.randn(2, 3, 64, 64).int(), "dtype"),
        ):
            with pytest.raises(RuntimeError, match=words):
                fused(x)
        assert fused(torch.randn(0, 3, 64, 64)).shape[0] == 0
    assert not calls


def test_not_in_compiled_code(calls: list[Tensor]) -> None:
    torch.manual_seed(0)
    fused = dx.fuse(evaluated(net(block_config=(2,)).float(), 64))
    x = next(images(torch.contiguous_format))
    with torch.no_grad():
        expected = fused(x)
        calls.clear()
        torch._dynamo.reset()
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert not calls
