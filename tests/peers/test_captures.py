"""Captures of fused networks: FX, torch.jit.trace and script, torch.export and ONNX hold the usual operations."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.peers.twins import NETS, assert_all_fused, fuse, images, library, pair, same, torchvision_net, train_step

EACH = pytest.mark.parametrize("name", NETS)
CASES = pytest.mark.parametrize(
    ("name", "training"), [("torchvision", True), ("torchvision", False), ("timm", False), ("monai", False)]
)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _deprecations() -> Iterator[None]:
    """PyTorch deprecates TorchScript; people's networks are scripted all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def targets(graph: fx.Graph) -> list[tuple[str, str]]:
    """Operations and called modules of a graph, in order."""
    return [(node.op, str(node.target)) for node in graph.nodes]


def script_kinds(graph: Any) -> Counter[str]:
    return Counter(node.kind() for node in graph.nodes() if node.kind().startswith("aten::"))


@EACH
@BOTH
def test_symbolic_trace(name: str, training: bool) -> None:
    if name == "monai":
        pytest.skip("MONAI's head is called through functions that FX does not trace")
    models = pair(NETS[name]().double().train(training))
    assert_all_fused(models[1])
    graphs = []

    def run(model: nn.Module) -> Any:
        traced = fx.symbolic_trace(model)
        graphs.append(targets(traced.graph))
        return train_step(traced)

    same(models, run)
    assert graphs[0] == graphs[1]
    assert ("call_function", "<built-in method cat of type object at") not in graphs[0]
    assert any("conv2" in target for _, target in graphs[1])


@BOTH
def test_tracer_stops_at_the_same_leaves(training: bool) -> None:
    """A tracer whose leaves are dense layers finds them, as torchvision's feature extraction does."""
    extraction = library("torchvision.models.feature_extraction")
    models = pair(torchvision_net().double().train(training))
    names = [extraction.get_graph_node_names(model) for model in models]
    assert names[0] == names[1]
    node = "features.denseblock1.denselayer2.conv1"
    assert node in names[0][0]

    def run(model: nn.Module) -> Any:
        return extraction.create_feature_extractor(model, [node, "features.transition1.pool"])(images())

    same(models, run)


@CASES
def test_jit_trace(name: str, training: bool) -> None:
    models = pair(NETS[name]().double().train(training))
    kinds = []

    def run(model: nn.Module) -> Any:
        traced = torch.jit.trace(model, (images(),), check_trace=False)
        kinds.append(script_kinds(traced.inlined_graph))
        return traced(images(3, 64)) if not training else None

    same(models, run)
    assert kinds[0] == kinds[1] and kinds[0]["aten::_convolution"] > 8


def test_jit_trace_of_bound_forward() -> None:
    def run(model: nn.Module) -> Any:
        return torch.jit.trace(model.forward, (images(),), check_trace=False)(images(3, 64))

    same(pair(torchvision_net().double().eval()), run)


def test_jit_trace_of_one_method() -> None:
    """torch.jit.trace_module traces `forward` by its name."""

    def run(model: nn.Module) -> Any:
        return torch.jit.trace_module(model, {"forward": (images(),)}, check_trace=False)(images(3, 64))

    same(pair(torchvision_net().double().eval()), run)


@CASES
def test_jit_script(name: str, training: bool) -> None:
    models = pair(NETS[name]().double().train(training))
    assert_all_fused(models[1])
    kinds = []

    def run(model: nn.Module) -> Any:
        scripted = torch.jit.script(model)
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        kinds.append(script_kinds(loaded.inlined_graph))
        return train_step(scripted), train_step(loaded)

    same(models, run)
    assert kinds[0] == kinds[1]
    assert_all_fused(models[1])  # the fused model is as it was


def test_script_after_calls() -> None:
    """A model that has run fused is scripted, runs on, and is scripted again."""

    def run(model: nn.Module) -> Any:
        results = [train_step(model)]
        for _ in range(2):
            results += [train_step(torch.jit.script(model)), train_step(model)]
        return results

    same(pair(torchvision_net().double()), run)


