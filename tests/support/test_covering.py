"""Tests of covering.py: every pair is there, and few cases are."""

from __future__ import annotations

import itertools

import pytest

from tests.support.covering import pairs


@pytest.mark.parametrize(("sizes", "most"), [((3, 2, 2), 6), ((3, 3, 3), 10), ((3, 3, 2, 3), 9), ((8, 5), 40)], ids=str)
def test_every_two_values_meet_in_few_cases(sizes: tuple[int, ...], most: int) -> None:
    parameters = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    cases = pairs(*parameters)
    assert cases == pairs(*parameters) and len(set(cases)) == len(cases) <= most
    for a, b in itertools.combinations(range(len(sizes)), 2):
        met = {(case[a], case[b]) for case in cases}
        assert met == set(itertools.product(parameters[a], parameters[b]))


def test_the_order_is_that_of_the_product() -> None:
    assert pairs([1, 2], "ab") == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
