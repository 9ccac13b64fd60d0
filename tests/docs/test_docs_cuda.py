"""docs/users/cuda-graphs.md: as it stands on a GPU, elsewhere with stand-ins for CUDA's graphs and for the compiler."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units import captures
from tests.support import cuda_stand_in, peers
from tests.support.helpers import DEVICE
from tests.support.pages import assert_shown, page_named, programs, run

BLOCKS = programs(page_named("cuda-graphs.md"))
on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="runs with --device cuda")
elsewhere = pytest.mark.skipif(DEVICE.type == "cuda", reason="a stand-in for what this machine has")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_stand_in.install(monkeypatch)
    # a graph is captured below the dispatcher: no mode of Python sees its operations, as that of the stand-in does
    monkeypatch.setattr(captures, "_is_blind", lambda mode: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.cuda
@pytest.mark.slow
@on_a_gpu
def test_the_page_on_a_gpu() -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        assert_shown(block, run(block, namespace))


@elsewhere
@pytest.mark.usefixtures("stand_in")
def test_the_page_with_a_stand_in() -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        code = block.code.replace('"cuda"', '"cpu"')
        assert_shown(block, run(block._replace(code=code), namespace))


class Step:
    """A step of training on tensors that stay where they are."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images, self.labels = model, images.clone(), torch.arange(len(images)) % 10
        self.rate = torch.tensor(0.01)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, capturable=True)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@elsewhere
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_replays_of_the_stand_in_are_steps(save: str) -> None:
    model = dx.densenet_bc(depth=10, growth_rate=4, save=save)
    eager, captured = Step(copy.deepcopy(model), torch.randn(4, 3, 16, 16)), Step(model, torch.empty(4, 3, 16, 16))
    captured.images.copy_(eager.images)
    assert torch.equal(captured(), eager())
    graph = cuda_stand_in.Graph()
    with torch.cuda.graph(graph):
        loss = captured()
    for _ in range(3):
        batch = torch.randn(4, 3, 16, 16)
        for step in (eager, captured):
            step.images.copy_(batch)
            step.rate.mul_(0.5)
        graph.replay()
        assert torch.equal(loss, eager())
    for a, b in zip(captured.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@elsewhere
@pytest.mark.usefixtures("stand_in")
def test_the_stand_in_lets_no_value_be_read_in_a_capture() -> None:
    with pytest.raises(RuntimeError, match="a value is read during a capture"), torch.cuda.graph(cuda_stand_in.Graph()):
        torch.ones(2).sum().item()


@elsewhere
@pytest.mark.usefixtures("stand_in")
def test_what_report_says_of_a_graphed_model() -> None:
    network = peers.torchvision_densenet().DenseNet
    model = dx.fuse(network(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=2))
    torch.cuda.make_graphed_callables(model, (torch.randn(2, 3, 32, 32),))
    reasons = {row.kind: row.reason for row in dx.report(model)}
    assert reasons.pop("head") == "its forward was replaced on the instance"
    assert set(reasons.values()) == {None}