def test_script_of_memory_mode() -> None:
    def run(model: nn.Module) -> Any:
        with torch.no_grad():  # torchvision's memory mode has no scripted form for training
            return torch.jit.script(model.eval())(images())

    same(pair(torchvision_net(memory_efficient=True).double()), run)


def test_script_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torchvision_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner.features.conv0(x).mean()

    torch.manual_seed(0)
    same(pair(Outer().double()), lambda model: train_step(torch.jit.script(model)))


def test_frozen_and_optimised_script() -> None:
    def run(model: nn.Module) -> Any:
        return torch.jit.optimize_for_inference(torch.jit.script(model))(images(dtype=torch.float32))

    same(pair(torchvision_net().eval()), run, tolerance=1e-4)


@CASES
def test_export(name: str, training: bool) -> None:
    models = pair(NETS[name]().double().train(training))
    graphs = []

    def run(model: nn.Module) -> Any:
        program = torch.export.export(model, (images(),))
        graphs.append(Counter(target for _, target in targets(program.graph)))
        return program.module()(images())

    same(models, run)
    assert {k: v for k, v in graphs[0].items() if "aten" in k} == {k: v for k, v in graphs[1].items() if "aten" in k}
    assert not any("densenet_ext" in target for target in graphs[1])


def test_export_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=2, max=16)

    def run(model: nn.Module) -> Any:
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
        return program.module()(images(5))

    same(pair(torchvision_net().double().eval()), run)


def test_parameters_keep_their_names_in_exports() -> None:
    programs = [torch.export.export(model.eval(), (images(),)) for model in pair(torchvision_net().double())]
    assert list(programs[0].state_dict) == list(programs[1].state_dict)
    assert [spec.target for spec in programs[0].graph_signature.input_specs] == [
        spec.target for spec in programs[1].graph_signature.input_specs
    ]


def test_modules_in_export_keep_their_classes() -> None:
    """The stack of modules that export writes beside each node names the classes that people know."""
    stacks = []
    for model in pair(torchvision_net().double().eval()):
        program = torch.export.export(model, (images(),))
        found = [node.meta.get("nn_module_stack", {}) for node in program.graph.nodes]
        stacks.append([[(path, str(kind)) for path, kind in stack.values()] for stack in found])
    assert stacks[0] == stacks[1]


def test_module_compile_in_place() -> None:
    def run(model: nn.Module) -> Any:
        torch.compiler.reset()
        model.compile(backend="aot_eager")
        return train_step(model)

    same(pair(torchvision_net().double()), run)


def test_fuse_of_a_traced_module_changes_nothing() -> None:
    traced = torch.jit.trace(torchvision_net().double().eval(), (images(),))
    before = traced(images())
    assert fuse(traced) is traced and torch.equal(traced(images()), before)


def test_fuse_of_a_graph_module() -> None:
    """What FX made of a network runs on after `fuse`, with the same numbers."""
    model = fx.symbolic_trace(torchvision_net().double())
    other = fx.symbolic_trace(torchvision_net().double())
    other.load_state_dict(model.state_dict())
    same((model, fuse(other)), train_step)


@pytest.mark.parametrize("how", ["fx", "trace", "script", "export", "compile"])
def test_capture_leaves_no_trace(how: str) -> None:
    """After a capture the fused model has the classes that it had, and no more attributes than another would have."""
    captures: dict[str, Callable[[Any], Any]] = {
        "fx": fx.symbolic_trace,
        "trace": lambda model: torch.jit.trace(model, (images(),)),
        "script": torch.jit.script,
        "export": lambda model: torch.export.export(model, (images(),)),
        "compile": lambda model: torch.compile(model, backend="eager")(images()),
    }

    def run(model: Any) -> Any:
        before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
        captures[how](model)
        left = {}
        for name, m in model.named_modules():
            assert type(m) is before[name][0], name
            left[name] = sorted(set(m.__dict__) - before[name][1])
        return left, model(images())

    models = pair(torchvision_net().double().eval())
    same(models, run)
    assert_all_fused(models[1])
