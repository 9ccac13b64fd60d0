"""The reader: which of PyTorch's modules a unit may compute without calling them, and the words for the others."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from densenet_ext.units import parts


class Activated(nn.BatchNorm2d):
    """A norm that runs its activation itself."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(4)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class OwnCode(nn.Conv2d):
    pass


def hooked(how: str) -> nn.Module:
    module = nn.ReLU()
    getattr(module, how)(lambda *args: None)
    return module


def replaced() -> nn.Module:
    module: Any = nn.ReLU()
    module.forward = lambda x: x
    return module


def restored() -> nn.Module:
    module: Any = nn.ReLU()
    module.forward = MethodType(nn.ReLU.forward, module)
    return module


@pytest.mark.parametrize(
    "module, words",
    [
        (nn.BatchNorm2d(4), None),
        (restored(), None),
        (Activated(nn.ReLU()), None),
        (hooked("register_forward_hook"), "has a forward hook"),
        (hooked("register_forward_pre_hook"), "has a forward pre-hook"),
        (hooked("register_full_backward_hook"), "has a backward hook"),
        (hooked("register_full_backward_pre_hook"), "has a backward pre-hook"),
        (replaced(), "has a forward that was replaced on the instance"),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "is parametrised"),
        (OwnCode(3, 4, 1), "is a OwnCode, which has code of its own"),
        (Activated(nn.SiLU()), "has an act that is a SiLU, not a ReLU"),
        (Activated(hooked("register_forward_hook")), "has an act that has a forward hook"),
        (Activated(nn.Identity()), "has 0 activations"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_obstacle(module: nn.Module, words: str | None) -> None:
    assert parts.obstacle(module) == words


def test_a_probe_is_no_hook() -> None:
    module = nn.ReLU()
    module.register_forward_hook(parts.Probe(lambda: None))
    assert parts.hook_on(module) is None
    module.register_forward_hook(lambda *args: None)
    assert parts.hook_on(module) == "has a forward hook"


def test_hooks_on_all_modules() -> None:
    assert parts.hooks_on_all_modules() is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert parts.hooks_on_all_modules() == "hooks are registered for all modules"
    finally:
        handle.remove()


def test_functions_of_the_instance() -> None:
    assert not parts.has_other_forward(nn.ReLU()) and not parts.has_other_forward(restored())
    assert parts.has_other_forward(replaced())
    module: Any = nn.Conv2d(3, 4, 1)
    assert parts.hidden_function(module) is None
    module.own = lambda: None  # hides nothing
    assert parts.hidden_function(module) is None
    module._conv_forward = lambda *args: None
    assert parts.hidden_function(module) == "_conv_forward"


def test_attributes_of_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    module: Any = Scaled(3, 4, 1)
    module.own, module.scale, module._conv_forward = 1, 2, lambda *args: None
    assert parts.own_attributes(module) == list(vars(module))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = parts.own_attributes(module)  # those that the class or its code names
    assert {"scale", "_conv_forward", "stride"} <= set(found) <= set(vars(module)) - {"own"}


def test_functions_of_the_instance_in_compiled_code() -> None:
    module: Any = nn.Conv2d(3, 4, 1)
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return x + 1 if parts.hidden_function(module) is None else x + 2

    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)) == 1
    module._conv_forward = lambda *args: None
    torch._dynamo.reset()
    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)) == 2
    torch._dynamo.reset()


def test_norms_and_activations() -> None:
    assert parts.activates(Activated(nn.SiLU())) and not parts.activates(nn.BatchNorm2d(4))
    assert [parts.other_norm(norm, 2) for norm in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), Activated(nn.ReLU()))] == [
        None
    ] * 3
    assert parts.other_norm(nn.BatchNorm3d(4), 2) == "is a BatchNorm3d, not a BatchNorm2d"
    assert parts.other_norm(nn.GroupNorm(2, 4), 3) == "is a GroupNorm, not a BatchNorm3d"
    assert parts.other_relu(nn.ReLU()) is None and parts.other_relu(nn.PReLU()) == "is a PReLU, not a ReLU"
    assert parts.other_dropout(nn.Dropout(), 2) is None and parts.other_dropout(nn.Dropout2d(), 2) is None
    assert parts.other_dropout(nn.Dropout3d(), 2) == "is a Dropout3d, not a Dropout"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"padding": "same"}, None),
        ({"kernel_size": 5, "padding": 2}, "has kernel size (5, 5), not 3"),
        ({"stride": 2}, "has stride (2, 2) and dilation (1, 1), not 1"),
        ({"padding": 0}, "has padding (0, 0), not 1"),
        ({"padding_mode": "reflect"}, "pads with reflect, not with zeros"),
        ({"groups": 2}, "has 2 groups"),
    ],
)
def test_other_conv(changes: dict[str, Any], words: str | None) -> None:
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **changes})
    assert parts.other_conv(conv, 2, 3) == words
    assert parts.other_conv(conv, 3, 3) == "is a Conv2d, not a Conv3d"


