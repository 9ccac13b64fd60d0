"""`fuse` on dense blocks of somebody's own code: each style against its unfused self; the nearly dense is refused."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.fusing import find, trials
from densenet_ext.units.block import Block, Drop
from densenet_ext.units.entry import unit_of
from tests.support import own_code as own
from tests.support.covering import BACKENDS, pairs
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, images, rows, three_steps
from tests.support.helpers import DEVICE, F64, assert_equal, kept_for_backward

BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "F.relu, new in front": (lambda: own.chain(own.Narrow), {"new_first": True}),
    "F.relu, new behind": (lambda: own.chain(own.NarrowBehind), {"new_first": False}),
    "one ReLU for two": (lambda: own.chain(own.Shared), {"drops": (Drop("", "droprate"),)}),
    "growth differs": (lambda: own.chain(own.Shared, growth=(2, 5, 1, 4)), {}),
    "drops twice at rate 0": (
        lambda: own.chain(own.TwiceDropped),
        {"drops": (Drop("", "droprate", inner=True), Drop("", "droprate"))},
    ),
    "no bottleneck": (lambda: own.chain(own.Single, growth=(4, 6, 2)), {"drops": (Drop("", "droprate"),)}),
    "layers are Sequentials": (lambda: own.chain(own.InSequence), {"drops": (Drop("", "drop_rate"),)}),
    "a wrapped Sequential": (lambda: own.Wrapped(own.chain(own.Single)), {"layers": ("layer.0", "layer.1", "layer.2")}),
    "a ModuleList": (
        lambda: own.Grown(8, (4, 5, 3)),
        {"layers": ("layers.0", "layers.1", "layers.2"), "returns": "all", "drops": (Drop("composite.3", "p"),)},
    ),
    "only the new features": (lambda: own.Grown(8, (4, 4, 4), everything=False), {"returns": "new"}),
    "attributes given a list": (lambda: own.Listed(8, 6), {"layers": ("a", "b")}),
    "one layer": (lambda: own.chain(own.Narrow, growth=(12,)), {"new_first": True}),
}

NEARLY: dict[type[nn.Module], str] = {
    own.Scaled: "its values are not those of norm, ReLU, 1x1, norm, ReLU, 3x3 and concatenation",
    own.Activated: "its values are not those",
    own.Leaky: "its values are not those",
    own.Detached: "its gradients are not those",
    own.ActivationFirst: "its values are not those",
    own.SkipOfNormalised: "its values are not those",
    own.ScaledInEvaluation: "its values are not those",
    own.Noisy: "it draws random numbers other than by dropout",
    own.Counting: "it changes calls of a Counting",
    own.FixedRate: "its values are not those",
    own.AlwaysDropping: "its values are not those of norm, ReLU, 1x1, norm, ReLU, 3x3, dropout and concatenation",
    own.Extra: "its values are not those",
    own.DroppingWithTheNorm: "its values are not those of norm, ReLU, 1x1, norm, ReLU, 3x3, dropout",
}


def without_dropout(module: nn.Module) -> nn.Module:
    for inner in module.modules():
        if isinstance(inner, nn.Dropout):
            inner.p = 0.0
    return module


def net(style: str, size: int = 32, blocks: int = 3) -> own.Net:
    torch.manual_seed(0)
    make = BLOCKS[style][0]
    channels = 12 if style == "only the new features" else 20
    return without_dropout(own.Net([make() for _ in range(blocks)], channels, size)).double()


def fused_quietly(model: nn.Module, **kwargs: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dx.fuse(model, **kwargs)


def block_of(module: nn.Module) -> Block:
    unit = unit_of(module)
    assert isinstance(unit, Block)
    return unit


@pytest.mark.parametrize(
    ("style", "save", "backend"), pairs(BLOCKS, ["bottlenecks", "features"], BACKENDS), indirect=["backend"]
)
def test_trains_as_the_unfused_model(style: str, save: str, backend: str) -> None:
    # In the emulator 192 pixels, three tiles of the 1x1 convolution, then 48 and 12, no whole tile.
    size, batch = (8, 3) if backend == "emulated" else (32, 2)
    plain = net(style, size)
    model = fused_quietly(copy.deepcopy(plain), save=save)
    found = dx.report(model)
    assert [(row.name, row.kind, row.fused) for row in found] == [
        (f"blocks.{i}", "dense block", True) for i in range(3)
    ]
    block = block_of(model.get_submodule("blocks.0"))
    for name, value in BLOCKS[style][1].items():
        assert getattr(block, name) == value, name
    x = images(batch, size)
    assert_same_state(three_steps(model, x), three_steps(plain, x))
    assert_same_gradients(model, plain)
    for each in (model.eval(), plain.eval()):
        each.zero_grad()
        each(x).square().sum().backward()
    assert_equal([model(x)], [plain(x)])
    assert_same_gradients(model, plain)
    dx.unfuse(model)
    assert not any(unit_of(module) for module in model.modules()) and torch.equal(model(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_no_longer_needed(reentrant: bool) -> None:
    """The fused block keeps even less, and its statistics move once."""
    model = own.Net([own.chain(own.Checkpointed, reentrant=reentrant) for _ in range(3)], 20).double()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, own.Checkpointed):
            module.efficient = False
    fused_quietly(model)
    assert [(row.fused, row.save) for row in dx.report(model)] == [(True, "features")] * 3
    x = images(2)
    assert_same_state(three_steps(model, x), three_steps(plain, x))
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    block = without_dropout(own.Grown(3, (2, 4), dims=dims)).double()
    plain = copy.deepcopy(block)
    dx.fuse(block)
    x = torch.randn(2, 3, *(5, 4, 3)[:dims], dtype=F64)
    assert_equal([block(x)], [plain(x)])
    assert [row.fused for row in dx.report(block)] == [True]


@pytest.mark.parametrize("layer", NEARLY, ids=lambda layer: layer.__name__)
def test_what_is_nearly_dense_is_refused(layer: type[nn.Module]) -> None:
    block = own.chain(layer, **({"droprate": 0.2} if issubclass(layer, own.Shared) else {}))
    (row,) = dx.report(block)
    assert not row.fused and row.reason is not None
    assert row.reason.startswith(f"this block of {layer.__name__} layers is not a known one: {NEARLY[layer]}")
    with pytest.warns(UserWarning, match="none of the 1 dense blocks"):
        dx.fuse(block)
    assert unit_of(block) is None


def test_dropping_twice_is_fused_and_a_rate_before_a_convolution_that_rises_later_is_not() -> None:
    block = fused_quietly(own.chain(own.TwiceDropped, droprate=0.1))
    block[1].droprate = 0.5
    assert next(iter(dx.report(block))).fused
    block = without_dropout(own.Grown(8, (4, 4)))
    for layer in block.layers:
        layer.composite.insert(2, nn.Dropout(0.0))  # before the convolution
    fused_quietly(block)
    assert block_of(block).drops == ()
    block.layers[0].composite[2].p = 0.3
    (row,) = dx.report(block)
    assert row.reason == "layers.0.composite.2 drops too, at rate 0.3"


def test_words_for_what_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(change: Callable[[nn.Sequential], object]) -> str | None:
        block = own.chain(own.Shared)
        change(block)
        (row,) = dx.report(block)
        return row.reason

    fresh = "densenet_ext.fuse has not been called"
    assert reason(lambda b: None) == fresh
    assert reason(lambda b: setattr(b[1], "relu", nn.SiLU())) == "1.relu is a SiLU, not a ReLU"
    assert reason(lambda b: setattr(b[1], "bn2", nn.GroupNorm(1, 8))) == "1.bn2 is a GroupNorm, not a BatchNorm2d"
    assert reason(lambda b: [setattr(layer, "conv1", nn.Conv2d(8 + 4 * i, 8, 1)) for i, layer in enumerate(b)]) == fresh
    grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False)
    assert reason(lambda b: setattr(b[2], "conv2", grouped)) == "2.conv2 has 2 groups"
    assert reason(lambda b: nn.utils.parametrizations.weight_norm(b[0].conv1)) == "0.conv1 is parametrised"
    assert reason(lambda b: dx.fuse(b)[0].bn1.register_forward_hook(print)) == "0.bn1 has a forward hook"
    assert reason(lambda b: dx.fuse(b)[0].register_forward_hook(print)) == "0 has a forward hook"
    assert reason(lambda b: setattr(b[0], "forward", lambda x: x)) == "a forward in it was replaced on the instance"
    with monkeypatch.context() as patched:
        patched.setattr(find, "try_out_block", None)  # there is nothing to try out
        assert reason(lambda b: setattr(b[2], "relu", nn.GELU())) == "2.relu is a GELU, not a ReLU"
    spatial = own.Grown(8, (4, 4))
    spatial.layers[1].composite[3] = nn.Dropout2d(0.2)
    assert "is not a known one" in str(next(iter(dx.report(spatial))).reason)
    spatial.layers[0].composite[3] = nn.Dropout2d(0.1)
    assert next(iter(dx.report(spatial))).reason == fresh
    spatial.layers[1].composite[3] = nn.AlphaDropout(0.2)
    assert next(iter(dx.report(spatial))).reason == "layers.1.composite.3 is a AlphaDropout, not a Dropout"


def test_changes_after_fusing_run_unfused() -> None:
    def reason(change: Callable[[nn.Module], object]) -> str | None:
        block = fused_quietly(own.Grown(8, (4, 4)))
        change(block)
        return block_of(block).reason(block)

    assert reason(lambda b: None) is None
    assert reason(lambda b: setattr(b, "everything", False)) == (
        "it has everything False, which was True when its forward was tried out"
    )
    assert reason(lambda b: b.layers.append(own.Returning(16, 4))) == (
        "layers has a child 2 that it had not when its forward became known"
    )
    assert reason(lambda b: b.layers.__setitem__(1, own.Narrow(12, 4))) == ("layers.1 is a Narrow, not a Returning")
    assert reason(lambda b: delattr(b.layers[1].composite, "1")) == "layers.1.composite.1 is missing"
    assert reason(lambda b: b.layers.register_forward_hook(print)) == "layers has a forward hook"
    assert reason(lambda b: setattr(b.layers[1], "composite", copy.deepcopy(b.layers[0].composite))) == (
        "layers.1.composite.0 and composite.2 take 8 and 8 features, where 12 come"
    )
    block = fused_quietly(own.Grown(8, (4, 4)).double())
    block.everything = False
    assert block(torch.randn(2, 8, 4, 4, dtype=F64)).shape == (2, 8, 4, 4)


def test_an_inner_hook_comes_and_goes() -> None:
    seen: list[Tensor] = []
    block = fused_quietly(own.chain(own.Narrow).double())
    handle = block[1].conv2.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 8, 4, 4, dtype=F64)
    block(x)
    assert len(seen) == 1 and not rows(block)[""].fused
    handle.remove()
    block(x)
    assert len(seen) == 1 and rows(block)[""].fused


def test_dropout_follows_the_attribute_or_the_module() -> None:
    x = torch.randn(4, 8, 16, 16, dtype=F64)
    attribute, module = own.chain(own.Shared, growth=(4, 4)).double(), own.Grown(8, (4, 4)).double()
    for block, layers in ((attribute, attribute), (module, module.layers)):
        fused_quietly(block)
        for rate in (0.0, 0.25, 0.7):
            for layer in layers:
                if block is attribute:
                    layer.droprate = rate
                else:
                    layer.composite[3].p = rate
            dropped = (block(x)[:, 8:] == 0).double().mean().item()
            assert abs(dropped - rate) < 0.05
        torch.manual_seed(3)
        first = block(x)
        torch.manual_seed(3)
        assert torch.equal(first, block(x)) and not torch.equal(first, block(x))
        assert not (block.eval()(x)[:, 8:] == 0).any()
        assert block_of(block).reason(block) is None
    # the module's own flag governs it, as in eager
    module.train()
    for layer in module.layers:
        layer.composite[3].eval()
    assert not (module(x)[:, 8:] == 0).any()


# ---- the trial leaves no traces --------------------------------------------------------------------------------------


def test_the_trial_touches_nothing() -> None:
    model = net("one ReLU for two")
    called: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: called.append(module))
    before = copy.deepcopy(model.state_dict())
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    training = [module.training for module in model.blocks.eval().modules()]
    states = torch.get_rng_state(), random.getstate()
    trials._known.clear()
    dx.report(model)
    assert not called and [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert [module.training for module in model.blocks.modules()] == training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("owner, name", [(nn.Conv2d, "_conv_forward"), (nn.Module, "__call__"), (nn.ReLU, "forward")])
def test_what_was_found_under_a_patch_does_not_outlive_it(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials._known.clear()
    model, usual = net("one ReLU for two"), getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda self, *args: usual(self, *args) * 1.5)
        assert not any(
            row.kind == "dense block" and "fuse has not been called" in row.reason for row in dx.report(model)
        )
    assert any(row.kind == "dense block" and "fuse has not been called" in row.reason for row in dx.report(model))


def test_the_trial_runs_anywhere() -> None:
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        block = own.chain(own.NarrowBehind)
        trials._known.clear()
        assert rows(block)[""].reason == "densenet_ext.fuse has not been called"
    with torch.inference_mode():
        trials._known.clear()
        assert rows(block)[""].reason == "densenet_ext.fuse has not been called"
    with torch.device("meta"):
        block = own.chain(own.NarrowBehind, growth=(3, 3))
    assert rows(block)[""].reason == "densenet_ext.fuse has not been called"
    for dtype in (torch.float64, torch.bfloat16):
        assert rows(own.chain(own.NarrowBehind, growth=(3, 4)).to(dtype))[""].reason is not None


def test_alike_blocks_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    arrange = trials._arrangement
    monkeypatch.setattr(trials, "_arrangement", lambda *args: (count.append(1), arrange(*args))[1])
    trials._known.clear()
    model = net("one ReLU for two")
    dx.report(model)
    assert len(count) == 1
    dx.fuse(model)
    dx.report(copy.deepcopy(model))
    assert len(count) == 1
    model = net("one ReLU for two")
    model.blocks[1][0].note = "other"  # which no code names
    dx.report(model)
    assert len(count) == 1
    # what may change unseen is tried out every time
    model.blocks[2][0].note = {"a": 1}
    dx.report(model)
    dx.report(model)
    assert len(count) == 3


def test_code_that_differs_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(own.chain(own.Narrow))[""].reason == "densenet_ext.fuse has not been called"
    monkeypatch.setattr(own.Narrow, "forward", own.Scaled.forward)
    assert "a function was replaced since its forward became known" in str(rows(own.chain(own.Narrow))[""].reason)


# ---- in use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["F.relu, new in front", "a ModuleList", "only the new features"])
def test_layout_is_the_inputs(style: str) -> None:
    block = net(style).blocks[0]
    fused_quietly(block)
    x = torch.randn(2, 8, 4, 4, dtype=F64)
    out = block(x)
    assert out.is_contiguous() and out.view(2, -1).shape[0] == 2
    out = block(x.to(memory_format=torch.channels_last))
    assert out.stride(1) == 1 and not out.is_contiguous()


def test_copies_pickles_and_state_dicts() -> None:
    model = fused_quietly(net("a ModuleList"))
    x = images(2)
    expected = copy.deepcopy(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(row.fused for row in dx.report(other))
        assert block_of(other.blocks[0]) == block_of(model.blocks[0])
        assert torch.equal(other(x), expected)
    plain = net("a ModuleList")
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())


def test_verify_and_what_is_kept() -> None:
    model = own.Net([own.chain(own.Shared, growth=(4,) * 8, droprate=0.1) for _ in range(2)], 40)
    model.linear = nn.Linear(8 * 8 * 8, 10)
    model = model.double()
    result = dx.verify(model, images(2))
    assert result.fused_units == 2 and "dropout of the dense layers was off" in result.notes
    assert max(result.max_output, result.max_gradient, result.max_buffer) < 1e-8
    kept = []
    for each in (model, fused_quietly(copy.deepcopy(model)), fused_quietly(copy.deepcopy(model), save="features")):
        with kept_for_backward(each.parameters()) as found:
            out = each(images(2))
        kept.append(found.bytes)
        del out
    assert kept[0] > 2 * kept[1] > 2.5 * kept[2]


@pytest.mark.parametrize("style", ["F.relu, new in front", "no bottleneck", "only the new features"])
def test_compiles_without_graph_break(style: str) -> None:
    torch._dynamo.reset()
    plain = net(style, blocks=2)  # each is traced
    plain.linear = nn.Linear(8 * 8 * 8, 10).double()
    model = torch.compile(fused_quietly(copy.deepcopy(plain)), fullgraph=True, backend="aot_eager")
    x = images(2)
    for _ in range(2):
        assert_equal([model(x)], [plain(x)])
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert_equal(list(model.buffers()), list(plain.buffers()))


def test_export_takes_the_users_code() -> None:
    model = fused_quietly(net("F.relu, new in front").eval())
    program = torch.export.export(model, (images(2),))
    assert "densenet_ext" not in str(program.graph)
