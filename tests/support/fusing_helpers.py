"""What the tests of `fuse` share: a small network, three steps of training, comparisons, the report by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.report import Row
from tests.support import lookalikes
from tests.support.helpers import generator

BLOCK = "features.denseblock1"


def three_steps(model: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x + step), torch.arange(len(x)) % 10)
        loss.backward()
        optimizer.step()
    return model


def assert_same_state(got: nn.Module, wanted: nn.Module) -> None:
    for (name, a), b in zip(got.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def rows(model: nn.Module) -> dict[str, Row]:
    return {row.name: row for row in dx.report(model)}


def net(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"growth_rate": 4, "num_init_features": 8, "bn_size": 2, "small_inputs": False, **kwargs}
    return lookalikes.DenseNet(**settings).double()


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator(1))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got: nn.Module, wanted: nn.Module) -> None:
    theirs = gradients(wanted)
    for name, grad in gradients(got).items():
        torch.testing.assert_close(grad, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def pair(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The same network twice, the first fused."""
    return dx.fuse(net(**kwargs)), net(**kwargs)


def close(found: list[Any]) -> None:
    """The results of both networks are the same."""
    assert len(found) == 2
    torch.testing.assert_close(*found)


def layer(model: nn.Module, name: str = "denselayer1") -> Any:
    return model.get_submodule(f"{BLOCK}.{name}")


def reason_of(model: nn.Module, name: str = "") -> str | None:
    """Why the unit of this name runs unfused, as the report has it."""
    return next(row.reason for row in dx.report(model) if row.name == name)
