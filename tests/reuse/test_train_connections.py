from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.errors import UserError
from densenet_ext.reuse.connections import Connections, connections, shares
from tests.support import lookalikes, own_code, peers

SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 8, "bn_size": 2}
NAN = float("nan")


def small(seed: int = 0, **changed: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(dx.DenseNet(**{**SMALL, "num_classes": 5, **changed}).state_dict())


def mean_abs(weight: Tensor) -> Any:
    return pytest.approx(weight.detach().abs().mean().item())


def assert_same(found: list[Connections], wanted: list[Connections]) -> None:
    assert [(block.features, block.behind) for block in found] == [(b.features, b.behind) for b in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.use, b.use, rtol=0, atol=0, equal_nan=True)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def by_hand(kernel: tuple[int, ...] = (1, 1)) -> dict[str, Tensor]:
    """Two layers on two features; signs alternate, so that only absolute values give what stands below."""

    def weight(out: int, *per_feature: float) -> Tensor:
        signs = torch.tensor([1.0, -1.0] * out)[:out].view(-1, 1, *[1] * len(kernel))
        return signs * torch.tensor(per_feature).view(1, -1, *[1] * len(kernel)).expand(out, -1, *kernel)

    return {
        "block.denselayer1.conv1.weight": weight(4, 1, 3),
        "block.denselayer1.conv2.weight": torch.ones(1, 4, *[3] * len(kernel)),
        "block.denselayer2.conv1.weight": weight(4, 2, 4, 5),
        "block.denselayer2.conv2.weight": torch.ones(2, 4, *[3] * len(kernel)),
        "out.weight": torch.tensor([[1.0, 1, 2, -6, 0], [-3, 1, 2, 0, -6]]),
    }


BY_HAND = [[2, 3, 1.5], [NAN, 5, 2], [NAN, NAN, 3]]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_matrix_computed_by_hand(dims: int) -> None:
    (block,) = connections(by_hand((1,) * dims))
    torch.testing.assert_close(block.use, torch.tensor(BY_HAND, device="cpu"), equal_nan=True)
    assert (block.name, block.features, block.layers, block.behind) == ("block", (2, 1, 2), 2, "classifier")


def test_signs_and_kernels_without_a_bottleneck() -> None:
    first = torch.zeros(1, 2, 3, 3)
    first[0, 0, 1, 1], first[0, 1, 0, 2] = -9, 18
    second = torch.ones(1, 3, 3, 3)
    second[:, 2] = -2
    (block,) = connections({"denselayer1.conv1.weight": first, "denselayer2.conv1.weight": second})
    torch.testing.assert_close(block.use, torch.tensor([[1.5, 1], [NAN, 2], [NAN, NAN]], device="cpu"), equal_nan=True)
    assert block.name == "" and block.behind is None
    state = {"denselayer1.conv1.weight": first, "denselayer2.conv1.weight": second, "last.weight": torch.ones(5, 4)}
    assert connections(state)[0].behind == "classifier"


def test_new_features_in_front() -> None:
    state = by_hand()
    for name in ("block.denselayer1.conv1.weight", "block.denselayer2.conv1.weight", "out.weight"):
        state[name] = state[name].flip(1)
    (block,) = connections(state, new_first=True)
    torch.testing.assert_close(block.use, torch.tensor(BY_HAND, device="cpu"), equal_nan=True)
    (wrong,) = connections(state)
    assert not torch.equal(wrong.use, block.use)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_averaged_in_float32(dtype: torch.dtype) -> None:
    state = {name: (1000 * w).to(dtype) for name, w in small().items() if w.is_floating_point()}
    found = connections(state)
    assert all(block.use.dtype == torch.float32 for block in found)
    assert_same(found, connections({name: w.float() for name, w in state.items()}))


def test_shares_of_weights_and_of_features() -> None:
    (block,) = connections(by_hand())
    found = shares(block, [1])  # absolute weights 2, 4 on the input, 5 on the layer before
    assert found is not None
    for share, wanted in zip(found, [(6 / 11, 2 / 3), (0, 0), (5 / 11, 1 / 3)], strict=True):
        assert share == pytest.approx(wanted)
    found = shares(block, [2])  # per class 3 on the input, 2 on the older layer, 6 on the last one
    assert found is not None
    for share, wanted in zip(found, [(3 / 11, 2 / 5), (2 / 11, 1 / 5), (6 / 11, 2 / 5)], strict=True):
        assert share == pytest.approx(wanted)
    assert shares(block, [0]) is None and shares(block, []) is None
    both, twice = shares(block, [0, 1]), shares(block, [1, 2])
    assert both == shares(block, [1])  # who has only the input has no choice
    assert twice is not None and twice[0].weight == pytest.approx((6 / 11 + 3 / 11) / 2)


def test_readers_whose_weights_are_zero_do_not_count() -> None:
    state = by_hand()
    state["block.denselayer2.conv1.weight"].zero_()
    (block,) = connections(state)
    assert block.use[0, 1] == 0 and shares(block, [1]) is None


# ---- every library's names -------------------------------------------------------------------------------------------


def efficient() -> nn.Module:
    return lookalikes.DenseNet(**SMALL, num_classes=5)


def torchvision() -> nn.Module:
    return peers.torchvision_densenet().DenseNet(**SMALL, num_classes=5)


def timm() -> nn.Module:
    return peers.timm_densenet().DenseNet(4, (3, 2), num_classes=5, bn_size=2)  # 2 k features at first


def torchxrayvision() -> nn.Module:
    return peers.torchxrayvision_models().DenseNet(**SMALL, num_classes=5, in_channels=1, weights=None)


def monai(dims: int) -> Callable[[], nn.Module]:
    keywords = {"growth_rate": 4, "block_config": (3, 2), "init_features": 8, "bn_size": 2}
    return lambda: peers.monai_densenet().DenseNet(spatial_dims=dims, in_channels=1, out_channels=5, **keywords)


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: dx.DenseNet(**SMALL, num_classes=5),
    "torchvision": torchvision,
    "timm": timm,
    "torchxrayvision": torchxrayvision,
    "efficient": efficient,
    **{f"monai-{dims}d": monai(dims) for dims in (1, 2, 3)},
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library: str) -> None:
    model = LIBRARIES[library]()
    state = model.state_dict()
    found = connections(state)
    assert [(b.name, b.features, b.behind, b.known) for b in found] == [
        ("denseblock1", (8, 4, 4, 4), "transition", True),
        ("denseblock2", (10, 4, 4), "classifier", True),
    ]
    # by the model's own modules: third layer of the first block, transition, classifier
    read = dict(model.named_modules())
    third = next(m for n, m in read.items() if re.search(r"denseblock1\.denselayer3\.(layers\.)?conv1$", n))
    assert float(found[0].use[0, 2]) == mean_abs(third.weight[:, :8])
    assert float(found[0].use[2, 2]) == mean_abs(third.weight[:, 12:16])
    transition = read["features.transition1.conv"].weight
    assert float(found[0].use[3, 3]) == mean_abs(transition[:, 16:])
    classifier = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight
    assert float(found[1].use[1, 2]) == mean_abs(classifier[:, 10:14])
    for block in found:
        unread = torch.ones_like(block.use, dtype=torch.bool).tril(-1)
        assert torch.equal(block.use.isnan(), unread)


