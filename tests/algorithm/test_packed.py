"""Which weights' packed forms are kept, until when, and that they are renewed; what kernels read: test_pack.py."""

from __future__ import annotations

import gc
import weakref

import numpy
import pytest
import torch

from densenet_ext import kernels
from densenet_ext.algorithm.packed import are_held, hold, release

pytestmark = pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")


def test_weights_are_held_until_all_who_hold_them_release_them() -> None:
    a, b = torch.ones(4, 3, 1, 1), torch.ones(4, 3, 3, 3)
    assert not are_held([a, b])
    first = hold([a])
    second = hold([a, b, torch.ones(2, device="meta")])
    assert first == [a] and [id(x) for x in second] == [id(a), id(b)]
    assert are_held([None, b]) and are_held([a])
    release(second)
    assert are_held([a]) and not are_held([b, None])
    release(first)
    assert not are_held([a])


def test_what_is_held_lives_and_what_is_released_is_freed() -> None:
    weight = torch.ones(4, 3, 1, 1)
    alive, held = weakref.ref(weight), hold([weight])
    del weight
    assert alive() is not None
    release(held)
    del held
    gc.collect()
    assert alive() is None


def test_operations_are_given_a_weight_again_where_its_version_has_changed() -> None:
    weight = torch.ones(4, 3, 1, 1)
    held = hold([weight])
    made: list[int] = []
    keep = kernels.select(weight).keep_packed

    def note(weights: list[torch.Tensor]) -> int:
        made.append(weights[0]._version)
        return int(keep(weights))

    kernels.select(weight).keep_packed = note
    try:
        assert are_held([weight]) and made == []
        weight.add_(1)
        assert are_held([weight]) and are_held([weight]) and made == [weight._version]
    finally:
        kernels.select(weight).keep_packed = keep
        release(held)


def test_the_memory_of_a_weight_that_was_given_another_is_kept() -> None:
    """Packed forms are found by its address, which another weight must not get."""
    array = numpy.ones((4, 3, 1, 1), dtype=numpy.float32)
    weight, memory = torch.from_numpy(array), weakref.ref(array)
    held = hold([weight])
    del array
    weight.data = weight.detach() * 2
    gc.collect()
    assert memory() is not None
    release(held)
    gc.collect()
    assert memory() is None
