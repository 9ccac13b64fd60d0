"""What a unit remembers of its modules: compiled and in Python."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from densenet_ext import _extension
from densenet_ext.units import reading
from densenet_ext.units.norms import has_own
from densenet_ext.units.reading import ABSENT, Part, Readings, Records, Watch, code_changed, know_code

FORMS = [
    pytest.param(reading.Record, id="python"),
    pytest.param(
        None if _extension.module is None else _extension.module.Record,
        id="compiled",
        marks=pytest.mark.skipif(_extension.module is None, reason="without the compiled part"),
    ),
]


@pytest.fixture(params=FORMS)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``record`` in one of its two forms."""
    monkeypatch.setattr(reading, "_Form", request.param)
    return reading.record


def test_a_record_sees_every_change_of_its_entries(made: Any) -> None:
    values: dict[str, Any] = {"a": 1, "b": (2, 3), "hooks": OrderedDict()}
    entry = (values, 3, ("a", "b", "hooks", "c"), (1, (2, 3), OrderedDict(), ABSENT))
    known = made([entry])
    assert known.holds()
    values["b"] = (2, 3)[:1] + (3,)  # an equal one
    assert known.holds()
    for name, other in (("a", 2), ("b", (2, 4)), ("a", None)):
        before = values[name]
        values[name] = other
        assert not known.holds(), name
        values[name] = before
    values["hooks"][0] = print
    assert not known.holds()
    values["hooks"].clear()
    assert known.holds()
    values["c"] = 1
    assert not known.holds()
    del values["c"], values["a"]
    assert not known.holds()


def test_a_record_looks_into_the_dictionaries_that_are_there_now(made: Any) -> None:
    before: dict[int, Any] = {}
    values: dict[str, Any] = {"hooks": before, "more": {}}
    known = made([(values, 2, ("hooks", "more"), ({}, {}))])
    assert known.holds()
    now: dict[int, Any] = {}
    values["hooks"] = now
    assert known.holds()
    before[0] = print  # nobody's any more
    assert known.holds()
    now[0] = print
    assert not known.holds()
    now.clear()
    values["more"][0] = print
    assert not known.holds()
    values["more"].clear()
    assert known.holds()


def test_a_record_compares_what_is_changed_in_place(made: Any) -> None:
    """A dictionary with entries, which is equal to the expected one, may change without the one that holds it."""
    inner: dict[str, Any] = {"a": 1}
    values: dict[str, Any] = {"number": 3, "inner": inner}
    known = made([(values, 2, ("number", "inner"), (3, {"a": 1}))])
    assert known.holds()
    inner["a"] = 2
    assert not known.holds()
    inner["a"] = 1
    assert known.holds()
    values["inner"] = 5  # no dictionary any more
    assert not known.holds()
    values["inner"] = {"a": 1}
    assert known.holds()
    values["inner"]["b"] = 2
    assert not known.holds()


def test_a_record_counts_entries_where_it_is_told_how_many(made: Any) -> None:
    values = {"a": 1}
    counted, any_number = made([(values, 1, ("a",), (1,))]), made([(values, -1, ("a",), (1,))])
    values["b"] = 2
    assert not counted.holds()
    assert any_number.holds()


def test_a_record_of_all_values_sees_their_order(made: Any) -> None:
    first, second = object(), object()
    values = {"a": first, "b": second}
    known = made([(values, 2, None, (first, second))])
    assert known.holds()
    values["a"] = values.pop("a")  # behind b
    assert not known.holds()


def test_a_record_of_the_same_objects_refuses_equal_ones(made: Any) -> None:
    weight = torch.ones(3)
    values = {"weight": weight, "bias": None}
    known = made([(values, 2, ("weight", "bias"), (weight, None))], identical=True)
    assert known.holds()
    values["weight"] = torch.ones(3)
    assert not known.holds()


def test_a_record_sees_another_class(made: Any) -> None:
    module = nn.ReLU()
    known = made([], [(module, nn.ReLU)])
    assert known.holds()
    module.__class__ = nn.ReLU6
    assert not known.holds()


def test_a_record_of_a_class_reads_its_functions(made: Any) -> None:
    class Own:
        def act(self) -> None: ...

    known = made([(vars(Own), -1, ("act", "other"), (Own.act, ABSENT))])
    assert known.holds()
    Own.other = Own.act  # type: ignore[attr-defined]
    assert not known.holds()


