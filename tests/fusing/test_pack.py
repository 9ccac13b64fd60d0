"""`packed_weights`: the same numbers from weights that are packed once, and again wherever PyTorch sees them change."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import _extension, kernels
from densenet_ext.algorithm import packed
from tests.support import own_code as own
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state

pytestmark = pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not packed._weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return dx.DenseNet(12, (2, 3), 16, num_classes=5, small_inputs=True).double().eval()


def basic() -> nn.Module:
    torch.manual_seed(0)
    return dx.fuse(own.chain(own.Single)).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def weight_of(model: nn.Module) -> nn.Parameter:
    found: Any = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    return found.weight


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "a network": (network, images),
    "one image": (network, lambda: images(1)),
    "layers of one convolution": (basic, lambda: torch.randn(2, 8, 9, 9)),
    "sequences": (lambda: dx.DenseBlock(3, 20, 4, 12, 0, dims=1).eval(), lambda: torch.randn(2, 20, 33)),
    "volumes": (lambda: dx.DenseBlock(3, 20, 4, 12, 0, dims=3).eval(), lambda: torch.randn(1, 20, 5, 6, 7)),
    "a transition": (lambda: dx.Transition(40, 20).eval(), lambda: torch.randn(2, 40, 6, 6)),
    "growth of 32": (lambda: dx.DenseBlock(2, 64, 4, 32, 0).eval(), lambda: torch.randn(1, 64, 14, 14)),
}


@pytest.mark.parametrize("winograd", ["always", "never"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_numbers_are_the_same(name: str, dtype: torch.dtype, winograd: str) -> None:
    make, given = CALLS[name]
    lowered = dtype == torch.bfloat16
    model, x = [thing.to(torch.float32 if lowered else dtype) for thing in (make(), given())]
    _extension.module.set_winograd(winograd)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            expected = model(x)
            with dx.packed_weights(model):
                found = [model(x) for _ in range(2)]
    finally:
        _extension.module.set_winograd("faster")
    for out in found:
        assert torch.equal(out, expected)


def _add(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1)


def _step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.5).step()


def _load(weight: nn.Parameter) -> None:
    own = nn.Module()
    own.weight = weight
    own.load_state_dict({"weight": torch.full_like(weight, 0.1)})


def _other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.detach() * 2


@pytest.mark.parametrize("change", [_add, _step, _load, _other_memory])
def test_a_change_that_pytorch_sees_is_noticed(change: Callable[[nn.Parameter], None]) -> None:
    model, x = network(), images()
    with torch.no_grad(), dx.packed_weights(model):
        before = model(x)
        change(weight_of(model))
        found = model(x)
    with torch.no_grad():
        assert torch.equal(found, model(x))
    assert not torch.equal(found, before)


def test_a_write_through_data_is_seen_outside_only() -> None:
    """What the docstring says; and it shows that packed weights are read at all."""
    model, x = network(), images()
    with torch.no_grad():
        before = model(x)
        with dx.packed_weights(model):
            model(x)
            weight_of(model).data.add_(1)
            assert torch.equal(model(x), before)
        assert not torch.equal(model(x), before)


def test_a_new_parameter_takes_the_old_ones_place() -> None:
    model, x = network(), images()
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    with torch.no_grad(), dx.packed_weights(model):
        before = model(x)
        conv.weight = nn.Parameter(conv.weight * 2)
        found = model(x)
        assert not torch.equal(found, before)
    with torch.no_grad():
        assert torch.equal(found, model(x))


def test_other_batches_and_threads_have_forms_of_their_own() -> None:
    model = network()
    threads = torch.get_num_threads()
    with torch.no_grad(), dx.packed_weights(model):
        for batch in (1, 7, 1):
            for count in (1, 2):
                torch.set_num_threads(count)
                try:
                    found, again = model(images(batch)), model(images(batch))
                    expected = copy.deepcopy(model)(images(batch))  # whose weights are others
                finally:
                    torch.set_num_threads(threads)
                assert torch.equal(found, expected) and torch.equal(again, expected)


def test_it_can_be_entered_twice() -> None:
    model, x = network(), images()
    with torch.no_grad():
        before = model(x)
        with dx.packed_weights(model):
            with dx.packed_weights(model.features):
                model(x)
            assert packed._weights
            weight_of(model).data.add_(1)
            assert torch.equal(model(x), before)


def test_an_error_inside_ends_it() -> None:
    model = network()
    with pytest.raises(ZeroDivisionError), dx.packed_weights(model):
        raise ZeroDivisionError
    assert not packed._weights


def test_training_inside_is_training() -> None:
    plain, x = network().train(), images()
    inside = copy.deepcopy(plain)
    for model in (plain, inside):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            if model is inside:
                with dx.packed_weights(model):
                    model(x).square().mean().backward()
                    optimizer.step()
                    model(x)
            else:
                model(x).square().mean().backward()
                optimizer.step()
                model(x)
    assert_same_gradients(inside, plain)
    assert_same_state(inside, plain)


def test_several_threads_may_call() -> None:
    model = network()
    inputs = [images(batch) for batch in (1, 2, 3, 5)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(inputs[i]), expected[i]):
                    wrong.append(i)

    with dx.packed_weights(model):
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_weights_without_a_version_or_a_kernel_are_left_out() -> None:
    with torch.inference_mode():
        model = dx.DenseBlock(2, 16, 4, 12, 0).eval()
        with dx.packed_weights(model):
            assert not packed._weights
            model(torch.randn(1, 16, 6, 6))
    with dx.packed_weights(dx.DenseBlock(2, 16, 4, 12, 0).to("meta")):
        assert not packed._weights
    with dx.packed_weights(nn.Linear(3, 3)):
        assert not packed._weights


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"packed_weights: model: expected a torch.nn.Module, got list"):
        dx.packed_weights([]).__enter__()  # type: ignore[arg-type]


def classified(bias: bool = True) -> Any:
    torch.manual_seed(0)
    model: Any = dx.DenseNet(12, (2, 2), 16, num_classes=7, small_inputs=True).eval()
    if not bias:
        model.classifier = nn.Linear(model.classifier.in_features, 7, bias=False)
    return model


def scores(model: Any, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    _extension.module.set_winograd("never")  # packed weights are transformed more often, which rounds otherwise
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            out: Tensor = model(x)
    finally:
        _extension.module.set_winograd("faster")
    return out


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_classifier_is_cast_once(bias: bool) -> None:
    model, x = classified(bias), images().float()
    usual = copy.deepcopy(model)
    with dx.packed_weights(model):
        assert torch.equal(scores(model, x), scores(usual, x))
        held = packed._weights[id(model.classifier.weight)].lowered
        assert list(held) == [torch.bfloat16]
        first = packed.lowered(model.classifier.weight, torch.bfloat16)
        assert torch.equal(scores(model, x), scores(usual, x))
        assert packed.lowered(model.classifier.weight, torch.bfloat16) is first
        assert torch.equal(scores(model, x, torch.float16), scores(usual, x, torch.float16))
        for each in (model, usual):
            with torch.no_grad():
                for parameter in each.classifier.parameters():
                    parameter.mul_(2)
        assert torch.equal(scores(model, x), scores(usual, x))
        for each in (model, usual):
            each.classifier.register_forward_hook(lambda module, args, out: out + 1)
        assert torch.equal(scores(model, x), scores(usual, x))
    assert packed.lowered(model.classifier.weight, torch.bfloat16) is None
    assert torch.equal(scores(model, x), scores(usual, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.classifier, "forward", lambda x: x[:, :3]),
        lambda m: setattr(m, "classifier", nn.Sequential(nn.Linear(m.classifier.in_features, 2))),
        lambda m: setattr(m.classifier, "weight", nn.Parameter(m.classifier.weight.detach() * 3)),
        lambda m: setattr(m.classifier, "bias", nn.Parameter(torch.ones(7))),
        lambda m: m.classifier.double(),
    ],
    ids=["forward", "module", "weight", "bias", "float64"],
)
def test_another_classifier_inside(change: Callable[[Any], object]) -> None:
    model, x = classified(), images().float()
    usual = copy.deepcopy(model)
    with dx.packed_weights(model):
        scores(model, x)
        found: list[Any] = []
        for each in (model, usual):
            torch.manual_seed(3)
            change(each)
            try:
                found.append(scores(each, x))
            except RuntimeError as error:
                found.append(str(error))
        assert torch.equal(*found) if isinstance(found[1], Tensor) else found[0] == found[1]


def test_a_classifier_with_gradients_and_in_float32_runs_as_ever() -> None:
    model, x = classified(), images().float()
    usual = copy.deepcopy(model)
    with dx.packed_weights(model):
        scores(model, x)
        for each in (model, usual):
            with torch.autocast("cpu", torch.bfloat16):
                each(x).square().sum().backward()
        ours, theirs = model.classifier.weight.grad, usual.classifier.weight.grad
        assert ours.dtype == theirs.dtype and (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()
        with torch.no_grad():
            assert torch.allclose(model(x), usual(x), atol=1e-5)
