"""Memory of calls that follow one another: kept while weights are held, by one thread at a time, and seen by nobody."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import densenet_ext as dx
from densenet_ext import _extension, kernels
from densenet_ext.algorithm import packed
from densenet_ext.algorithm.inference import Call, Made
from densenet_ext.algorithm.packed import Held, changes, free_at_release, hold, release
from densenet_ext.algorithm.workspace import Memory, Workspace
from densenet_ext.units import stretch
from densenet_ext.units.stretch import Chain, stretches_of
from tests.support.helpers import allocations

pytestmark = pytest.mark.skipif(kernels.why_plain("cpu") is not None, reason="plain PyTorch prepares no calls")


@pytest.fixture
def weight() -> Iterator[Tensor]:
    """A weight that is held."""
    made = torch.ones(4, 3, 1, 1)
    held = hold([made])
    yield made
    release(held)


def made(*size: int, dtype: torch.dtype = torch.float32) -> Made:
    return Made.like(torch.empty(size, dtype=dtype))


def chain(weight: Tensor, seen: list[list[Tensor]] | None = None) -> list[Call]:
    """Calls of several sizes and dtypes: each fills what it makes, and takes its input for what the last one gave."""
    sizes = ((5, 7), (40, 3), (2, 2), (64, 64), (3, 5))

    def call(i: int, size: tuple[int, int]) -> Call:
        dtype = torch.float64 if i == 2 else torch.float32

        def compute(x: Tensor, out: Tensor, first: Tensor, second: Tensor) -> None:
            if seen is not None:
                seen.append([x, out, first, second])
            first.fill_(100 + i), second.fill_(200 + i)
            out.fill_(x.double().mean().item() + 1)
            assert (first == 100 + i).all() and (second == 200 + i).all()
            assert (x.double() == x.double().flatten()[0]).all()

        return Call(compute, made(*size, dtype=dtype), made(i, 9), made(3), held=Held([weight]))

    return [call(i, size) for i, size in enumerate(sizes)]


def extent(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


def test_tensors_that_live_together_lie_apart(weight: Tensor) -> None:
    seen: list[list[Tensor]] = []
    workspace = Workspace(chain(weight, seen), Memory())
    x = torch.zeros(3)
    for n in range(2):
        assert (workspace.run(x) == 5).all(), n
    for tensors in seen:
        parts = sorted(extent(t) for t in tensors if t.numel())
        assert all(a[1] <= b[0] for a, b in zip(parts[:-1], parts[1:], strict=True))
        assert all(t.data_ptr() % 64 == 0 for t in tensors[1:] if t.numel())
    first, second = seen[:5], seen[5:]
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        same = [p.data_ptr() == q.data_ptr() for p, q in zip(a, b, strict=True) if p.numel()]
        assert same.count(False) == (i == 4), "all but the result lie where they did"


def test_a_result_is_the_callers_alone(weight: Tensor) -> None:
    workspace = Workspace(chain(weight), Memory())
    first = workspace.run(torch.zeros(3))
    second = workspace.run(torch.ones(3))
    assert (first == 5).all() and (second == 6).all()
    assert first.untyped_storage().nbytes() == first.numel() * 4


def test_nothing_is_kept_where_nobody_holds_weights() -> None:
    other = torch.ones(4, 3, 1, 1)
    workspace = Workspace(chain(other), Memory())
    assert (workspace.run(torch.zeros(3)) == 5).all() and workspace._tensors is None
    held = hold([other])
    before = changes()
    workspace.run(torch.zeros(3))
    assert workspace._tensors is not None
    memory = weakref.ref(workspace._tensors[0][0].untyped_storage())
    release(held)
    assert changes() != before and workspace._tensors is None
    gc.collect()
    assert memory() is None
    assert (workspace.run(torch.zeros(3)) == 5).all() and workspace._tensors is None


def test_a_little_is_kept_in_any_case() -> None:
    seen: list[list[Tensor]] = []
    calls = chain(torch.ones(4, 3, 1, 1), seen)
    needed = sum(Workspace(calls, Memory())._sizes())
    for little, kept in ((needed - 1, False), (needed, True)):
        workspace = Workspace(calls, Memory(little))
        for n in range(3):
            assert (workspace.run(torch.full((3,), float(n))) == 5 + n).all()
            assert (workspace._tensors is not None) == kept
    places = [[t.data_ptr() for t in tensors] for tensors in seen[-2 * len(calls) :]]
    last = len(calls) - 1
    assert places[0][1:] == places[last + 1][1:] and places[1:last] == places[last + 2 : -1]
    assert workspace._memory._bytes is not None and workspace._memory._bytes.numel() == needed


def test_release_frees_what_asked_for_it() -> None:
    class Memory:
        freed = 0

        def free(self) -> None:
            self.freed += 1

    memory = Memory()
    free_at_release(memory)
    release(hold([torch.ones(1)]))
    release(hold([torch.ones(1)]))
    assert memory.freed == 1


def test_a_second_thread_takes_memory_of_its_own(weight: Tensor) -> None:
    calls = chain(weight)
    inside, go_on = threading.Event(), threading.Event()
    compute = calls[2].compute

    def waiting(x: Tensor, *made: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(10)
        compute(x, *made)

    calls[2].compute = waiting
    workspace = Workspace(calls, Memory())
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(workspace.run(torch.zeros(3))))
    thread.start()
    assert inside.wait(10)
    assert (workspace.run(torch.ones(3)) == 6).all()
    go_on.set()
    thread.join()
    assert (found[0] == 5).all()


def test_weights_are_released_while_another_thread_calls() -> None:
    other = torch.ones(4, 3, 1, 1)
    workspace, failed, stop = Workspace(chain(other), Memory()), [], threading.Event()

    def call() -> None:
        while not stop.is_set():
            try:
                if not (workspace.run(torch.zeros(3)) == 5).all():
                    failed.append("numbers")
            except Exception as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        held = hold([other])
        other.add_(1)
        release(held)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[:3]
    workspace.run(torch.zeros(3))
    assert workspace._tensors is None and workspace._memory._bytes is None


def test_a_version_that_changes_behind_the_last_release() -> None:
    weight = torch.ones(4, 3, 1, 1)
    kept, given = Held([weight]), hold([weight])
    assert kept.any()
    packed._weights.pop(id(weight))  # as another thread does it between two lines of ours
    weight.add_(1)
    kept.any()
    packed._weights[id(weight)] = packed._Weight(weight)
    packed._weights[id(weight)].holders = 1
    release(given)
    assert not kept.any()


def test_an_error_leaves_the_memory_to_the_next(weight: Tensor) -> None:
    calls = chain(weight)
    compute = calls[3].compute

    def failing(x: Tensor, *made: Tensor) -> None:
        raise ZeroDivisionError

    workspace = Workspace(calls, Memory())
    calls[3].compute = failing
    with pytest.raises(ZeroDivisionError):
        workspace.run(torch.zeros(3))
    calls[3].compute = compute
    assert (workspace.run(torch.zeros(3)) == 5).all() and not workspace._memory.lock.locked()


def test_workspaces_share_the_memory_of_the_largest(weight: Tensor) -> None:
    seen: list[list[Tensor]] = []
    memory, small = Memory(), chain(weight, seen)
    large = chain(weight, seen)
    large[1].makes = (made(400, 30), *large[1].makes[1:])
    first, second = Workspace(small, memory), Workspace(large, memory)
    first.run(torch.zeros(3))
    before = weakref.ref(seen[0][1].untyped_storage())
    seen.clear()
    gc.collect()
    assert before() is not None
    second.run(torch.zeros(3))
    assert before() is None, "the smaller is given back"
    assert (first.run(torch.zeros(3)) == 5).all() and (second.run(torch.ones(3)) == 6).all()
    assert len({tensors[1].untyped_storage().data_ptr() for tensors in seen if len(tensors[1]) != 3}) == 1


def network() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = dx.DenseNet(12, (3, 4, 2), 16, num_classes=5).eval().to(memory_format=torch.channels_last)
    return model, copy.deepcopy(model)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 64, 64).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("held", [True, False], ids=["while weights are held", "because it is little"])
def test_a_network_gives_the_same_bits_from_kept_memory(
    held: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, usual = network()
    for each, little in ((model, 0 if held else 2**30), (usual, 0)):
        monkeypatch.setattr(stretch, "_LITTLE", little)
        stretches_of(Chain(each.features, ()))  # makes them
        stretches_of(Chain(each.features, (), each))
    _extension.module.set_winograd("never")  # packed weights are transformed more often
    try:
        with (
            dx.packed_weights(model) if held else nullcontext(),
            torch.autocast("cpu", dtype, enabled=dtype is not None),
        ):
            for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
                with mode():
                    for n in (2, 1, 2):
                        x = images(n)
                        assert torch.equal(model(x), usual(x))
                        features, theirs = model.features(x), usual.features(x)
                        assert torch.equal(features, theirs)
            before = features.clone()
            with torch.no_grad():
                model.features(images(2))
            assert torch.equal(before, features)
    finally:
        _extension.module.set_winograd("faster")
    assert not packed._weights


@torch.no_grad()
def test_an_inference_allocates_next_to_nothing() -> None:
    model, usual = network()
    x = images(64)
    with dx.packed_weights(model):
        for _ in range(3):
            model(x), usual(x)
        kept, needed = (allocations(lambda m=m: m(x))[1] for m in (model, usual))
    assert kept < needed / 8, (kept, needed)
    for _ in range(2):
        usual(images(1))
    one = images(1)
    assert allocations(lambda: usual(one))[1] < needed / 128
