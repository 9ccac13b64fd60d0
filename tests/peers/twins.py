"""A model and its fused twin: small networks of the libraries, how both are run, and what must be the same.

Every test in this folder runs one thing on an unfused model and on its fused twin, through the public API only. With
``PEERS_FUSE=identity`` in the environment nothing is fused: the tests must then pass, or they are wrong themselves.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import densenet_ext as dx
from benchmarks.peers import Unavailable, peer
from tests.support.helpers import generator

IDENTITY = os.environ.get("PEERS_FUSE") == "identity"
needs_fused = pytest.mark.skipif(IDENTITY, reason="nothing is fused")


def fuse(model: Any, save: str | None = None) -> Any:
    """`densenet_ext.fuse`, or nothing at all where the tests themselves are tested."""
    return model if IDENTITY else dx.fuse(model, save=save)


def library(name: str) -> ModuleType:
    """The module ``name``; skips the test where it can't be imported."""
    try:
        peer("torchvision.models.densenet")  # declares the operators that torchvision lacks beside a CPU build of torch
    except Unavailable:
        pass
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        pytest.skip(f"{top} is not installed")
    return importlib.import_module(name)


# ---- networks --------------------------------------------------------------------------------------------------------


def torchvision_net(**kwargs: Any) -> Any:
    settings = {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16, "num_classes": 5, **kwargs}
    return library("torchvision.models.densenet").DenseNet(**settings)


def timm_net(**kwargs: Any) -> Any:
    settings = {"growth_rate": 8, "block_config": (2, 2), "num_classes": 5, **kwargs}
    return library("timm.models.densenet").DenseNet(**settings)


def monai_net(**kwargs: Any) -> Any:
    settings = {"spatial_dims": 2, "in_channels": 3, "out_channels": 5, "init_features": 16, "growth_rate": 8}
    return library("monai.networks.nets.densenet").DenseNet(**settings, **{"block_config": (2, 2), **kwargs})


NETS: dict[str, Callable[..., Any]] = {"torchvision": torchvision_net, "timm": timm_net, "monai": monai_net}


def without_inplace(model: Any) -> Any:
    """The model with ReLUs that do not work in place, as tools that set backward hooks on modules need them."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class HeadedByModules(nn.Module):
    """torchvision's features behind which everything is a module, and no ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        net = without_inplace(torchvision_net())
        self.features, self.relu, self.classifier = net.features, nn.ReLU(), net.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.relu(self.features(x)).mean((2, 3)))


def images(n: int = 2, size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator(1)).to(dtype)


def warm(model: Any) -> Any:
    """The model with norms whose parameters and running statistics are no longer zeros and ones."""
    made = generator(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=made) + low)
            module.running_var.copy_(torch.rand(module.num_features, generator=made) + 0.5)
    return model


def pair(model: Any, save: str | None = None) -> tuple[Any, Any]:
    """The model and its fused twin, whose statistics are not those of a fresh network."""
    twin = fuse(copy.deepcopy(warm(model)), save=save)
    return model, twin


# ---- comparison ------------------------------------------------------------------------------------------------------


def strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions with more than one element."""
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def assert_alike(got: Any, wanted: Any, tolerance: float = 1e-9, layout: bool = False, what: str = "") -> None:
    """The same structure; tensors of the same shape, dtype and values (and strides, for ``layout``)."""
    theirs, spec = pytree.tree_flatten(wanted)
    ours, our_spec = pytree.tree_flatten(got)
    assert our_spec == spec, f"{what}: {str(our_spec)[:500]} against {str(spec)[:500]}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, Tensor):
            assert a == b, f"{what}[{i}]: {a} against {b}"
            continue
        name = f"{what}[{i}] of shape {tuple(b.shape)}"
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {tuple(a.shape)} against {b.dtype}"
        if layout:
            assert strides(a) == strides(b), f"{name}: strides {a.stride()} against {b.stride()}"
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def counts(counter: Mapping[str, int]) -> str:
    """What a counter holds, as one text: the message of a failed comparison then shows both."""
    return ", ".join(f"{name}: {n}" for name, n in sorted(counter.items()))


def state(model: nn.Module) -> dict[str, Any]:
    """Every gradient and every buffer by name."""
    found: dict[str, Any] = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {**found, **dict(model.named_buffers())}


def same(
    models: tuple[Any, Any], run: Callable[[Any], Any], tolerance: float = 1e-9, layout: bool = False
) -> tuple[Any, Any]:
    """Runs both; the results, every gradient and every buffer are the same. Returns the results, the fused one last."""
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(run(model))
    assert_alike(results[1], results[0], tolerance, layout, "result")
    assert_alike(state(models[1]), state(models[0]), tolerance, what="gradients and buffers")
    return results[0], results[1]


def outcome(run: Callable[[Any], Any], model: Any) -> Any:
    """What ``run`` returns, or the name of the exception that it raises."""
    try:
        return run(model)
    except Exception as error:
        return type(error).__name__


def train_step(model: Any, x: Tensor | None = None) -> Any:
    """The output and the gradient of the input; gradients of the parameters stay with them."""
    x = (images() if x is None else x).clone().requires_grad_()
    out = model(x)
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    sum(t.square().mean() for t in tensors).backward()
    return out, x.grad


def fused_kinds(model: Any) -> list[str]:
    """The kinds of units that `report` calls fused, in order."""
    return [row.kind for row in dx.report(model) if row.fused]


def assert_all_fused(model: Any, kinds: tuple[str, ...] = ("dense block", "transition", "stem", "head")) -> None:
    """Every row of the report of these kinds is fused, and there is a dense block; else the test compares nothing."""
    if IDENTITY:
        return
    rows = list(dx.report(model))
    assert "dense block" in [row.kind for row in rows], rows
    unfused = [(row.kind, row.name, row.reason) for row in rows if row.kind in kinds and not row.fused]
    assert not unfused, unfused
