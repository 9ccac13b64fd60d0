"""`fuse` on torchxrayvision's DenseNet: layers that are Sequentials, `features2`, weights that are pickled models."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units import entry
from tests.support import library_checks as checks
from tests.support import peers
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, rows, three_steps
from tests.support.helpers import generator

BLOCK, LAYER = "features.denseblock1", "features.denseblock1.denselayer2"
SMALL = {"num_init_features": 8, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2}


def small(seed: int = 0, **kwargs: Any) -> Any:
    module = peers.torchxrayvision_models()
    torch.manual_seed(seed)
    return module.DenseNet(**{**SMALL, **kwargs}).double()


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 1, size, size, dtype=torch.float64, generator=generator(1)) * 1000


def test_training() -> None:
    checks.check_training(small(), images())


def test_evaluation() -> None:
    checks.check_evaluation(small(), images())


def test_every_unit_is_fused_and_leaves_no_trace() -> None:
    model = small()
    checks.check_no_trace(model)
    assert {row.kind for row in dx.report(model)} == {"stem", "dense block", "transition", "head"}
    assert checks.unfused_units(dx.fuse(model)) == {}


def test_copies() -> None:
    checks.check_copies(small(), images())


def test_autocast() -> None:
    checks.check_autocast(small(), images())


def test_captures() -> None:
    checks.check_captures(small(), images(), scripts=False)


def test_hooks() -> None:
    checks.check_hooks(small(), images(), LAYER, f"{LAYER}.relu1")


def test_state_dicts() -> None:
    plain = small()
    monais = {
        name.replace("classifier", "class_layers.out").replace(".norm", ".layers.norm").replace(".conv", ".layers.conv")
        if "denselayer" in name or "classifier" in name
        else name: tensor
        for name, tensor in plain.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.layers.norm1.weight" in monais
    checks.check_state_dicts(plain, small(seed=1), monais)


def test_the_head_equals_the_unfused() -> None:
    plain = small()
    fused = checks.fused_copy(plain)
    ran: list[str] = []
    x = images().requires_grad_(), images().requires_grad_()
    with entry.observed(lambda module, kind: ran.append(kind)):
        outs = fused(x[0]), plain(x[1])
    assert ran.count("head") == 1
    torch.testing.assert_close(*outs)
    for out in outs:
        out.pow(3).sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad)
    assert_same_gradients(fused, plain)
    assert_same_state(fused, plain)


def test_features_and_features2() -> None:
    plain = small().eval()
    fused = checks.fused_copy(plain)
    torch.testing.assert_close(fused.features(images()), plain.features(images()))
    torch.testing.assert_close(fused.features2(images()), plain.features2(images()))
    assert fused.features(images()).is_contiguous()


def test_sigmoid() -> None:
    plain = small(apply_sigmoid=True)
    fused = checks.fused_copy(plain)
    runs = "its forward runs features, relu, adaptive_avg_pool2d, view, classifier, sigmoid"
    assert checks.unfused_units(fused) == {"": runs}
    outs = [model(images()) for model in (fused, plain)]
    torch.testing.assert_close(*outs)
    assert outs[0].min() >= 0 and outs[0].max() <= 1
    for model in (fused, plain):
        three_steps(model, images())
    assert_same_state(fused, plain)


def test_operating_points() -> None:
    plain = small(op_threshs=torch.linspace(0.1, 0.9, 18)).float().eval()  # the library computes them in float32 only
    fused = checks.fused_copy(plain)
    found = checks.unfused_units(fused)
    assert set(found) == {""} and (found[""] or "").startswith("its forward could not be followed")
    x, raw = images().float() / 1e6, small().float().eval()
    outs = fused(x), plain(x)
    torch.testing.assert_close(*outs)
    assert not torch.allclose(outs[0], raw(x).sigmoid())


def test_dropout() -> None:
    plain = small(drop_rate=0.5)
    fused = checks.fused_copy(plain)
    assert rows(fused)[BLOCK].fused
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()))
    fused.train()
    assert not torch.equal(fused(images()), fused(images()))
    assert dx.verify(fused, images()).max_output < 1e-12


def test_pretrained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weights file is a pickled model; the library takes its state dict, thresholds and resolution."""
    module = peers.torchxrayvision_models()
    name = "densenet121-res224-nih"
    saved = small(seed=7).float()
    torch.save(saved, tmp_path / module.model_urls[name]["weights_url"].rpartition("/")[2])
    plain = module.DenseNet(weights=name, cache_dir=str(tmp_path), **SMALL)
    fused = checks.fused_copy(plain)
    found = checks.unfused_units(fused)
    assert set(found) == {""} and (found[""] or "").startswith("its forward could not be followed")
    x = images(2, 40).float()  # which both resize to 224
    outs = fused(x), plain(x)
    torch.testing.assert_close(*outs)
    assert outs[0].shape == (2, 18) and bool((outs[0][:, 14:] == 0.5).all())  # labels without an operating point
    assert "resize" in capsys.readouterr().out
    fused.load_state_dict(plain.state_dict())


