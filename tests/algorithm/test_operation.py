"""What autograd is given of a call: the tensors that are there, and what it saves of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import densenet_ext as dx
from densenet_ext.algorithm.operation import Present


@pytest.mark.parametrize("given", [(True,), (True, False), (True, True, True), (True, False, False, True, False)])
def test_present_and_back(given: tuple[bool, ...]) -> None:
    values = list(range(len(given)))
    present = Present(given)
    assert present.of(values) == tuple(i for i in values if given[i])
    assert present.among_all(present.of(values), None) == tuple(i if given[i] else None for i in values)


def test_none_is_present() -> None:
    assert Present((False, False)).among_all((), None) == (None, None)


def _block(**options: Any) -> dx.DenseBlock:
    torch.manual_seed(0)
    return dx.DenseBlock(3, 4, 2, 2, 0.0, **options).train()


def test_autograd_sees_no_absent_tensors() -> None:
    block = _block()
    nodes: list[Any] = [block(torch.randn(2, 4, 3, 3)).grad_fn]
    while nodes[-1].name() != "_FusedBackward":
        nodes.append(nodes[-1].next_functions[0][0])
    seen = [edge[0] for edge in nodes[-1].next_functions]
    assert seen[0] is None  # the features want no gradient
    assert [node.variable for node in seen[1:]] == list(block.parameters())


def _left_over(x: torch.Tensor) -> torch.Tensor:
    """x as a tensor that torch.func has wrapped, and whose transform has ended."""
    kept = []

    def f(y: torch.Tensor) -> torch.Tensor:
        kept.append(y)
        return y.sum()

    torch.func.grad(f)(x)
    return kept[0]


@pytest.mark.parametrize("make", [_block, lambda: dx.Transition(4, 3).train()])
def test_features_left_over_by_torch_func(make: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    module, again = make(), make()
    again.load_state_dict(module.state_dict())
    expected, got = again(x), module(_left_over(x))
    expected.sum().backward(), got.sum().backward()
    assert torch.equal(got, expected)
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