def dotted(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


PREFIXES = {
    "dotted": dotted,
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "lightning": lambda name: f"model.{name}",
    "deeper": lambda name: f"net.backbone.{name}",
    "inside": lambda name: name.replace("denseblock1.", "denseblock1._orig_mod."),
    "fsdp": lambda name: name.replace("denselayer2.", "_fsdp_wrapped_module.denselayer2._checkpoint_wrapped_module."),
    "all": lambda name: f"module._orig_mod.model.{dotted(name)}",
}


@pytest.mark.parametrize("form", PREFIXES)
def test_prefixes_and_old_names(form: str) -> None:
    renamed = {PREFIXES[form](name): value for name, value in small().items()}
    found = connections(renamed)
    assert_same(found, connections(small()))
    assert [block.name for block in found] == ["denseblock1", "denseblock2"]


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state", "model_state_dict", "net", "what_i_call_it"])
def test_a_trainings_dict(entry: str) -> None:
    average = small(1)
    content = {"epoch": 3, "ema": {"decay": 0.9}, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}}
    content |= {entry: small(), "state_dict_ema" if entry != "what_i_call_it" else "z": average}
    assert_same(connections(content), connections(small()))


def test_known_entries_come_first() -> None:
    assert_same(connections({"ema": small(1), "model": small()}), connections(small()))
    assert_same(connections({"scores": torch.ones(3), "mine": small()}), connections(small()))


def test_names_in_alphabetic_order() -> None:
    state = small(block_config=(12, 11))
    found = connections({name: state[name] for name in sorted(state)})
    assert_same(found, connections(state))
    assert [block.behind for block in found] == ["transition", "classifier"]


def test_a_transition_and_a_classifier_that_read_equally_many_features() -> None:
    state = small(growth_rate=8, block_config=(2, 2), num_init_features=16)
    state["classifier.weight"].fill_(7)
    for order in (list(state), sorted(state)):
        found = sorted(connections({name: state[name] for name in order}), key=lambda block: block.name)
        assert [block.behind for block in found] == ["transition", "classifier"]
        assert found[0].use.shape == found[1].use.shape == (3, 3)
        assert float(found[0].use[0, 2]) < 1 and float(found[1].use[0, 2]) == 7


def test_readers_of_own_code_in_any_order() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"dense1": own_code.chain(own_code.Shared), "dense2": own_code.chain(own_code.Shared)})
    model["trans1"], model["linear"] = nn.Conv2d(20, 8, 1), nn.Linear(20, 5)
    state = model.state_dict()
    for names in (list(state), sorted(state)):
        first, second = connections({name: state[name] for name in names})
        assert (first.behind, second.behind) == ("transition", "classifier")
        assert float(second.use[0, 3]) == mean_abs(model["linear"].weight[:, :8])
    heads = {"head1.weight": torch.ones(2, 20), "head2.weight": torch.ones(3, 20)}
    for state in ({**model["dense1"].state_dict(), **heads}, {**heads, **model["dense1"].state_dict()}):
        (block,) = connections(state)  # the first of two
        assert block.behind == "classifier" and float(block.use[0, 3]) == 1


