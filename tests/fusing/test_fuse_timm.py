"""`fuse` on timm's DenseNet: norms with the ReLU inside, several stems and heads, features_only."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from tests.support import library_checks as checks
from tests.support import peers
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, rows, three_steps
from tests.support.helpers import generator

BLOCK, LAYER = "features.denseblock1", "features.denseblock1.denselayer2"


def small(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"growth_rate": 4, "block_config": (2, 2), "bn_size": 2, "num_classes": 10, **kwargs}
    return peers.timm_densenet().DenseNet(**settings).double()


def blurred(seed: int = 0) -> Any:
    pool = importlib.import_module("timm.layers").BlurPool2d
    return small(seed, stem_type="deep_tiered", aa_layer=pool, aa_stem_only=False, growth_rate=8)


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator(1))


BUILD = {"usual": small, "deep": lambda: small(stem_type="deep"), "blur": blurred}


@pytest.fixture(params=BUILD)
def plain(request: pytest.FixtureRequest) -> Any:
    peers.timm_densenet()
    return BUILD[request.param]()


def test_training(plain: Any) -> None:
    checks.check_training(plain, images())


def test_evaluation(plain: Any) -> None:
    checks.check_evaluation(plain, images())


def test_fuse_leaves_no_trace(plain: Any) -> None:
    checks.check_no_trace(plain)


def test_copies(plain: Any) -> None:
    checks.check_copies(plain, images())


def test_autocast(plain: Any) -> None:
    checks.check_autocast(plain, images())


def test_captures() -> None:
    checks.check_captures(small(), images())


@pytest.mark.parametrize("part", ["norm2", "norm2.act", "norm1.drop", "conv2"])
def test_hooks(part: str) -> None:
    checks.check_hooks(small(), images(), LAYER, f"{LAYER}.{part}")


def test_state_dicts() -> None:
    plain = small()
    efficients = {name.replace("norm5", "norm_final"): tensor for name, tensor in plain.state_dict().items()}
    checks.check_state_dicts(plain, small(seed=1), efficients)


def test_what_is_fused() -> None:
    peers.timm_densenet()
    for name in ("usual", "deep"):
        model = dx.fuse(BUILD[name]())
        assert {row.kind for row in dx.report(model)} == {"stem", "dense block", "transition", "head"}
        assert checks.unfused_units(model) == {}
    model = dx.fuse(blurred())
    assert checks.unfused_units(model) == {"features": "pool0 is a Sequential, not a MaxPool2d"}
    assert [row.name for row in dx.report(model) if row.fused] == ["", BLOCK, "features.denseblock2"]  # no transition
    changed = dx.fuse(small())
    changed.features.transition1.pool = copy.deepcopy(model.features.transition1.pool)
    assert checks.unfused_units(changed) == {"features.transition1": "pool is a BlurPool2d, not a AvgPool2d"}


def test_another_activation_says_why() -> None:
    with pytest.warns(UserWarning, match="denselayer1.norm1 has an act that is a SiLU, not a ReLU"):
        model = dx.fuse(small(act_layer="silu"))
    assert not any(row.fused for row in dx.report(model))
    changed = dx.fuse(small())
    changed.features.denseblock1.denselayer1.norm1.act = nn.SiLU()
    assert checks.unfused_units(changed) == {BLOCK: "denselayer1.norm1 has an act that is a SiLU, not a ReLU"}


def test_grad_checkpointing_saves_features_and_moves_statistics_once() -> None:
    plain, model = small(), small()
    model.set_grad_checkpointing()
    dx.fuse(model)
    assert {row.save for row in dx.report(model) if row.kind == "dense block"} == {"features"}
    # not equal to timm's own memory mode, whose recomputation moves the running statistics again
    assert_same_state(three_steps(model, images()), three_steps(plain, images()))
    explicit = dx.fuse(small(memory_efficient=True), save="bottlenecks")
    assert {row.save for row in dx.report(explicit) if row.kind == "dense block"} == {"bottlenecks"}
    assert dx.verify(small(memory_efficient=True), images()).max_buffer < 1e-12


def test_dropout_in_layers_and_head() -> None:
    model = small(drop_rate=0.5, proj_drop_rate=0.5)
    fused = checks.fused_copy(model)
    assert checks.unfused_units(fused) == {}
    torch.testing.assert_close(fused.eval()(images()), model.eval()(images()))
    fused.train()
    assert not torch.equal(fused(images()), fused(images()))
    result = dx.verify(fused, images())  # the head's dropout draws the same mask in both
    assert result.max_output < 1e-12 and result.fused_units == 5


def test_dropout_inside_of_a_norm_says_why() -> None:
    plain, fused = small(), dx.fuse(small())
    for model in (plain, fused):
        model.features.denseblock1.denselayer1.norm1.drop = nn.Dropout(0.5)
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()))
    assert rows(fused)[BLOCK].reason == "denselayer1.norm1 has a drop that is a Dropout, not a plain Identity"


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_classes": 0}, None),
        ({"num_classes": 0, "global_pool": ""}, "global_pool.pool is a Identity, not a AdaptiveAvgPool2d"),
        ({"global_pool": "max"}, "global_pool.pool is a AdaptiveMaxPool2d, not a AdaptiveAvgPool2d"),
        ({"global_pool": "catavgmax"}, "global_pool.pool is a AdaptiveCatAvgMaxPool2d, not a AdaptiveAvgPool2d"),
        ({"global_pool": "fast"}, "global_pool.pool is a FastAdaptiveAvgPool, not a AdaptiveAvgPool2d"),
    ],
    ids=str,
)
def test_heads(settings: dict[str, Any], reason: str | None, when: str) -> None:
    fused = dx.fuse(small(**settings) if when == "before" else small())
    if when == "after":
        fused.reset_classifier(settings.get("num_classes", 10), settings.get("global_pool", "avg"))
    plain = dx.unfuse(copy.deepcopy(fused))
    outs = fused(images()), plain(images())
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(fused, plain)
    assert_same_state(fused, plain)
    if when == "before" and settings.get("global_pool") == "":
        reason = "its forward runs features, head_drop, classifier"
    assert rows(fused)[""].reason == reason


def test_forward_features_and_forward_head() -> None:
    plain = small().eval()
    fused = checks.fused_copy(plain)
    features = fused.forward_features(images())
    torch.testing.assert_close(features, plain.forward_features(images()))
    assert features.is_contiguous()
    torch.testing.assert_close(fused.forward_head(features), plain(images()))
    torch.testing.assert_close(
        fused.forward_head(features, pre_logits=True), plain.forward_head(features, pre_logits=True)
    )
    torch.testing.assert_close(fused.forward_intermediates(images()), plain.forward_intermediates(images()))


def _hook(model: Any) -> None:
    model.features.norm5.register_forward_hook(lambda module, args, out: out * 2)


def _hook_inside(model: Any) -> None:
    model.global_pool.flatten.register_forward_hook(lambda module, args, out: out * 2)


def _replaced(model: Any) -> None:
    model.forward_features = lambda x: model.features(x) * 2


def _not_activated(model: Any) -> None:
    model.features.norm5 = nn.BatchNorm2d(model.num_features).double()


def _another_pool(model: Any) -> None:
    model.global_pool = nn.Flatten()
    model.classifier = nn.LazyLinear(10, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (_hook, "norm5 has a forward hook", "norm5 has a forward hook"),
        (_hook_inside, "global_pool.flatten has a forward hook", "global_pool.flatten has a forward hook"),
        (_replaced, "forward_features", "forward_features"),
        (_not_activated, "global_pool.pool is a AdaptiveAvgPool2d, not a ReLU", "norm5 is a BatchNorm2d"),
        (
            _another_pool,
            "global_pool is a Flatten, not a AdaptiveAvgPool2d",
            "global_pool is a Flatten, not a SelectAdaptivePool2d",
        ),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_head_says_why(change: Any, before: str, after: str, when: str) -> None:
    models = [small(), small()]
    if when == "after":
        dx.fuse(models[0])
    for model in models:
        change(model)
        torch.manual_seed(3)
        model(images())  # a lazy layer takes its shape
    if when == "before":
        dx.fuse(models[0])
    outs = [model(images()) for model in models]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(*models)
    assert_same_state(*models)
    assert (before if when == "before" else after) in (rows(models[0])[""].reason or "")


def _doubled(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


@pytest.mark.parametrize("name", ["", f"{LAYER}"], ids=["model", "layer"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_function_that_is_replaced_on_the_instance_is_called(name: str, when: str) -> None:
    models = [small(), small()]
    if when == "after":
        dx.fuse(models[0])
    for model in models:
        module = model.get_submodule(name)
        function = "bottleneck_fn" if name else "forward_head"
        setattr(module, function, _doubled(getattr(module, function)))
    if when == "before":
        dx.fuse(models[0])
        assert_same_state(*models)  # nothing of it ran
    assert_same_state(*(three_steps(model, images()) for model in models))
    assert set(checks.unfused_units(models[0])) == {BLOCK if name else ""}


def test_a_pruned_model() -> None:
    plain = small()
    fused = checks.fused_copy(plain)
    for model in (plain, fused):
        model.prune_intermediate_layers(1)
    torch.testing.assert_close(fused(images()), plain(images()))
    assert rows(fused)[""].reason is not None and rows(fused)[BLOCK].fused


# ---- classes that are only spelled alike -----------------------------------------------------------------------------


def test_a_subclass_with_its_own_forward_stays_unfused() -> None:
    module = peers.timm_densenet()

    class Net(module.DenseNet):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(x.sqrt(), pre_logits)

    class Layer(module.DenseLayer):
        def bottleneck_fn(self, xs: list[Tensor]) -> Tensor:
            return super().bottleneck_fn(xs) * 2

    plain = small()
    plain.__class__ = Net
    for layer in plain.features.denseblock2.children():
        layer.__class__ = Layer
    fused = checks.fused_copy(plain)
    found = checks.unfused_units(fused)
    assert set(found) == {"", "features.denseblock2"}
    runs = "features, sqrt, global_pool.pool, global_pool.flatten, head_drop, classifier"
    assert found[""] == f"its forward runs {runs}"
    assert found["features.denseblock2"] == (
        "this block of Layer layers is not a known one: its values are not those of "
        "norm, ReLU, 1x1, norm, ReLU, 3x3, dropout and concatenation"
    )
    torch.testing.assert_close(fused(images()), plain(images()))


def test_a_subclass_that_does_the_same_runs_fused() -> None:
    module = peers.timm_densenet()

    class Net(module.DenseNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x))

    class Layer(module.DenseLayer):
        def bottleneck_fn(self, xs: list[Tensor]) -> Tensor:
            return self.conv1(self.norm1(torch.cat(tuple(xs), dim=1)))

    plain = small()
    plain.__class__ = Net
    for block in (plain.features.denseblock1, plain.features.denseblock2):
        for layer in block.children():
            layer.__class__ = Layer
    fused = checks.fused_copy(plain)
    assert checks.unfused_units(fused) == {}
    assert_same_state(three_steps(fused, images()), three_steps(plain, images()))


def test_a_norm_of_another_version_stays_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm_act = type(small().features.norm0)
    monkeypatch.setattr(norm_act, "forward", lambda self, x: self.act(self.drop(nn.BatchNorm2d.forward(self, -x))))
    other = "denselayer1.norm1 has a function that was replaced"
    with pytest.warns(UserWarning, match=other):
        model = dx.fuse(small())
    assert rows(model)[BLOCK].reason == other
    assert not any(row.fused for row in dx.report(model))


# ---- features_only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [{}, {"feature_cls": "dict"}], ids=["list", "dict"])
def test_features_only(flag: dict[str, str]) -> None:
    peers.timm_densenet()
    create = importlib.import_module("timm").create_model
    torch.manual_seed(0)
    settings = {"growth_rate": 4, "block_config": (2, 2), "bn_size": 2, "out_indices": (0, 1, 2)}
    plain = create("densenet121", features_only=True, **settings, **flag).double()
    fused = checks.fused_copy(plain)
    found = rows(fused)
    assert found[""].reason == "its parts run one by one, for the features between them"
    assert [row.kind for row in found.values() if row.fused] == ["dense block", "transition", "dense block"]
    for x in (images(), images().contiguous(memory_format=torch.channels_last)):
        for model in (fused, plain):
            model.zero_grad()
        taps = [model(x) for model in (fused, plain)]
        assert type(taps[0]) is type(taps[1])
        taps = [list(tap.values()) if isinstance(tap, dict) else tap for tap in taps]
        torch.testing.assert_close(*taps)
        assert all(tap.is_contiguous() == x.is_contiguous() for tap in taps[0])
        for found_taps in taps:
            sum(tap.square().sum() for tap in found_taps).backward()
        for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_state(fused, plain)


@pytest.mark.parametrize("how", ["hook", "getter"])
def test_features_by_hooks_and_by_forward_intermediates(how: str) -> None:
    peers.timm_densenet()
    create = importlib.import_module("timm").create_model
    torch.manual_seed(0)
    settings = {"growth_rate": 4, "block_config": (2, 2), "bn_size": 2, "out_indices": (0, 1, 2)}
    plain = create("densenet121", features_only=True, feature_cls=how, **settings).double()
    fused = checks.fused_copy(plain)
    assert sum(row.fused for row in dx.report(fused) if row.kind == "dense block") == 2
    torch.testing.assert_close(fused(images()), plain(images()))
    assert_same_state(fused, plain)


def test_timms_sync_batch_norm_is_never_taken_for_another() -> None:
    model = dx.fuse(small())
    model = importlib.import_module("timm.layers").convert_sync_batchnorm(model)
    assert not any(row.fused for row in dx.report(model))
    assert rows(model)[BLOCK].reason == "denselayer1.norm1 is a SyncBatchNormAct, which has code of its own"
    torch.testing.assert_close(model.eval()(images()), small().eval()(images()))


def test_named_networks() -> None:
    peers.timm_densenet()
    create = importlib.import_module("timm").create_model
    model = dx.fuse(create("densenetblur121d"))
    found = rows(model)
    assert sum(row.fused for row in found.values()) == 8  # all but the stem, whose pooling blurs
    assert found["features"].reason == "pool0 is a Sequential, not a MaxPool2d"
