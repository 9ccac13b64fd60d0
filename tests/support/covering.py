"""Cases that cover every pair of values, for tests whose parameters' full product shows nothing more.

A defect depends on one value nearly always, on two sometimes, on three hardly ever: with every value of each parameter
beside every value of each other one, the full product adds time and no kind of defect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

BACKENDS = ("compiled", "plain", "emulated")  # the values of the fixture ``backend`` (conftest.py)


def pairs(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns few cases (a value for each parameter) among which each two values of two parameters meet.

    The same arguments give the same cases, in the order of their product.
    """
    values = [list(parameter) for parameter in parameters]
    left = list(itertools.product(*(range(len(own)) for own in values)))
    missing = set().union(*map(_pairs_of, left))
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(missing & _pairs_of(case)))
        missing -= _pairs_of(best)
        chosen.append(best)
    return [tuple(own[i] for own, i in zip(values, case, strict=True)) for case in sorted(chosen)]


def _pairs_of(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
