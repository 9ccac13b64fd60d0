"""`fuse` on MONAI's DenseNet in one to three dimensions, beside what test_matrix.py tests of it."""

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
from tests.support.fusing_helpers import assert_same_state, three_steps
from tests.support.helpers import generator
from tests.support.monai_networks import BLOCK, images, small

DIMS = [1, 2, 3]
LAYER = f"{BLOCK}.denselayer2"


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