def test_pooling() -> None:
    assert (
        parts.other_avg_pool(nn.AvgPool2d(2), 2) is None and parts.other_avg_pool(nn.AvgPool1d((2,), (2,)), 1) is None
    )
    assert parts.other_avg_pool(nn.AvgPool2d(3), 2) == "has window 3, stride 3 and padding 0, not 2, 2 and 0"
    assert parts.other_avg_pool(nn.AvgPool2d(2, ceil_mode=True), 2) == "has ceil_mode or a divisor of its own"
    assert parts.other_avg_pool(nn.MaxPool2d(2), 2) == "is a MaxPool2d, not a AvgPool2d"
    assert parts.other_max_pool(nn.MaxPool2d(3, 2, 1), 2) is None
    assert parts.other_max_pool(nn.MaxPool2d(3, dilation=2), 2) == "has dilation, ceil_mode or return_indices"
    assert parts.other_global_average(nn.AdaptiveAvgPool2d((1, 1)), 2) is None
    assert parts.other_global_average(nn.AdaptiveAvgPool2d(2), 2) == "has output size 2, not 1"
    assert parts.other_flatten(nn.Flatten()) is None
    assert parts.other_flatten(nn.Flatten(2)) == "flattens dimensions 2 to -1, not 1 to -1"
    assert [parts.pooled_dimensions(m) for m in (nn.AvgPool1d(2), nn.MaxPool3d(2), nn.ReLU())] == [1, 3, None]
    assert [parts.dimensions_of(m) for m in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ReLU())] == [1, 3, None]
    assert parts.each(2, 3) == (2, 2, 2) and parts.each((1, 2), 2) == (1, 2)


def test_a_class_that_is_called_like_a_known_one_says_where_it_is_from() -> None:
    same_name = type("ReLU", (nn.Module,), {"__module__": "mine"})
    assert parts.kind_of(nn.ReLU()) == "ReLU" and parts.kind_of(same_name()) == "mine.ReLU"


def test_children_and_parameters_by_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))
    norm: Any = model[0][0]
    assert parts.submodule(model, "") is model and parts.submodule(model, "0.0") is norm
    assert parts.submodule(model, "0.1") is None and parts.submodule(model, "1.0") is None
    assert parts.parameter(norm, "weight") is norm.weight and parts.parameter(norm, "running_var") is norm.running_var
    twin = copy.copy(norm)
    twin.__dict__["_parameters"], twin.__dict__["weight"] = {}, torch.ones(4)  # as replicas have it
    assert parts.parameter(twin, "weight") is twin.__dict__["weight"]


def test_norm_of_follows_the_rules_of_batch_norm() -> None:
    norm = nn.BatchNorm2d(4, momentum=None, eps=0.5)
    values = parts.norm_of(norm)
    assert values.batch_stats and values.update and values.momentum is None and values.eps == 0.5
    assert values.weight is norm.weight and values.running_mean is norm.running_mean and not values.group
    values = parts.norm_of(norm.eval())
    assert not values.batch_stats and not values.update
    values = parts.norm_of(nn.BatchNorm2d(4, affine=False, track_running_stats=False).eval())
    assert values.batch_stats and not values.update and values.weight is None


def test_tensors_of_another_meaning_are_not_usual() -> None:
    norm = nn.BatchNorm2d(4)
    assert parts.is_usual(parts.norm_of(norm)) and parts.is_plain(norm.weight)
    other = norm.running_mean.as_subclass(type("Other", (torch.Tensor,), {}))
    assert not parts.is_plain(other)
    assert not parts.is_usual(parts.norm_of(norm)._replace(running_mean=other))
    assert not parts.is_usual(parts.norm_of(norm)._replace(running_mean=None))