def test_a_record_outlives_what_it_looks_at(made: Any) -> None:
    """What is asked for ahead, dictionaries inside of dictionaries and typed objects, may be gone from its place."""

    class Hooks(OrderedDict[str, int]):
        pass

    class Module:
        pass

    hooks, module = Hooks(), Module()
    inner, thing = weakref.ref(hooks), weakref.ref(module)
    values: dict[str, Any] = {"hooks": hooks}
    known = made([(values, 1, ("hooks",), (OrderedDict(),))], [(module, Module)])
    assert known.holds()
    del hooks, module
    for others in (Hooks(), Hooks()):  # an equal one, which the first has to make room for
        values["hooks"] = others
        gc.collect()
        assert known.holds()
    values["hooks"] = Hooks(a=1)
    assert not known.holds()
    values.clear()
    assert not known.holds()
    assert thing() is not None
    del known
    gc.collect()
    assert inner() is None and thing() is None


def test_a_record_looks_ahead_at_what_is_no_dictionary(made: Any) -> None:
    """Numbers, None and names that are not there lie beside the dictionaries; a record of nothing holds."""
    values: dict[str, Any] = {"a": None, "b": 3, "c": {}}
    known = made([(values, -1, ("a", "b", "c", "d"), (None, 3, {}, ABSENT)), ({}, 0, None, ()), ({}, -1, (), ())])
    assert known.holds() and made([]).holds()
    values["c"][1] = 2
    assert not known.holds()
    values["c"] = 5
    assert not known.holds()


def test_an_error_of_a_comparison_is_raised(made: Any) -> None:
    class Strange:
        def __eq__(self, other: object) -> bool:
            raise LookupError("strange")

        __hash__ = None  # type: ignore[assignment]

    values: dict[str, Any] = {"a": 1}
    known = made([(values, 1, ("a",), (Strange(),))])
    with pytest.raises(LookupError, match="strange"):
        known.holds()


def test_a_watch_sees_children_hooks_forwards_and_settings() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    conv: Any = module[0]
    watch = Watch([Part(module), *map(Part, module)])
    assert watch.holds()
    conv.stride = (2, 2)
    assert not watch.holds()
    conv.stride = (1, 1)
    handle = conv.register_forward_hook(lambda *_: None)
    assert not watch.holds()
    handle.remove()
    assert watch.holds()
    conv.forward = conv.forward
    assert not watch.holds()
    del conv.forward
    module[1] = nn.ReLU()
    assert not watch.holds()


def test_code_that_was_replaced_is_seen() -> None:
    class Own(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    know_code(Own)
    watch = Watch([Part(Own())])
    assert watch.holds()
    assert not code_changed(Own)
    Own.forward = lambda self, x: x + 1  # type: ignore[method-assign, assignment]
    assert not watch.holds()
    assert code_changed(Own)


@pytest.mark.skipif(_extension.module is None, reason="without the compiled part")
def test_records_and_tensors_that_are_looked_at_as_one() -> None:
    values: list[dict[str, Any]] = [{"a": 1}, {"b": (2, 3)}]
    tensors = [torch.ones(3), torch.ones(2, 2)]
    known = Records([reading.record([(each, 1, tuple(each), tuple(each.values()))]) for each in values], tensors)
    assert known.hold()
    for each in values:
        each["c"] = 1
        assert not known.hold()
        del each["c"]
        assert known.hold()
    for x in tensors:
        before = x.data
        x.data = before.double()
        assert not known.hold()
        x.data = before
        assert known.hold()
    gone = weakref.ref(tensors.pop())
    del x, known
    assert gone() is None
    assert Records([], []).hold()


def test_the_record_of_a_reading() -> None:
    module, key = nn.Sequential(nn.ReLU()), object()
    readings: Readings[int] = Readings()
    assert readings.get(module, key, lambda: 3, lambda: [Part(module), Part(module[0])]) == 3
    known = readings.record(module, key)
    assert known.holds()
    module[0].register_forward_hook(lambda *args: None)
    assert not known.holds()


def test_whose_tensors_are_parameters_and_buffers() -> None:
    norm: Any = nn.BatchNorm2d(3)
    assert has_own(norm, "weight", "running_mean") and not has_own(norm, "weight", "other")
    assert has_own(nn.Conv2d(1, 1, 1, bias=False), "weight", "bias")
    weight = norm._parameters.pop("weight")
    norm.__dict__["weight"] = weight.detach()  # as in a replica
    assert not has_own(norm, "weight")
