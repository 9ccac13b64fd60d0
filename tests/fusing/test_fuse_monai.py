"""`fuse` on MONAI's DenseNet in one to three dimensions."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units import entry
from tests.support import library_checks as checks
from tests.support import lookalikes, peers
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, three_steps
from tests.support.helpers import generator

DIMS = [1, 2, 3]
BLOCK, LAYER = "features.denseblock1", "features.denseblock1.denselayer2"


def small(dims: int, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2, **kwargs}
    return peers.monai_densenet().DenseNet(dims, in_channels=2, out_channels=10, **settings).double()


def images(dims: int, n: int = 3) -> Tensor:
    size = (64, 32, 24)[dims - 1]
    return torch.randn(n, 2, *[size] * dims, dtype=torch.float64, generator=generator(1))


@pytest.mark.parametrize("dims", DIMS)
def test_training(dims: int) -> None:
    checks.check_training(small(dims), images(dims))


@pytest.mark.parametrize("dims", DIMS)
def test_evaluation(dims: int) -> None:
    checks.check_evaluation(small(dims), images(dims))


@pytest.mark.parametrize("dims", DIMS)
def test_every_unit_is_fused_and_leaves_no_trace(dims: int) -> None:
    model = small(dims)
    checks.check_no_trace(model)
    assert {row.kind for row in dx.report(model)} == {"stem", "dense block", "transition", "head"}
    assert checks.unfused_units(dx.fuse(model)) == {}


@pytest.mark.parametrize("dims", DIMS)
def test_sync_batch_norm_is_the_same_class_in_all_dimensions(dims: int) -> None:
    plain = small(dims)
    fused = dx.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    assert checks.unfused_units(fused) == {}
    ran: list[str] = []
    with entry.observed(lambda module, kind: ran.append(kind)):
        fused(images(dims))
    assert set(ran) == {"stem", "dense block", "transition", "head"}
    fused.load_state_dict(plain.state_dict())
    x = images(dims)
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("dims", DIMS)
def test_copies(dims: int) -> None:
    checks.check_copies(small(dims), images(dims))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", DIMS)
def test_compile(dims: int, training: bool) -> None:
    checks.check_compile(small(dims), images(dims), training)


@pytest.mark.parametrize("dims", DIMS)
def test_autocast(dims: int) -> None:
    checks.check_autocast(small(dims), images(dims))


@pytest.mark.parametrize("dims", DIMS)
def test_hooks(dims: int) -> None:
    checks.check_hooks(small(dims), images(dims), LAYER, f"{LAYER}.layers.relu2")


@pytest.mark.parametrize("dims", DIMS)
def test_verify(dims: int) -> None:
    result = dx.verify(small(dims, dropout_prob=0.1), images(dims))
    assert result.fused_units == 5 and result.max_output < 1e-12 and result.max_buffer < 1e-12
    # norm0's bias has no gradient but for rounding: every maximum of a window passes its ReLU, and norms follow
    assert max(error for name, error in result.gradients.items() if "norm0.bias" not in name) < 1e-8
    assert "dropout of the dense layers was off" in result.notes


# ---- state dicts -----------------------------------------------------------------------------------------------------


def test_state_dicts() -> None:
    plain = small(2)
    torchvisions = {
        name.replace(".layers.", ".").replace("class_layers.out", "classifier"): tensor
        for name, tensor in plain.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm1.weight" in torchvisions and "classifier.weight" in torchvisions
    efficients = {name.replace("norm5", "norm_final"): tensor for name, tensor in torchvisions.items()}
    checks.check_state_dicts(plain, small(2, seed=1), torchvisions, efficients)


def test_others_take_monais_state_dict() -> None:
    state = small(2).state_dict()
    own = dx.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=10, in_channels=2).double()
    own.load_state_dict(state)
    torch.testing.assert_close(own.eval()(images(2)), small(2).eval()(images(2)))
    torch.manual_seed(0)
    other = lookalikes.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, small_inputs=False
    ).double()
    other.features.conv0 = nn.Conv2d(2, 8, 7, stride=2, padding=3, bias=False).double()
    dx.fuse(other).load_state_dict(state)
    torch.testing.assert_close(other.eval()(images(2)), small(2).eval()(images(2)))


def test_the_state_dict_of_another_network_is_refused() -> None:
    model = dx.fuse(small(3))
    with pytest.raises(RuntimeError, match=r"expected growth_rate=4, got growth_rate=6\."):
        model.load_state_dict(small(3, growth_rate=6).state_dict())
    with pytest.raises(RuntimeError, match=r"conv0.weight: expected \[8, 2, 7, 7, 7\], got \[8, 2, 7, 7\]"):
        model.load_state_dict(small(2).state_dict())


# ---- what is not fused -----------------------------------------------------------------------------------------------


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


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_of_single_values_is_fused() -> None:
    model = dx.fuse(small(1, dropout_prob=0.5))  # in one dimension MONAI takes nn.Dropout
    assert checks.unfused_units(model) == {}
    x, outs = images(1), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    model.eval()
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()  # Monte Carlo dropout: what counts is the dropout module's own mode
    assert not torch.equal(model(x), model(x))


class Factors(nn.Module):
    """Multiplies with what a dropout multiplied with."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("dims", DIMS)