def test_weights_that_are_integers_are_no_weights() -> None:
    state = {name: (100 * value).to(torch.int8) for name, value in small().items()}
    with pytest.raises(UserError, match="no dense blocks"):
        connections(state)


# ---- code of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, names, features, behind",
    [
        (
            lambda: own_code.Net([own_code.chain(own_code.NarrowBehind) for _ in range(2)], 20),
            ["0", "1"],
            (8, 4, 4, 4),
            2,
        ),
        (lambda: own_code.Net([own_code.chain(own_code.Single) for _ in range(2)], 20), ["0", "1"], (8, 4, 4, 4), 2),
        (lambda: own_code.NetWithTransitions(own_code.Transition), ["dense1", "dense2"], (8, 4, 4, 4), 2),
        (lambda: own_code.NetWithTransitions(own_code.transition_of_modules), ["dense1", "dense2"], (8, 4, 4, 4), 2),
        (lambda: own_code.Grown(8, (4, 5, 6)), ["layers"], (8, 4, 5, 6), 0),
        (lambda: own_code.Listed(8, 4), [""], (8, 4, 4), 0),
        (lambda: own_code.Wrapped(own_code.chain(own_code.Shared)), ["layer"], (8, 4, 4, 4), 0),
    ],
    ids=["lists", "single", "transitions", "sequences", "growing", "attributes", "wrapped"],
)
def test_own_code_by_its_shapes(build: Any, names: list[str], features: tuple[int, ...], behind: int) -> None:
    model = build()
    found = connections(model.state_dict())
    assert [block.name for block in found] == names
    assert all(block.features == features and not block.known for block in found)
    assert sum(block.behind == "transition" for block in found) == behind
    if isinstance(model, own_code.Net) and behind:  # each block has its own, in their order
        for block, transition in zip(found, model.trans, strict=True):
            assert float(block.use[-1, -1]) == mean_abs(transition.weight[:, -4:])


def test_fc_densenet() -> None:
    model = dx.fc_densenet56(growth_rate=4, num_init_features=8, block_config=(2, 3), bottleneck_layers=2)
    found = connections(model.state_dict())
    assert [(block.name, block.layers, block.behind) for block in found] == [
        ("down_blocks.0", 2, "transition"),
        ("down_blocks.1", 3, "transition"),
        ("bottleneck", 2, None),
        ("up_blocks.0", 3, None),
        ("up_blocks.1", 2, "classifier"),
    ]
    assert found[2].use.shape == (3, 2)  # nothing reads the whole block
    assert float(found[4].use[2, 2]) == mean_abs(model.classifier.weight[:, -4:])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_other_networks_have_no_dense_blocks(name: str) -> None:
    peers.torchvision_densenet()
    import torchvision.models

    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    with pytest.raises(UserError, match=rf"no dense blocks; it holds {next(iter(state))}, "):
        connections(state)


@pytest.mark.parametrize(
    "content, told",
    [
        ({}, "holds nothing"),
        ({"epoch": 3, "arch": "densenet121"}, "holds epoch, arch$"),
        ({"model": {"a.weight": torch.ones(3)}}, "holds model$"),
        (nn.BatchNorm2d(3).state_dict(), "holds weight, bias, running_mean$"),
        ({0: torch.ones(3, 3)}, "holds 0"),
    ],
    ids=["empty", "numbers", "one", "norm", "numbered"],
)
def test_what_holds_no_network(content: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        connections(content)


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**small(), name: value}


FIRST = "features.denseblock1.denselayer"


@pytest.mark.parametrize(
    "state, told",
    [
        (changed(f"{FIRST}3.conv1.weight", torch.full((8, 16, 1, 1), NAN)), r"denselayer3.conv1.weight: .* got NaN"),
        (changed("classifier.weight", torch.full((5, 18), torch.inf)), r"^classifier.weight: .* got NaN or infinity"),
    ],
    ids=["nan", "infinity"],
)
def test_weights_that_are_no_numbers(state: dict[str, Tensor], told: str) -> None:
    with pytest.raises(UserError, match=told):
        connections(state)


@pytest.mark.parametrize(
    "state",
    [
        changed(f"{FIRST}2.conv1.weight", torch.ones(8, 13, 1, 1)),
        {name: value for name, value in small().items() if "denseblock1.denselayer2." not in name},
        {name: value for name, value in small().items() if name != f"{FIRST}2.conv2.weight"},
    ],
    ids=["channels", "missing layer", "missing weight"],
)
def test_layers_that_do_not_fit_together_are_no_block(state: dict[str, Tensor]) -> None:
    assert [block.name for block in connections(state)] == ["features.denseblock2"[9:]]
