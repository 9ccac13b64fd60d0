"""FC-DenseNet, and the dense block without bottlenecks as a module, against plain PyTorch over the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.modules import BasicDenseLayer
from tests.support.fusing_helpers import images, reason_of
from tests.support.helpers import F64, assert_equal, generator, gradients, kept_for_backward


def small(**kwargs: Any) -> dx.FCDenseNet:
    torch.manual_seed(0)
    settings = {"growth_rate": 4, "block_config": (2, 3), "bottleneck_layers": 2, "num_init_features": 6, **kwargs}
    model = dx.FCDenseNet(5, **{"drop_rate": 0.0, **settings})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double()


def usual(model: dx.FCDenseNet, x: Tensor) -> Tensor:
    """The network once more, as the paper draws it: concatenation, norm, ReLU, convolution, one by one."""

    def norm_relu(x: Tensor, norm: Any) -> Tensor:
        if norm.training:
            norm.num_batches_tracked += 1
        statistics = (norm.running_mean, norm.running_var)
        return F.relu(F.batch_norm(x, *statistics, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps))

    def dense(x: Tensor, block: Any) -> tuple[Tensor, Tensor]:
        news = []
        for layer in block.values():
            new = F.conv2d(norm_relu(x, layer.norm1), layer.conv1.weight, padding=1)
            news.append(new)
            x = torch.cat([x, new], 1)
        return x, torch.cat(news, 1)

    net: Any = model
    x = F.conv2d(x, net.conv0.weight, padding=1)
    skips = []
    for block, down in zip(net.down_blocks, net.down_transitions, strict=True):
        x, _ = dense(x, block)
        skips.append(x)
        x = F.max_pool2d(F.conv2d(norm_relu(x, down.norm), down.conv.weight), 2)
    _, new = dense(x, net.bottleneck)
    for up, block in zip(net.up_transitions, net.up_blocks, strict=True):
        skip = skips.pop()
        x = F.conv_transpose2d(new, up.conv.weight, stride=2)
        top, left = (x.shape[2] - skip.shape[2]) // 2, (x.shape[3] - skip.shape[3]) // 2
        x = x[:, :, top : top + skip.shape[2], left : left + skip.shape[3]]
        x, new = dense(torch.cat([x, skip], 1), block)
    return F.conv2d(x, net.classifier.weight, net.classifier.bias)


@pytest.mark.parametrize("size", [(8, 8), (13, 10), (7, 15), (4, 4)], ids=str)
def test_equals_the_usual_formulation(size: tuple[int, int], backend: str) -> None:
    model = small()
    other = copy.deepcopy(model)
    x, y = (torch.randn(2, 3, *size, dtype=F64, generator=generator(1)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    for _ in range(2):
        got, expected = model(x), usual(other, y)
        assert got.shape == (2, 5, *size) and got.is_contiguous()
        assert_equal([got], [expected])
        grad = torch.randn_like(expected)
        mine = gradients(got, [x, *model.parameters()], grad)
        assert_equal(mine, gradients(expected, [y, *other.parameters()], grad), 1e-8)
        assert_equal(list(model.buffers()), list(other.buffers()))
    model.eval(), other.eval()
    got, expected = model(x), usual(other, y)
    assert_equal([got], [expected])
    assert_equal(gradients(got, [x, *model.parameters()]), gradients(expected, [y, *other.parameters()]), 1e-8)
    assert_equal(list(model.buffers()), list(other.buffers()))


def test_runs_unfused_with_the_same_numbers() -> None:
    model = small()
    assert all(row.fused for row in dx.report(model))
    assert [row.kind for row in dx.report(model)].count("transition") == 2
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        module.register_forward_pre_hook(lambda module, args: None)
    assert not any(row.fused for row in dx.report(hooked))
    x = images(2, 12)
    assert_equal([model(x)], [hooked(x)])
    assert_equal(list(model.buffers()), list(hooked.buffers()))
    result = dx.verify(small(drop_rate=0.2), x)
    assert max(result.max_output, result.max_gradient, result.max_buffer) < 1e-8


def test_parameter_counts_of_the_paper() -> None:
    """3.5 and 9.4 million (table 2), running statistics included."""
    for make, millions, layers in ((dx.fc_densenet67, 3.5, 67), (dx.fc_densenet103, 9.4, 103)):
        for classes in (11, 12):
            model = make(num_classes=classes)
            count = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
            assert round(count / 1e6, 1) == millions
        convolutions = (nn.Conv2d, nn.ConvTranspose2d)
        assert sum(isinstance(module, convolutions) for module in model.modules()) == layers
    assert sum(isinstance(module, convolutions) for module in dx.fc_densenet56().modules()) == 56


def test_features_of_the_paper() -> None:
    """The m of table 1, FC-DenseNet103."""
    model = dx.fc_densenet103(12)
    assert [down.conv.in_channels for down in model.down_transitions] == [112, 192, 304, 464, 656]
    assert model.bottleneck.num_input_features + 15 * 16 == 896
    grown = [block.num_input_features + len(block) * 16 for block in model.up_blocks]
    assert grown == [1088, 816, 578 - 2, 384, 256]  # the table's 578 is a misprint of 576
    assert model.classifier.in_channels == 256


def test_keeps_less() -> None:
    model = small(growth_rate=8, block_config=(6, 6), bottleneck_layers=6)
    x = images(2, 16)
    kept = []
    for run in (lambda: model(x), lambda: usual(model, x)):
        with kept_for_backward([x, *model.parameters(), *model.buffers()]) as found:
            out = run()
        kept.append(found.bytes)
        del out
    assert 3.5 * kept[0] < kept[1]


def test_dropout_and_evaluation() -> None:
    model = small(drop_rate=0.3)
    x = images(2, 12)
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(first, model(x)) and not torch.equal(first, model(x))
    other = small().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other(x))


def test_compiles_exports_and_takes_any_layout() -> None:
    torch._dynamo.reset()
    model = small()
    x = images(2, 12)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_equal([compiled(x)], [expected])
    program = torch.export.export(copy.deepcopy(model).eval(), (x,))
    assert "densenet_ext" not in str(program.graph)
    out = model(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_equal([out], [expected])


def test_wrong_arguments_are_named() -> None:
    model = small()
    with pytest.raises(RuntimeError, match="Output size is too small"):
        model(torch.randn(2, 3, 12, 3, dtype=F64))
    with pytest.raises(RuntimeError, match="x: expected 3 channels"):
        model(torch.randn(2, 4, 12, 12, dtype=F64))
    with pytest.raises(RuntimeError, match="x: expected dtype torch.float64"):
        model(torch.randn(2, 3, 12, 12))
    for name, value in (
        ("num_classes", 0),
        ("in_channels", 0),
        ("growth_rate", 0),
        ("block_config", ()),
        ("bottleneck_layers", 0),
        ("num_init_features", -1),
        ("drop_rate", 1.5),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            dx.FCDenseNet(**{name: value})


# ---- dx.DenseBlock(bn_size=None) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["all", "new"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_block_without_bottleneck(dims: int, returns: Any) -> None:
    block = dx.DenseBlock(3, 5, None, 4, 0.0, dims=dims, returns=returns).double()
    assert list(block.state_dict())[:6] == [
        *(f"denselayer1.norm1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "denselayer1.norm1.num_batches_tracked",
        "denselayer1.conv1.weight",
    ]
    other = copy.deepcopy(block)
    other.denselayer2.norm1.register_forward_hook(lambda *args: None)
    assert reason_of(block) is None
    assert reason_of(other) == "denselayer2.norm1 has a forward hook"
    x = torch.randn(2, 5, *(5, 4, 3)[:dims], dtype=F64, requires_grad=True)
    got, expected = block(x), other(x)
    assert got.shape[1] == (17 if returns == "all" else 12)
    assert_equal([got, *block.buffers()], [expected, *other.buffers()])
    assert_equal(gradients(got, [x, *block.parameters()]), gradients(expected, [x, *other.parameters()]))
    (row,) = dx.report(block)
    assert row.fused


def test_a_layer_of_the_other_kind_is_named() -> None:
    block = dx.DenseBlock(2, 5, None, 4, 0.0)
    block["denselayer2"] = dx.DenseLayer(9, 4, 2, 0.0)
    assert reason_of(block) == "denselayer2 is a DenseLayer, not a BasicDenseLayer"
    block = dx.DenseBlock(2, 5, 2, 4, 0.0)
    block["denselayer2"] = BasicDenseLayer(9, 4, 0.0)
    assert reason_of(block) == "denselayer2 is a BasicDenseLayer, not a DenseLayer"
    assert block(torch.randn(2, 5, 4, 4)).shape == (2, 13, 4, 4)
    with pytest.raises(TypeError, match="bn_size: expected an integer of at least 1, got 2.5"):
        dx.DenseBlock(2, 5, 2.5, 4, 0.0)  # type: ignore[arg-type]