def test_dropout_of_values_and_of_whole_channels_equals_the_unfused(dims: int, save: str) -> None:
    """The unfused block, given the factors that the fused one drew, has its values, gradients and statistics."""
    plain = small(dims, dropout_prob=0.5)
    fused = checks.fused_copy(plain, save)
    assert checks.unfused_units(fused) == {}
    torch.testing.assert_close(fused.eval()(images(dims)), plain.eval()(images(dims)))
    ours, theirs = fused.train().features.denseblock1, plain.train().features.denseblock1
    x = torch.randn(3, 8, *[6] * dims, dtype=torch.float64, generator=generator(1))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(2)
    out = ours(xs[0])
    factors = torch.where(out[:, 8:] == 0, 0.0, 2.0).double()
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    for drawn in factors.flatten(2).flatten(0, 1):
        assert (len(drawn.unique()) == 1) == (dims > 1)  # in one dimension MONAI takes nn.Dropout
    for i, layer in enumerate(theirs.children()):
        assert type(layer.layers.dropout) is (nn.Dropout, nn.Dropout2d, nn.Dropout3d)[dims - 1]
        layer.layers.dropout = Factors(factors[:, 4 * i : 4 * i + 4])
    wanted = theirs(xs[1])
    torch.testing.assert_close(out, wanted)
    for result in (out, wanted):
        result.pow(3).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    torch.manual_seed(2)
    assert torch.equal(ours(x), out) and not torch.equal(ours(x), out)


# ---- parts of a model ------------------------------------------------------------------------------------------------


def test_a_submodule_and_a_model_that_contains_one() -> None:
    class Net(nn.Module):
        def __init__(self, backbone: Any) -> None:
            super().__init__()
            self.backbone = backbone.features
            self.head = nn.Linear(16, 10).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x).mean((2, 3, 4)))

    torch.manual_seed(0)
    plain = Net(small(3))
    assert_same_state(three_steps(checks.fused_copy(plain), images(3)), three_steps(plain, images(3)))
    model = small(3)
    dx.fuse(model.features.denseblock2)
    assert [row.name for row in dx.report(model) if row.fused] == ["features.denseblock2"]
    torch.testing.assert_close(model(images(3)), small(3)(images(3)))


def test_before_and_after_to_and_load() -> None:
    x = images(2).float()
    before = dx.fuse(small(2)).to(torch.float32)
    after = dx.fuse(small(2).to(torch.float32))
    for model in (before, after):
        model.load_state_dict(small(2, seed=5).state_dict())
    torch.testing.assert_close(before(x), after(x), rtol=0, atol=0)
    torch.testing.assert_close(before(x), small(2, seed=5).float()(x), rtol=1e-3, atol=1e-4)


def test_named_networks() -> None:
    torch.manual_seed(0)
    model = dx.fuse(peers.monai_densenet().DenseNet121(spatial_dims=3, in_channels=1, out_channels=2))
    assert checks.unfused_units(model) == {} and len(dx.report(model)) == 9


# ---- MetaTensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [True, False])
def test_a_meta_tensor_runs_fused_and_keeps_its_metadata(batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.monai_densenet()
    meta_tensor = importlib.import_module("monai.data").MetaTensor
    plain = small(3)
    fused = checks.fused_copy(plain)
    x = meta_tensor(images(3), affine=2 * torch.eye(4), meta={"filename": ["a", "b", "c"] if batch else "a"})
    x.is_batch = batch
    for units in ([""], [BLOCK, "features.transition1"]):  # whole units may have hooks
        seen: list[list[Any]] = []
        for model in (fused, plain):
            seen.append([])
            for name in units:
                model.get_submodule(name).register_forward_hook(
                    lambda module, args, out, found=seen[-1]: found.append(out)
                )
        ran: list[str] = []
        with entry.observed(lambda module, kind, ran=ran: ran.append(kind)):
            fused(x)
        assert ran.count("dense block") == 2 and ran.count("transition") == 1
        plain(x)
        for got, wanted in zip(*seen, strict=True):
            assert type(got) is meta_tensor and got.is_batch is batch
            assert got.meta["filename"] == wanted.meta["filename"] == x.meta["filename"]
            assert torch.equal(got.affine, wanted.affine) and got.affine[0, 0] == 2
            torch.testing.assert_close(got.as_tensor(), wanted.as_tensor())
    assert checks.unfused_units(fused) == {}
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
