"""Dtypes and sizes of inputs: values as good as unfused, and the errors that eager raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers.twins import (
    NETS,
    assert_alike,
    fuse,
    images,
    outcome,
    pair,
    torchvision_net,
    train_step,
    warm,
)
from tests.support.covering import pairs
from tests.support.helpers import DEVICE

BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# ---- dtypes ----------------------------------------------------------------------------------------------------------

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("name", "training", "dtype"), pairs(NETS, [True, False], HALF), ids=str)
def test_half_precision_is_as_good_as_unfused(name: str, training: bool, dtype: torch.dtype) -> None:
    # of several networks: where a rounding lets one ReLU pass, or not, a gradient of theirs is off by some percent
    errors = torch.stack([half_precision_errors(name, training, dtype) for _ in range(16)]).mean(0)
    assert (errors[1] <= 1.5 * errors[0] + 2 * torch.finfo(dtype).eps).all(), errors


def half_precision_errors(name: str, training: bool, dtype: torch.dtype) -> torch.Tensor:
    """Of the plain network and the fused one [2]: the relative errors of output and gradients [2], against float64."""
    exact = warm(NETS[name]().double())
    plain = copy.deepcopy(exact).to(dtype).train(training)
    exact = copy.deepcopy(plain).double()
    fused = fuse(copy.deepcopy(plain))
    results = [train_step(m, images(4, 32, dtype).to(next(m.parameters()).dtype)) for m in (exact, plain, fused)]
    wanted = [p.grad for p in exact.parameters()]
    errors = []
    for model, result in ((plain, results[1]), (fused, results[2])):
        assert result[0].dtype == dtype and all(p.grad.dtype == dtype for p in model.parameters())
        out = (result[0].double() - results[0][0]).norm() / results[0][0].norm()
        grads = [
            (p.grad.double() - w).norm() / w.norm().clamp_min(1e-6)
            for p, w in zip(model.parameters(), wanted, strict=True)
        ]
        errors.append(torch.stack([out, torch.stack(grads).mean()]))
    return torch.stack(errors)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_constant_channels_leave_no_residue(dtype: torch.dtype) -> None:
    """Channels of one large value: normalised they are zero but for the shift, as unfused."""

    def run(model: Any) -> Any:
        x = torch.full((4, 16, 5, 5), 1e4, dtype=dtype)
        out = model.features.denseblock1(x)
        return outcome(lambda o: bool(o.isfinite().all()), out), out[:, 16:].float()

    plain, fused = pair(torchvision_net().to(dtype))
    results = [run(model) for model in (plain, fused)]
    assert results[0][0] == results[1][0]
    scale = results[0][1].abs().max().item()
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.05, atol=0.05 * scale)


def test_deep_half_network_has_no_nan_of_its_own() -> None:
    plain = torchvision_net(block_config=(6, 6, 6), growth_rate=4).half()
    models = plain, fuse(copy.deepcopy(plain))
    x = images(2, 32, torch.float16) * 1e3
    finite = [bool(model(x).isfinite().all()) for model in models]
    assert finite[0] == finite[1]


MIXED: dict[str, Callable[[Any], Any]] = {
    "norms in float32": lambda model: [
        m.float() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ],
    "one norm in float32": lambda model: model.features.denseblock1.denselayer1.norm2.float(),
    "one convolution in float64": lambda model: model.features.denseblock1.denselayer1.conv1.double(),
    "statistics in float32": lambda model: [
        setattr(m, name, getattr(m, name).float())
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for name in ("running_mean", "running_var")
    ],
}


@BOTH
@pytest.mark.parametrize("what", MIXED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_dtypes(what: str, dtype: torch.dtype, training: bool) -> None:
    """What eager takes the fused model takes, with the same dtype; what it refuses is refused alike.

    But for running statistics in float32 under weights in 16 bits, which FSDP's mixed precision has: eager refuses them
    on the CPU, and the fused model gives what it gives with statistics in 16 bits.
    """

    def run(model: Any) -> Any:
        MIXED[what](model)
        found = outcome(lambda m: train_step(m, images(2, 32, dtype)), model)
        return found if isinstance(found, str) else (found[0].float(), str(found[0].dtype))

    plain = warm(torchvision_net().to(dtype).train(training))
    usual, models = copy.deepcopy(plain), (plain, fuse(copy.deepcopy(plain)))
    results = [run(model) for model in models]
    if isinstance(results[0], str) and what == "statistics in float32":
        found = outcome(lambda m: train_step(m, images(2, 32, dtype)), usual)
        results[0] = (found[0].float(), str(found[0].dtype))
    assert_alike(results[1], results[0], 0.1 if dtype == torch.bfloat16 else 1e-4)
    for (key, got), wanted in zip(models[1].named_buffers(), models[0].buffers(), strict=True):
        assert got.dtype == wanted.dtype, key


@pytest.mark.parametrize("enabled", ["cpu", "nested off", "weights cached"])
def test_autocast(enabled: str) -> None:
    def run(model: Any) -> Any:
        dtypes: list[str] = []
        for module in model.modules():
            module.register_forward_hook(lambda m, args, out: dtypes.append(str(out.dtype)))
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=enabled == "weights cached"):
            if enabled == "nested off":
                with torch.autocast(DEVICE.type, enabled=False):
                    out = model(images(dtype=torch.float32))
            else:
                out = model(images(dtype=torch.float32))
        return dtypes, str(out.dtype), out.float()

    results = [run(model) for model in pair(torchvision_net())]
    assert_alike(results[1], results[0], 0.1)


# ---- sizes and errors ------------------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[], Any]] = {
    "too few channels": lambda: images()[:, :2],
    "too many channels": lambda: torch.cat([images(), images()], 1),
    "no batch": lambda: images()[0],
    "three dimensions": lambda: images()[:, :, 0],
    "five dimensions": lambda: images()[:, :, None],
    "two dimensions": lambda: images().flatten(1),
    "too small for the transition": lambda: images(2, 4),
    "one pixel": lambda: images(2, 1),
    "no pixels": lambda: images()[..., :0],
    "no images": lambda: images()[:0],
    "no images, too small": lambda: images(2, 4)[:0],
    "one image of 8": lambda: images(1, 8),
    "integers": lambda: torch.ones(2, 3, 32, 32, dtype=torch.int64),
    "bytes": lambda: torch.ones(2, 3, 32, 32, dtype=torch.uint8),
    "bool": lambda: torch.ones(2, 3, 32, 32, dtype=torch.bool),
    "half": lambda: images(dtype=torch.float16),
    "float32": lambda: images(dtype=torch.float32),
    "complex": lambda: images().to(torch.complex128),
    "meta": lambda: images().to("meta"),
    "sparse": lambda: images().to_sparse(),
    "a list": lambda: [images()],
    "an array": lambda: images().numpy(),
    "nothing": lambda: None,
    "nan": lambda: images() * float("nan"),
    "infinity": lambda: images().masked_fill(images() > 2, float("inf")),
    "huge": lambda: images() * 1e200,
    "zeros": lambda: images() * 0,
}


@pytest.mark.parametrize(("name", "what", "training"), pairs(NETS, WRONG, [True, False]), ids=str)
def test_odd_inputs_of_models(name: str, what: str, training: bool) -> None:
    """The type of the error that eager raises, or its values; what moved before the error is not compared."""
    results = [outcome(lambda m: m(WRONG[what]()), model) for model in pair(NETS[name]().double().train(training))]
    if isinstance(results[0], Tensor) and results[0].is_meta:
        assert results[1].is_meta and results[1].shape == results[0].shape
    else:
        assert_alike(results[1], results[0])


PARTS = ["features.denseblock1", "features.transition1"]


@pytest.mark.parametrize(("place", "what", "training"), pairs(PARTS, WRONG, [True, False]), ids=str)
def test_odd_inputs_of_parts(place: str, what: str, training: bool) -> None:
    def run(model: nn.Module) -> Any:
        x = WRONG[what]()
        if isinstance(x, Tensor) and x.layout == torch.strided and x.dim() == 4 and x.shape[1] == 3:
            x = x[:, :1].repeat(1, 16 if "block" in place else 32, 1, 1)
        return outcome(model.get_submodule(place), x)

    results = [run(model) for model in pair(torchvision_net().double().train(training))]
    if isinstance(results[0], Tensor) and results[0].is_meta:
        assert results[1].is_meta and results[1].shape == results[0].shape
    else:
        assert_alike(results[1], results[0], layout=True)
