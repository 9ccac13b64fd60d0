"""The one way in: a class made on the fly runs a unit, the original ``forward`` runs where that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units import captures, entry
from densenet_ext.units.block import Block, layer_values, norms_of
from densenet_ext.units.built import built, plain, settings_of
from densenet_ext.units.reading import code_changed, know_code, names_in_code


class Twice(nn.Module):
    """Doubles, by a number of its own that code names, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.remark = 2, "unused"

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor


class Unit:
    """Says that it ran, and does the same."""

    kind = "toy"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def reason(self, module: nn.Module) -> str | None:
        return None

    def call(self, module: nn.Module, usual: entry.Forward, x: Any) -> Any:
        self.calls.append(x)
        entry.ran(module, self.kind)
        return usual(module, x)


def test_enter_and_leave() -> None:
    module, unit = Twice(), Unit()
    assert entry.unit_of(module) is None and entry.straight(module) is None and not entry.leave(module)
    entry.enter(module, unit)
    assert type(module) is not Twice and isinstance(module, Twice) and type(module).__name__ == "Twice"
    assert entry.original_class(module) is Twice and entry.unit_of(module) is unit is entry.straight(module)
    seen: list[str] = []
    with entry.observed(lambda module, kind: seen.append(kind)):
        assert module(x=torch.ones(1)) == 2  # by the name of the argument
    assert len(unit.calls) == 1 and seen == ["toy"]
    assert entry.leave(module) and type(module) is Twice and entry.unit_of(module) is None
    assert module(torch.ones(1)) == 2 and len(unit.calls) == 1


def test_what_keeps_a_unit_from_being_asked() -> None:
    module: Any = Twice()
    entry.enter(module, Unit())
    assert entry.reason_outside(module) is None
    handle = module.register_forward_hook(lambda *args: None)
    assert entry.straight(module) is None and entry.reason_outside(module) is None
    handle.remove()
    module.forward = lambda x: x
    assert entry.reason_outside(module) == "its forward was replaced on the instance" and entry.straight(module) is None


def test_what_is_looked_at_of_a_module_that_is_not_called() -> None:
    module: Any = Twice()
    entry.enter(module, Unit())
    known = entry.straightness(module)
    assert known.holds()
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        handle = getattr(module, f"register_{kind}")(lambda *args: None)
        assert not known.holds()
        handle.remove()
        assert known.holds()
    module.__dict__["forward"] = lambda x: x
    assert not known.holds()
    del module.__dict__["forward"]
    assert known.holds()
    entry.enter(module, Unit())
    assert not known.holds()


def test_a_function_that_is_replaced_in_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module, unit = Twice(), Unit()
    entry.enter(module, unit)
    know_code(Twice)
    assert not code_changed(Twice)
    monkeypatch.setattr(Twice, "scaled", lambda self, x: x * 3)
    assert code_changed(Twice)
    assert entry.reason_outside(module) == "a function of Twice was replaced since it was fused"


def test_the_original_runs_where_a_capture_has_to_see_it() -> None:
    module, unit = Twice(), Unit()
    entry.enter(module, unit)
    x = torch.ones(1)
    assert captures.reason(x) is None and captures.patched() is None
    assert torch.func.vmap(module)(x) == 2 and not unit.calls
    assert torch.func.jvp(module, (x,), (x,))[0] == 2 and not unit.calls


def test_errors_of_eager_are_told_in_our_words() -> None:
    def usual(module: nn.Module, image: Any) -> Any:
        raise RuntimeError("eager's words")

    mismatch = entry.not_a_tensor([1])
    assert mismatch.words == "expected a tensor, got list"
    with pytest.raises(RuntimeError, match="^image: expected a tensor, got list \\(eager's words\\)$"):
        entry.as_eager(mismatch, usual, Twice(), [1])
    assert entry.as_eager(mismatch, lambda module, x: x, Twice(), 7) == 7  # what eager takes is taken


def test_settings_that_code_names_are_part_of_how_a_module_is_built() -> None:
    module: Any = Twice()
    assert {"factor", "scaled"} <= names_in_code(Twice) and "remark" not in names_in_code(Twice)
    assert dict(settings_of(module)) == {"factor": 2, "remark": "unused"}
    how = built(module, (), ("",))
    assert how.changed(module) is None
    module.remark = "another"
    assert how.changed(module) is None
    module.factor = 3
    assert how.changed(module) == "it has factor 3, which was 2 when its forward was tried out"
    assert built(module, (), ("",), but=("factor",)).own[0].settings == ()
    assert plain((1, "a", (None,))) and not plain([1]) and not plain((torch.ones(1),))


def test_a_block_reads_its_layers() -> None:
    block = dx.DenseBlock(2, 8, 2, 4, 0.0)
    unit: Any = entry.unit_of(block)
    assert isinstance(unit, Block)
    layers = [layer_values(unit, layer) for layer in unit.layers_of(block)]
    first: Any = block.denselayer1
    assert layers[0].conv1 is first.conv1.weight and len(norms_of(layers)) == 4
    assert norms_of(layers)[1].weight is first.norm2.weight
