"""What keeps parts of MONAI's DenseNet unfused: `report` says why, and the numbers stay those of the plain network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units import entry
from tests.support import library_checks as checks
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, three_steps
from tests.support.monai_networks import BLOCK, images, small


def test_other_norms_and_activations_say_why() -> None:
    other = "denselayer1.layers.norm1 is a InstanceNorm3d, not a BatchNorm3d"
    with pytest.warns(UserWarning, match=f"none of the 2 dense blocks.*{other}"):
        model = dx.fuse(small(3, norm="instance"))
    assert checks.unfused_units(model) == {BLOCK: other, "features.denseblock2": other}
    assert not any(row.fused for row in dx.report(model))
    other = "denselayer1.layers.relu1 is a LeakyReLU, not a ReLU"
    with pytest.warns(UserWarning, match=f"none of the 2 dense blocks.*{other}"):
        model = dx.fuse(small(3, act=("leakyrelu", {})))
    assert checks.unfused_units(model) == {
        BLOCK: other,
        "features.transition1": "relu is a LeakyReLU, not a ReLU",
        "features.denseblock2": other,
    }
    assert not any(row.fused for row in dx.report(model))
    torch.testing.assert_close(model(images(3)), small(3, act=("leakyrelu", {}))(images(3)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_activation_in_stem_and_head_says_why(when: str) -> None:
    model, plain = small(3), small(3)
    if when == "after":
        dx.fuse(model)
    for each in (model, plain):
        each.features.relu0 = nn.LeakyReLU()
        each.class_layers.relu = nn.LeakyReLU()
    if when == "before":
        dx.fuse(model)
    x = images(3)
    assert_same_state(three_steps(model, x), three_steps(plain, x))
    assert checks.unfused_units(model) == {
        "features": "relu0 is a LeakyReLU, not a ReLU",
        "": "class_layers.relu is a LeakyReLU, not a ReLU",
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_head_says_why(when: str) -> None:
    def hook(model: Any) -> None:
        model.class_layers.flatten.register_forward_hook(lambda module, args, out: None)

    def hook_all(model: Any) -> None:
        model.class_layers.register_forward_pre_hook(lambda module, args: None)

    def larger(model: Any) -> None:
        model.class_layers.pool = nn.AdaptiveAvgPool2d(2)
        model.class_layers.out = nn.Linear(64, 10).double()

    def unflattened(model: Any) -> None:
        model.class_layers.flatten = nn.Flatten(1, 2)
        model.class_layers.out = nn.Linear(1, 10).double()

    def longer(model: Any) -> None:
        model.class_layers.add_module("softmax", nn.Softmax(1))

    def another(model: Any) -> None:
        model.class_layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10, dtype=torch.float64))

    runs = "its forward runs features, class_layers.relu, class_layers.pool, class_layers.flatten, class_layers.out"
    for change, before, after in (
        (hook, "class_layers.flatten has a forward hook", None),
        (hook_all, "class_layers has a forward pre-hook", None),
        (larger, "class_layers.pool has output size 2, not 1", None),
        (unflattened, runs, "class_layers.flatten flattens dimensions 1 to 2, not 1 to -1"),
        (longer, "", "class_layers has a child softmax that it had not when its forward became known"),
        (
            another,
            "class_layers.0 is a Flatten, not a ReLU",
            "class_layers has a child 1 that it had not when its forward became known",
        ),
    ):
        model, plain = small(2), small(2)
        if when == "after":
            dx.fuse(model)
        for each in (model, plain):
            torch.manual_seed(3)
            change(each)
            each(images(2))  # a lazy layer takes its shape
        if when == "before":
            dx.fuse(model)
        reason = before if when == "before" or after is None else after
        assert checks.unfused_units(model) == ({"": reason} if reason else {})  # one step more runs in the fused head
        outs = model(images(2)), plain(images(2))
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
        assert_same_gradients(model, plain)
        assert_same_state(model, plain)
        torch.testing.assert_close(model.eval()(images(2)), plain.eval()(images(2)))


def test_a_classifier_of_ones_own_stays_in_the_fused_head() -> None:
    model = small(3)
    model.class_layers.out = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    fused = checks.fused_copy(model)
    assert checks.unfused_units(fused) == {}
    torch.testing.assert_close(fused(images(3)), model(images(3)))


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_layer_that_runs_more_is_called_between_the_runs_of_the_others(layer: int) -> None:
    model = small(2, block_config=(4, 2))
    model.features.denseblock1.get_submodule(f"denselayer{layer}").layers.add_module("squeeze", nn.Softsign())
    fused = checks.fused_copy(model)
    called: list[str] = []
    for name, module in fused.named_modules():
        if name.endswith("squeeze"):
            module.register_forward_hook(lambda module, args, out: called.append("squeeze"))
    with entry.observed(lambda module, kind: called.append(kind)):
        fused(images(2))
    model(images(2))
    runs = ["dense block"] * (1 if layer in (1, 4) else 2)
    assert sorted(called) == sorted(["stem", *runs, "squeeze", "transition", "dense block", "head"])
    assert_same_state(three_steps(fused, images(2)), three_steps(model, images(2)))
    torch.testing.assert_close(fused.eval()(images(2)), model.eval()(images(2)))


def test_each_run_of_layers_has_one_row() -> None:
    model = small(2, block_config=(4, 2))
    model.features.denseblock1.denselayer2.layers.add_module("squeeze", nn.Softsign())
    names = [f"{BLOCK}.denselayer1", f"{BLOCK}.denselayer3", "features.denseblock2"]
    for fused in (False, True):
        found = dx.report(dx.fuse(model) if fused else model)
        assert [(row.name, row.fused) for row in found if row.kind == "dense block"] == [
            (name, fused) for name in names
        ]


def test_a_layer_that_runs_more_after_fuse_says_why() -> None:
    models = [dx.fuse(small(2)), small(2)]
    for model in models:
        model.features.denseblock1.denselayer2.layers.add_module("squeeze", nn.Softsign())
    reason = "denselayer2.layers has a child squeeze that it had not when its forward became known"
    assert checks.unfused_units(models[0]) == {BLOCK: reason}
    assert_same_state(*(three_steps(model, images(2)) for model in models))


def test_whatever_acts_through_a_layers_sequential_is_called() -> None:
    class Halved(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    def hook(layers: nn.Module) -> None:
        layers.register_forward_hook(lambda module, args, out: out * 2)

    def replace(layers: nn.Module) -> None:
        layers.forward = lambda x: nn.Sequential.forward(layers, x) * 2  # type: ignore[method-assign, arg-type]

    def derive(layers: nn.Module) -> None:
        layers.__class__ = Halved

    for change, before, after in (
        (hook, "denselayer2.layers has a forward hook", "denselayer2.layers has a forward hook"),
        (
            replace,
            "a forward in it was replaced on the instance",
            "denselayer2.layers has a forward that was replaced on the instance",
        ),
        (
            derive,
            "this block of _DenseLayer layers is not a known one: its values are not those of "
            "norm, ReLU, 1x1, norm, ReLU, 3x3 and concatenation",
            "denselayer2.layers is a Halved, not a Sequential",
        ),
    ):
        for when, reason in (("before", before), ("after", after)):
            models = [small(2), small(2)]
            if when == "after":
                dx.fuse(models[0])
            for model in models:
                change(model.features.denseblock1.denselayer2.layers)
            if when == "before":
                dx.fuse(models[0])
            assert checks.unfused_units(models[0]) == {BLOCK: reason}
            assert_same_state(*(three_steps(model, images(2)) for model in models))
