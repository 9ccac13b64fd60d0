from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import densenet_ext as dx
from densenet_ext.state_dict import adapt_state_dict, architecture

TINY = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "bn_size": 2, "num_classes": 5}


def model(seed: int = 0, **changed) -> dx.DenseNet:
    torch.manual_seed(seed)
    net = dx.DenseNet(**{**TINY, **changed})
    for i, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):  # every tensor has values of its own, the counters included
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var)
            module.num_batches_tracked.fill_(10 * seed + i)
    return net


def dotted(state):
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): v for name, v in state.items()}


def with_norm_final(state):
    return {name.replace("norm5", "norm_final"): value for name, value in state.items()}


def wrapped(state):
    return {f"module.{name}": value for name, value in state.items()}


def compiled(state):
    return {f"_orig_mod.{name}": value for name, value in state.items()}


FORMS = {
    "own": [],
    "dotted": [dotted],
    "norm_final": [with_norm_final],
    "module": [wrapped],
    "compiled": [compiled],
    "all": [dotted, with_norm_final, wrapped, compiled],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("small_inputs", [False, True])
def test_every_form_loads_strictly(form, small_inputs):
    source, target = model(1, small_inputs=small_inputs), model(2, small_inputs=small_inputs)
    state = dict(source.state_dict())
    for change in FORMS[form]:
        state = change(state)
    given = dict(state)
    result = target.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert state == given  # the caller's dict is left alone
    for (name, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_missing_batch_counts_keep_the_models_own():
    source, target = model(1), model(2)
    state = source.state_dict()  # carries PyTorch's version 2 metadata, with which nn.BatchNorm asks for the counters
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    counts = {n: b.clone() for n, b in target.named_buffers() if n.endswith("num_batches_tracked")}
    target.load_state_dict(wrapped(state))
    target.load_state_dict(state)
    for name, count in counts.items():
        assert torch.equal(target.get_buffer(name), count)
    assert torch.equal(target.features.norm5.running_mean, source.features.norm5.running_mean)


def test_a_model_on_the_meta_device_takes_old_checkpoints():
    state = {k: v for k, v in model(1).state_dict().items() if not k.endswith("num_batches_tracked")}
    with torch.device("meta"):
        target = dx.DenseNet(**TINY)
    target.load_state_dict(dotted(state), assign=True)
    assert target.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_inside_another_model_and_on_parts():
    source = model(1)
    state = dotted(with_norm_final(source.state_dict()))
    outer = nn.Sequential(model(2), nn.Identity())
    outer.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert torch.equal(outer[0].features.norm5.weight, source.features.norm5.weight)
    block = dx.DenseBlock(2, 8, 2, 4, 0.0)
    prefix = "features.denseblock1."
    block.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    layer = dx.DenseLayer(8, 4, 2, 0.0)
    layer.load_state_dict(dotted_layer(source))
    assert torch.equal(layer.conv2.weight, source.features.denseblock1.denselayer1.conv2.weight)


def dotted_layer(source):
    layer = source.features.denseblock1.denselayer1
    return {re.sub(r"^(norm|conv)([12])", r"\1.\2", name): value for name, value in layer.state_dict().items()}


def test_dataparallel_takes_a_bare_state_dict_of_old_names():
    target = nn.DataParallel(model(2))
    source = model(1)
    target.load_state_dict(wrapped(dotted(source.state_dict())))
    assert torch.equal(target.module.classifier.weight, source.classifier.weight)


def test_as_a_hook_on_a_model_that_says_norm_final():
    class Efficient(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential()
            self.features.add_module("conv0", nn.Conv2d(3, 8, 3, bias=False))
            self.features.add_module("norm_final", nn.BatchNorm2d(8))

    target = Efficient()
    state = {name.replace("norm_final", "norm5"): torch.full_like(v, 3) for name, v in target.state_dict().items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(state)
    target.register_load_state_dict_pre_hook(adapt_state_dict)
    target.load_state_dict(state)
    assert torch.equal(target.features.norm_final.weight, torch.full((8,), 3.0))


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"num_classes": 7}, "expected num_classes=5, got num_classes=7"),
        ({"growth_rate": 6}, "expected growth_rate=4, got growth_rate=6"),
        ({"block_config": (2, 3)}, r"expected block_config=\(2, 2\), got block_config=\(2, 3\)"),
        ({"in_channels": 1}, "expected in_channels=3, got in_channels=1"),
    ],
)
def test_another_densenet_is_refused_before_anything_is_loaded(changed, told):
    target, source = model(2), model(1, **changed)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"another network than this DenseNet: {told}. Shapes that differ: "):
            target.load_state_dict(source.state_dict(), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_another_kind_of_network_is_refused():
    with pytest.raises(RuntimeError, match="none of the 2 names fits: got 'weight', 'bias'"):
        model().load_state_dict(nn.Linear(3, 3).state_dict())
    with pytest.raises(RuntimeError, match="none of the 3 names fits: got 'model', 'optimizer', 'epoch'"):
        model().load_state_dict({"model": model().state_dict(), "optimizer": {}, "epoch": 3})


def test_missing_and_unexpected_names_are_pytorchs_error():
    state = model(1).state_dict()
    state["features.extra.weight"] = state.pop("features.norm5.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"features.norm5.weight"[\s\S]*"features.extra.weight"'):
        model(2).load_state_dict(state)
    result = model(2).load_state_dict(state, strict=False)
    assert result.missing_keys == ["features.norm5.weight"] and result.unexpected_keys == ["features.extra.weight"]


def test_architecture_is_read_from_names_and_shapes():
    expected = {**TINY, "in_channels": 3, "small_inputs": False}
    assert architecture(model().state_dict()) == expected
    assert architecture({"weight": torch.zeros(3)}) == {}
