"""The benchmarks: what they measure on things whose size is known."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from benchmarks import measure, peers
from benchmarks.run import copy_state
from densenet_ext.memory import measuring

TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 2), 8, 5, True, batch=2, image=8)
FLOAT = 4  # bytes


def clock_of(seconds: dict[str, float]) -> Callable[[Callable[[], object]], float]:
    """A clock that reads the step's name instead of running it."""
    return lambda step: seconds[str(step())]


def steps(*names: str) -> dict[str, Callable[[], object]]:
    return {name: functools.partial(str, name) for name in names}


# ---- rounds and ratios -----------------------------------------------------------------------------------------------


def test_every_step_runs_once_a_round_and_the_order_rotates() -> None:
    order: list[str] = []
    ticks = itertools.count(1)

    def clock(step: Callable[[], object]) -> float:
        order.append(str(step()))
        return float(next(ticks))

    times = measure.interleave(steps("a", "b", "c"), 4, clock=clock)
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_peer_that_is_far_slower_runs_in_fewer_rounds_and_ours_in_all() -> None:
    seconds = {"ours": 9.0, "fast": 1.0, "near": 1.2, "slow": 2.0}
    times = measure.interleave(steps(*seconds), 7, ["fast", "near", "slow"], clock_of(seconds))
    assert times["slow"] == [2.0, None, None, 2.0, None, None, 2.0]
    for name in ("ours", "fast", "near"):
        assert times[name] == [seconds[name]] * 7


def test_ratios_are_paired_within_a_round() -> None:
    # Every round is slower than the last; peer over ours is 2, 3 and 4 all the same.
    assert measure.ratio([2, 30, 400], [1, 10, 100]) == (3, 2, 4)
    assert measure.ratio([2, None, 400], [1, 10, 100]) == (3, 2, 4)
    assert measure.median([1, None, 5, 2]) == 2
    with pytest.raises(ValueError, match="at least one round that ran both"):
        measure.ratio([None], [1.0])


def test_seconds_is_the_wall_time() -> None:
    assert 0.02 <= measure.seconds(lambda: time.sleep(0.02)) < 1


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_a_storage_once_and_leaves_out_what_exists() -> None:
    x = torch.randn(10, 20, requires_grad=True)

    def forward() -> Tensor:
        y = x.exp()  # saves y, 200 values
        return (y * y[:5].repeat(2, 1) * x).sum()  # y and x again, the repeated half, and the first product

    assert measuring.saved_bytes(forward, [x]) == 3 * 200 * FLOAT
    assert measuring.saved_bytes(forward) == 4 * 200 * FLOAT
    with torch.no_grad():
        assert measuring.saved_bytes(forward) == 0


def test_allocations_are_over_the_start_of_the_step() -> None:
    held_before = torch.zeros(5000)

    def forward() -> Tensor:
        torch.zeros(3000)  # in use for a moment
        return torch.zeros(1000)

    def rest(value: Tensor) -> None:
        torch.zeros(4000)

    memory = measuring.allocations(forward, rest)
    assert memory == (1000 * FLOAT, 5000 * FLOAT)
    assert measuring.allocations(lambda: torch.zeros(7), lambda value: None) == (7 * FLOAT, 7 * FLOAT)
    del held_before


def test_memory_of_a_trace() -> None:
    def change(at: float, size: int, device: int = 0) -> dict[str, object]:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Device Type": device}}

    events = [
        change(3, -30),
        change(1, 10),
        change(2, 30),
        change(2, 1000, device=1),
        {"name": measuring.FORWARD, "ts": 0.5, "dur": 3},
        change(4, 25),
        change(5, -35),
        {"name": "aten::add", "ts": 6, "dur": 1},
        {},
    ]
    assert measuring.memory_of(events) == (10, 40)


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_a_step_frees_what_it_took_and_both_counts_agree(save: str) -> None:
    model = dx.DenseNet(**TINY.keywords(), small_inputs=True, save=save)
    step = measure.Step(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 4]))
    step()  # momentum and its like stay
    before = [parameter.detach().clone() for parameter in model.parameters()]
    memory = measuring.allocations(step.forward, step.backward)
    saved = measuring.saved_bytes(step.forward, [*model.parameters(), *model.buffers(), step.images, step.labels])
    loss = FLOAT
    assert memory.kept == saved + loss
    assert memory.peak > memory.kept
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- contenders ------------------------------------------------------------------------------------------------------


def test_networks_are_those_of_the_papers() -> None:
    built = {}
    for name, network in peers.NETWORKS.items():
        with torch.device("meta"):
            built[name] = next(peers.contenders(network)).build()
    with torch.device("meta"):
        expected = {"bc100": dx.densenet_bc(100, 12), "densenet121": dx.densenet121()}
    for name, model in expected.items():
        assert [p.shape for p in built[name].parameters()] == [p.shape for p in model.parameters()]
    assert sum(p.numel() for p in built["bc100"].parameters()) == 769_162


@pytest.mark.parametrize("small_inputs", [True, False])
def test_contenders_have_distinct_names_and_the_same_parameters(small_inputs: bool) -> None:
    network = TINY._replace(small_inputs=small_inputs)
    made = list(peers.contenders(network))
    names = [contender.name for contender in made]
    assert len(set(names)) == len(names)
    assert any(contender.how == peers.PLAIN and not contender.ours for contender in made)
    for save in peers.LEVELS:  # what the ratios refer to
        assert f"densenet_ext, {save}, channels_last" in names
    source = made[0].build()
    for contender in made:
        try:
            model = contender.build()
        except peers.Unavailable:
            assert "torchvision" in contender.name
            continue
        copy_state(source, model)
        for a, b in zip(source.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \[3, 2\], got \[2, 3\]"):
        copy_state(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))


def test_a_clone_is_loaded_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "densenet.py").write_text("class DenseNet:\n    here = __file__\n")
    assert vars(peers.efficient_densenet(tmp_path))["here"] == str(tmp_path / "models" / "densenet.py")
    with pytest.raises(peers.Unavailable, match="no models/densenet.py"):
        peers.efficient_densenet(tmp_path / "models")


def test_reasons_hold_no_paths() -> None:
    error = RuntimeError("g++ /some/where/x.cpp -o '/else/where': not found, 3/4 done\nand more")
    assert peers.reason(error) == "g++ ... -o '...': not found, 3/4 done"
    assert peers.reason(KeyError()) == "KeyError"
