"""Modes, counters and quantisers see the same operations in a fused model as in an unfused one."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.peers.twins import (
    NETS,
    assert_alike,
    assert_all_fused,
    counts,
    images,
    library,
    pair,
    same,
    torchvision_net,
    train_step,
)

EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in {"conv2d", "batch_norm", "relu", "relu_", "cat", "max_pool2d", "avg_pool2d", "linear"}:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@EACH
@BOTH
@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_every_operation(name: str, training: bool, mode: Callable[[], Any]) -> None:
    models = pair(NETS[name]().double().train(training))
    assert_all_fused(models[1])

    def run(model: nn.Module) -> Any:
        with mode() as counter:
            out = train_step(model)
        assert sum(counter.seen.values()) > 20
        return out, counts(counter.seen)

    same(models, run)


@BOTH
def test_mode_that_changes_results_changes_them(training: bool) -> None:
    """A mode that quantises the inputs of convolutions, as tools for quantisation do."""

    class Rounding(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.conv2d, nn.functional.conv2d):
                args = ((args[0] * 16).round() / 16, *args[1:])
            return func(*args, **(kwargs or {}))

    def run(model: nn.Module) -> Any:
        with Rounding():
            return model(images())

    got = same(pair(torchvision_net().double().train(training)), run)
    assert not torch.allclose(got[1], pair(torchvision_net().double().train(training))[0](images()))


@BOTH
def test_mode_in_another_part_of_the_step(training: bool) -> None:
    """A mode around the backward pass only sees what it always sees; a mode that is over leaves the model fused."""

    def run(model: nn.Module) -> Any:
        x = images().requires_grad_()
        out = model(x)
        with Functions():
            out.square().mean().backward()
        with Dispatches():
            model(x)
        return out, x.grad, model(x)

    models = pair(torchvision_net().double().train(training))
    same(models, run)
    assert_all_fused(models[1])


@pytest.mark.parametrize("where", [torch.device("cpu"), torch.device("meta")], ids=str)
def test_device_context_is_no_reason(where: torch.device) -> None:
    def run(model: nn.Module) -> Any:
        x = images()
        with where:
            return model(x)

    same(pair(torchvision_net().double()), run)


@EACH
@BOTH
def test_pytorch_counts_the_same_flops(name: str, training: bool) -> None:
    def run(model: nn.Module) -> Any:
        with FlopCounterMode(display=False) as counter:
            train_step(model)
        counts = counter.get_flop_counts()
        assert counter.get_total_flops() > 1e5
        return {module: {str(op): n for op, n in found.items()} for module, found in counts.items()}

    same(pair(NETS[name]().double().train(training)), run)


def test_profiler_sees_the_same_flops() -> None:
    def run(model: nn.Module) -> Any:
        with torch.profiler.profile(with_flops=True) as found:
            model(images())
        return sum(event.flops for event in found.key_averages() if event.flops)

    counts = [run(model.eval()) for model in pair(torchvision_net().double())]
    assert counts[1] > 0.5 * counts[0]  # a profiler shows what runs: fused operations need not be the usual ones


def fvcore_flops(model: nn.Module) -> Any:
    analysis = library("fvcore.nn").FlopCountAnalysis(model, (images(),)).unsupported_ops_warnings(False)
    return dict(analysis.by_module()), dict(analysis.by_operator())


def thop_flops(model: nn.Module) -> Any:
    return library("thop").profile(model, inputs=(images(),), verbose=False)


def ptflops_of(model: nn.Module, backend: str) -> Any:
    counter = library("ptflops").get_model_complexity_info
    with contextlib.redirect_stdout(io.StringIO()):
        return counter(
            model,
            (3, 32, 32),
            input_constructor=lambda size: {"x": images(1)},
            as_strings=False,
            print_per_layer_stat=False,
            backend=backend,
        )


def torchinfo_of(model: nn.Module) -> Any:
    found = library("torchinfo").summary(model, input_data=images(), verbose=0, depth=5)
    layers = [(info.class_name, info.depth, info.output_size, info.macs) for info in found.summary_list]
    return found.total_mult_adds, found.total_params, found.total_output_bytes, layers


COUNTERS: dict[str, Callable[[nn.Module], Any]] = {
    "fvcore": fvcore_flops,
    "thop": thop_flops,
    "ptflops by modules": lambda model: ptflops_of(model, "pytorch"),
    "ptflops by operators": lambda model: ptflops_of(model, "aten"),
    "torchinfo": torchinfo_of,
}


@EACH
@pytest.mark.parametrize("counter", COUNTERS)
def test_counters_count_the_same(name: str, counter: str) -> None:
    models = pair(NETS[name]().double().eval())
    results = [(COUNTERS[counter](model), train_step(model)) for model in models]
    assert_alike(results[1], results[0])


@BOTH
def test_mutation_of_saved_tensors(training: bool) -> None:
    """What was saved may change before the backward pass; the gradient is that of the forward pass."""

    def run(model: nn.Module) -> Any:
        x = images().requires_grad_()
        with allow_mutation_on_saved_tensors():
            base = x * 1
            out = model.features.denseblock1(model.features.pool0(model.features.norm0(model.features.conv0(base))))
            base.zero_()
            loss = out.square().mean()
            out.detach().mul_(0)
            loss.backward()
        return loss, x.grad

    same(pair(torchvision_net().double().train(training)), run)


def test_saved_tensors_hooks() -> None:
    """Hooks that move what is saved elsewhere (offloading) give it back for the backward pass."""

    def run(model: nn.Module) -> Any:
        with saved_tensors_hooks(lambda t: t.detach().clone().numpy(), torch.from_numpy):
            x = images().requires_grad_()
            out = model(x)
        out.square().mean().backward()
        return out, x.grad

    same(pair(torchvision_net().double()), run)


def test_anomaly_detection() -> None:
    def run(model: nn.Module) -> Any:
        with torch.autograd.detect_anomaly(check_nan=True):
            return train_step(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(pair(torchvision_net().double()), run)


@BOTH
def test_subclass_of_tensor_runs_through(training: bool) -> None:
    """A subclass with a ``__torch_function__`` of its own meets every operation, and comes out at the end."""

    class Named(Tensor):
        seen: Counter[str] = Counter()

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "conv2d":
                cls.seen["conv2d"] += 1
            return super().__torch_function__(func, types, args, kwargs)

    def run(model: nn.Module) -> Any:
        Named.seen = Counter()
        out = model(images().as_subclass(Named))
        return type(out).__name__, out.as_subclass(Tensor), counts(Named.seen)

    same(pair(torchvision_net().double().train(training)), run)


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_quiet")
def test_nncf_inserts_the_same_quantisers() -> None:
    nncf = library("nncf")

    def run(model: nn.Module) -> Any:
        """Counts; the quantised model is not run, since nncf would compile an extension of its own."""
        quantised = nncf.quantize(
            model,
            nncf.Dataset([images(dtype=torch.float32)]),
            subset_size=1,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
        return counts(Counter(type(m).__name__ for m in quantised.modules() if "Quant" in type(m).__name__))

    got = same(pair(torchvision_net().eval()), run)
    assert "Quantizer" in got[0]


def test_fx_quantisation_inserts_the_same_observers() -> None:
    quantize = library("torch.ao.quantization.quantize_fx")
    mapping = library("torch.ao.quantization").get_default_qconfig_mapping("x86")

    def run(model: nn.Module) -> Any:
        x = images(dtype=torch.float32)
        prepared = quantize.prepare_fx(model, mapping, (x,))
        prepared(x)
        return counts(Counter(type(m).__name__ for m in prepared.modules())), prepared(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(pair(torchvision_net().eval()), run, tolerance=1e-5)