def test_a_pickled_model_of_before_is_fused() -> None:
    """Pickles of torch 0.4: modules without the attributes that came later."""
    plain = small()
    for module in plain.modules():
        for attribute in ("_backward_pre_hooks", "_non_persistent_buffers_set", "_state_dict_hooks"):
            module.__dict__.pop(attribute, None)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fused = checks.fused_copy(loaded)
    assert checks.unfused_units(fused) == {}
    torch.testing.assert_close(fused(images()), small()(images()))


def test_published_checkpoints_carry_dotted_names() -> None:
    plain, model = small(), nn.Sequential(small(seed=1))
    dx.fuse(model)
    dotted = {
        name.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in name else name: tensor
        for name, tensor in plain.state_dict().items()
        if "num_batches_tracked" not in name
    }
    model[0].load_state_dict(dotted)
    torch.testing.assert_close(model.eval()(images()), plain.eval()(images()))
    assert not any(module._load_state_dict_pre_hooks for module in dx.unfuse(model).modules())


# ---- what is not fused -----------------------------------------------------------------------------------------------


def squeezed(model: Any) -> Any:
    model.features.denseblock1.denselayer2.add_module("squeeze", nn.Softsign())
    return model


def test_a_layer_that_runs_more_is_called_beside_the_run_of_the_others() -> None:
    plain = squeezed(small(block_config=(4, 2)))
    fused = checks.fused_copy(plain)
    called: list[str] = []
    fused.features.denseblock1.denselayer2.squeeze.register_forward_hook(lambda *_: called.append("squeeze"))
    with entry.observed(lambda module, kind: called.append(kind)):
        fused(images())
    plain(images())
    kinds = ["stem", "dense block", "dense block", "squeeze", "transition", "dense block", "head"]
    assert sorted(called) == sorted(kinds)
    assert_same_state(three_steps(fused, images()), three_steps(plain, images()))
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()))


def test_a_layer_that_runs_more_after_fuse_says_why() -> None:
    models = squeezed(dx.fuse(small())), squeezed(small())
    reason = "denselayer2 has a child squeeze that it had not when its forward became known"
    assert checks.unfused_units(models[0]) == {BLOCK: reason}
    assert_same_state(*(three_steps(model, images()) for model in models))


def layers_of_ones_own() -> tuple[Any, Any, Any]:
    """Layers that double their values, that join them in front, and that never drop; spelled as the library's."""
    module = peers.torchxrayvision_models()

    class Doubled(module._DenseLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class NewFirst(module._DenseLayer):
        def forward(self, x: Tensor) -> Tensor:
            new = nn.functional.dropout(nn.Sequential.forward(self, x), self.drop_rate, self.training)
            return torch.cat([new, x], 1)

    class Undropped(module._DenseLayer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, nn.Sequential.forward(self, x)], 1)

    for kind in (Doubled, NewFirst, Undropped):
        kind.forward.__qualname__ = "_DenseLayer.forward"
    return Doubled, NewFirst, Undropped


DOUBLED = (
    "this block of Doubled layers is not a known one: its values are not those of "
    "norm, ReLU, 1x1, norm, ReLU, 3x3, dropout and concatenation"
)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_layers_of_ones_own_run_fused_where_they_do_the_same(rate: float) -> None:
    plain = small(block_config=(2, 2, 2), drop_rate=rate)
    for i, kind in enumerate(layers_of_ones_own(), start=1):
        for layer in plain.features.get_submodule(f"denseblock{i}").children():
            layer.__class__ = kind
    fused = checks.fused_copy(plain)
    assert checks.unfused_units(fused) == {BLOCK: DOUBLED}
    x = images(size=64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    for model in (fused, plain):  # where dropout draws, both would have other numbers
        model.train()
        for layer in [*model.features.denseblock1.children(), *model.features.denseblock2.children()]:
            layer.drop_rate = 0.0
    assert [layer.drop_rate for layer in fused.features.denseblock3.children()] == [rate, rate]
    assert_same_state(three_steps(fused, x), three_steps(plain, x))


def test_a_layer_of_its_own_among_others_is_called() -> None:
    doubled, _, _ = layers_of_ones_own()
    plain = small()
    plain.features.denseblock1.denselayer1.__class__ = doubled
    fused = checks.fused_copy(plain)
    ran: list[str] = []
    with entry.observed(lambda module, kind: ran.append(kind)):
        fused(images())
    plain(images())
    assert sorted(ran) == ["dense block", "dense block", "head", "stem", "transition"]
    assert_same_state(three_steps(fused, images()), three_steps(plain, images()))
    models = dx.fuse(small()), small()
    for model in models:
        model.features.denseblock1.denselayer1.__class__ = doubled
    assert checks.unfused_units(models[0]) == {BLOCK: "denselayer1 is a Doubled, not a _DenseLayer"}
    assert_same_state(*(three_steps(model, images()) for model in models))


def test_the_whole_library_model_in_its_size() -> None:
    module = peers.torchxrayvision_models()
    model = dx.fuse(copy.deepcopy(module.DenseNet()))
    assert len(dx.report(model)) == 9 and checks.unfused_units(model) == {}
