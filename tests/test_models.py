from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import densenet_ext as dx
from densenet_ext.modules import DenseBlock
from tests.support.fusing_helpers import reason_of
from tests.support.helpers import DEVICE
from tests.support.peers import torchvision_densenet

TINY = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "bn_size": 2, "num_classes": 5}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, count",
    [
        ("densenet121", 7_978_856),
        ("densenet161", 28_681_000),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("densenet264", 33_337_704),
    ],
)
def test_published_models_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert parameters(getattr(dx, name)()) == count


def test_densenet_bc_100_has_769162_parameters():
    model = dx.densenet_bc(100, 12, num_classes=10)
    assert parameters(model) == 769_162
    assert parameters(dx.densenet_bc()) == 769_162
    assert [len(m) for m in model.modules() if isinstance(m, DenseBlock)] == [16, 16, 16]


def test_names_order_initialisation_and_results_are_torchvisions():
    peer_module = torchvision_densenet()
    torch.manual_seed(3)
    ours = dx.DenseNet(8, (2, 3, 2), 16, num_classes=7)
    torch.manual_seed(3)
    theirs = peer_module.DenseNet(8, (2, 3, 2), 16, num_classes=7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, ours_value), theirs_value in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(ours_value, theirs_value), name
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    for mode in (True, False):
        ours.double().train(mode), theirs.double().train(mode)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_small_inputs_have_the_papers_initialisation():
    torch.manual_seed(0)
    model = dx.DenseNet(24, (2, 2), 48, small_inputs=True, num_classes=10)
    assert list(model.features._modules)[:2] == ["conv0", "denseblock1"]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and not module.bias.any()
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    "given, level",
    [
        ({}, "bottlenecks"),
        ({"memory_efficient": True}, "features"),
        ({"efficient": True}, "features"),
        ({"memory_efficient": False, "efficient": False}, "bottlenecks"),
        ({"save": "features"}, "features"),
        ({"save": "bottlenecks", "efficient": True}, "bottlenecks"),
    ],
)
def test_save_level(given, level):
    model = dx.DenseNet(**TINY, **given)
    blocks = [m for m in model.modules() if isinstance(m, DenseBlock)]
    assert [model.save, *(block.save for block in blocks)] == [level] * 3
    assert {layer.save for block in blocks for layer in block.values()} == {level}


def test_save_level_can_be_changed():
    model = dx.DenseNet(**TINY)
    model.save = "features"
    assert model.features.denseblock2.denselayer3.save == "features"
    with pytest.raises(ValueError, match="save: expected one of 'bottlenecks', 'features', got 'all'"):
        model.save = "all"


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("growth_rate", 0, ValueError),
        ("growth_rate", 2.5, TypeError),
        ("growth_rate", True, TypeError),
        ("block_config", (), ValueError),
        ("block_config", 6, TypeError),
        ("block_config", (6, 0), ValueError),
        ("block_config", "66", TypeError),
        ("num_init_features", -1, ValueError),
        ("bn_size", 0, ValueError),
        ("drop_rate", -0.1, ValueError),
        ("drop_rate", 1.5, ValueError),
        ("drop_rate", float("nan"), ValueError),
        ("drop_rate", "0.1", TypeError),
        ("num_classes", -1, ValueError),
        ("compression", 0, ValueError),
        ("compression", 1.1, ValueError),
        ("compression", 0.01, ValueError),
        ("in_channels", 0, ValueError),
        ("save", "everything", ValueError),
        ("save", 3, ValueError),
    ],
)
def test_constructor_names_the_argument_what_was_expected_and_what_came(argument, value, error):
    with pytest.raises(error, match=rf"^{argument}(\[1\])?: expected .*got .*") as caught:
        dx.DenseNet(**{**TINY, argument: value})
    shown = value[1] if argument == "block_config" and value == (6, 0) else value
    assert "empty" in str(caught.value) if value == () else repr(shown) in str(caught.value)


@pytest.mark.parametrize("depth, error", [(99, ValueError), (4, ValueError), (10.0, TypeError)])
def test_densenet_bc_refuses_other_depths(depth, error):
    with pytest.raises(error, match=f"^depth: expected .*got {re.escape(repr(depth))}"):
        dx.densenet_bc(depth)


def test_no_classes_gives_the_pooled_features():
    model = dx.DenseNet(**{**TINY, "num_classes": 0})
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 32, 32), ValueError, r"x: expected 4 dimensions \[N, 3, H, W\], got shape \[3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), RuntimeError, r"x: expected 3 channels, .*got shape \[1, 4, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32).double(), RuntimeError, "x: expected dtype torch.float32, .*got torch.float64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), RuntimeError, "x: expected dtype torch.float32, .*uint8"),
        (
            torch.zeros(1, 3, 32, 32, device="meta"),
            RuntimeError,
            f"x: expected a tensor on {DEVICE}, .*got one on meta",
        ),
        ([1.0], TypeError, "x: expected a tensor, got list"),
    ],
)
def test_forward_names_what_was_expected_and_what_came(x, error, message):
    with pytest.raises(error, match=message):
        dx.DenseNet(**TINY)(x)


def test_too_small_images_are_a_clear_error():
    with pytest.raises(RuntimeError, match="input: expected at least 2 pixels"):
        dx.DenseNet(**TINY).eval()(torch.zeros(1, 3, 4, 4))


def test_one_value_per_channel_in_training_is_pytorchs_error():
    model = dx.DenseNet(**TINY)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.zeros(1, 3, 8, 8))


def test_autocast_takes_another_dtype():
    model = dx.DenseNet(**TINY)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("small_inputs", [False, True])
def test_hooks_see_what_they_see_in_eager(small_inputs):
    torch.manual_seed(0)
    model = dx.DenseNet(**TINY, small_inputs=small_inputs).double()
    plain = copy.deepcopy(model)
    seen = {}

    def note(name):
        return lambda module, args, out: seen.__setitem__(name, out.detach().clone())

    watched = [name for name, _ in model.named_modules() if name and name != "classifier"]
    for name in watched:
        model.get_submodule(name).register_forward_hook(note(name))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)
    assert set(seen) == set(watched)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-10, atol=1e-12)


def test_features_keep_the_callers_memory_format():
    model = dx.DenseNet(**TINY)
    x = torch.randn(2, 3, 64, 64)
    assert model.features(x).is_contiguous()
    assert model.features(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_replaced_stem_modules_are_called():
    model = dx.DenseNet(**TINY)
    model.features.pool0 = nn.Identity()
    assert reason_of(model, "features") == "pool0 is a Identity, not a MaxPool2d"
    assert model.features(torch.randn(2, 3, 32, 32)).shape[2:] == (8, 8)
    model.features.conv0 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    cut = dx.DenseNet(**TINY).features[:5]
    assert type(cut).__name__ == "Sequential" and cut(torch.randn(2, 3, 32, 32)).shape == (2, 16, 8, 8)


def test_replaced_features_are_called():
    model = dx.DenseNet(**TINY)
    model.features = nn.Conv2d(3, model.num_features, 3)
    assert reason_of(model) == "features does not run its children one after another"
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_copies_pickles_and_whole_model_files_work():
    model = dx.DenseNet(**TINY).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        other.load_state_dict({f"module.{name}": value for name, value in model.state_dict().items()})


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        model, x = dx.DenseNet(**TINY), torch.randn(2, 3, 32, 32)
    out = model(x)
    out.sum().backward()
    assert out.is_meta and out.shape == (2, 5)
    assert model.features.conv0.weight.grad.shape == model.features.conv0.weight.shape
