"""`fuse` on MONAI's DenseNet in one to three dimensions."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import library_checks as checks
import lookalikes
import peers
import pytest
import torch
from fusing_helpers import assert_same_state, rows, three_steps
from helpers import generator
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.fusing.forwards import FusedBlock
from densenet_ext.fusing.surroundings import FusedTransition

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
def test_sync_batch_norm_is_the_same_class_in_all_dimensions(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small(dims)
    fused = dx.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    assert checks.unfused_units(fused) == {}
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", None)  # nothing calls a norm
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
    with pytest.warns(UserWarning, match="none of the 2 dense blocks.*norm1 is a InstanceNorm3d, not a BatchNorm3d"):
        found = rows(dx.fuse(small(3, norm="instance")))
    assert not any(row.fused for row in found.values())
    with pytest.warns(UserWarning, match="relu1 is a LeakyReLU, not a ReLU"):
        found = rows(dx.fuse(small(3, act=("leakyrelu", {}))))
    assert found["features"].reason == "relu0 is a LeakyReLU, not a ReLU"
    assert found[""].reason == "class_layers.relu is a LeakyReLU, not a ReLU"


def test_a_changed_head_says_why() -> None:
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

    for change, reason in (
        (hook, "class_layers.flatten has a forward hook"),
        (hook_all, "class_layers has a forward pre-hook"),
        (larger, "class_layers.pool has output size 2, not 1"),
        (unflattened, "class_layers.flatten flattens dimensions 1 to 2, not 1 to -1"),
        (longer, "class_layers has other children than expected: relu, pool, flatten, out, softmax"),
        (another, "class_layers has other children than expected: 0, 1"),
    ):
        model = small(2)
        torch.manual_seed(3)
        change(model)
        model(images(2))  # a lazy layer takes its shape
        fused = checks.fused_copy(model)
        assert checks.unfused_units(fused) == {"": reason}
        torch.testing.assert_close(fused(images(2)), model(images(2)))


def test_a_classifier_of_ones_own_stays_in_the_fused_head() -> None:
    model = small(3)
    model.class_layers.out = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    fused = checks.fused_copy(model)
    assert checks.unfused_units(fused) == {}
    torch.testing.assert_close(fused(images(3)), model(images(3)))


def test_a_layer_that_runs_more_says_why() -> None:
    model = small(2)
    model.features.denseblock1.denselayer2.layers.add_module("squeeze", nn.Softsign())
    fused = checks.fused_copy(model)
    assert "denselayer2 holds a Sequential that has other children" in (rows(fused)[BLOCK].reason or "")
    torch.testing.assert_close(fused(images(2)), model(images(2)))


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

    for change, reason in (
        (hook, "has a forward hook"),
        (replace, "has a forward that was replaced on the instance"),
        (derive, "is a Halved, not a plain Sequential"),
    ):
        models = [dx.fuse(small(2)), small(2)]
        for model in models:
            change(model.features.denseblock1.denselayer2.layers)
        assert checks.unfused_units(models[0]) == {BLOCK: f"denselayer2 holds a Sequential that {reason}"}
        torch.testing.assert_close(models[0](images(2)), models[1](images(2)))


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


@pytest.mark.parametrize("dims", [2, 3])
def test_dropout_of_whole_channels_runs_unfused_in_training(dims: int) -> None:
    with pytest.warns(UserWarning, match=f"dropout is a Dropout{dims}d, which drops whole channels"):
        model = dx.fuse(small(dims, dropout_prob=0.5))
    x = images(dims)
    torch.manual_seed(2)
    out = model(x)
    torch.manual_seed(2)
    torch.testing.assert_close(out, copy.deepcopy(dx.unfuse(model))(x))
    dx.fuse(model.eval())
    assert checks.unfused_units(model) == {}
    torch.testing.assert_close(model(x), dx.unfuse(model)(x))


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
        with monkeypatch.context() as patch:
            patch.setattr(FusedBlock, "original", None)  # that it runs fused
            patch.setattr(FusedTransition, "original", None)
            fused(x)
        plain(x)
        for got, wanted in zip(*seen, strict=True):
            assert type(got) is meta_tensor and got.is_batch is batch
            assert got.meta["filename"] == wanted.meta["filename"] == x.meta["filename"]
            assert torch.equal(got.affine, wanted.affine) and got.affine[0, 0] == 2
            torch.testing.assert_close(got.as_tensor(), wanted.as_tensor())
    assert checks.unfused_units(fused) == {}
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
