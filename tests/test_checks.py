"""Checks of what users pass in: what is taken, and the words for what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from densenet_ext import checks


@pytest.mark.parametrize(
    "check, value, result",
    [
        (lambda v: checks.integer("n", v, 1, 4), torch.tensor(4), 4),
        (lambda v: checks.bc_depth("depth", v), 22, 22),
        (lambda v: checks.block_depths("layers", v), [6, 12], (6, 12)),
        (lambda v: checks.probability("p", v), 0, 0.0),
        (lambda v: checks.compression_factor("c", v), 1, 1.0),
        (lambda v: checks.positive("lr", v), 0.5, 0.5),
        (lambda v: checks.memory("m", v), "1.5 GiB", 3 * 2**29),
        (lambda v: checks.memory("m", v), "24GB", 24 * 10**9),
        (lambda v: checks.choice("save", v, checks.LEVELS), "features", "features"),
        (lambda v: checks.save_level(v, False), None, "bottlenecks"),
        (lambda v: checks.save_level(v, False, True), None, "features"),
        (lambda v: checks.save_level(v, True), "bottlenecks", "bottlenecks"),
    ],
)
def test_what_is_taken(check: Callable[[Any], Any], value: Any, result: Any) -> None:
    got = check(value)
    assert got == result and type(got) is type(result)


@pytest.mark.parametrize(
    "check, value, error, words",
    [
        (lambda v: checks.integer("n", v, 1), True, TypeError, "n: expected an integer of at least 1, got True"),
        (lambda v: checks.integer("n", v, 1, 4), 5, ValueError, "n: expected an integer from 1 to 4, got 5"),
        (lambda v: checks.bc_depth("depth", v), 23, ValueError, "depth: expected 6 n + 4 (10, 16, 22"),
        (lambda v: checks.block_depths("layers", v), "66", TypeError, "layers: expected a sequence"),
        (lambda v: checks.block_depths("layers", v), (), ValueError, "got an empty one"),
        (lambda v: checks.block_depths("layers", v), (6, 0), ValueError, "layers[1]: expected an integer"),
        (lambda v: checks.probability("p", v), float("nan"), ValueError, "p: expected a number from 0 to 1, got nan"),
        (lambda v: checks.compression_factor("c", v), 0.0, ValueError, "c: expected a number above 0 and at most 1"),
        (lambda v: checks.positive("lr", v), float("inf"), ValueError, "lr: expected a finite number above 0"),
        (lambda v: checks.positive("lr", v), "1", TypeError, "lr: expected a finite number above 0, got '1'"),
        (lambda v: checks.memory("m", v), "much", ValueError, "m: expected bytes, or a text such as '80GiB'"),
        (lambda v: checks.memory("m", v), 1.5, TypeError, "m: expected bytes"),
        (lambda v: checks.choice("save", v, checks.LEVELS), None, ValueError, "save: expected one of 'bottlenecks'"),
        (lambda v: checks.tensor("x", v), [1], TypeError, "x: expected a tensor, got list"),
    ],
)
def test_what_is_refused(check: Callable[[Any], Any], value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        check(value)
    assert words in str(caught.value)


def test_autocast_enabled() -> None:
    kind = torch.get_default_device().type
    assert not checks.autocast_enabled(kind) and not checks.autocast_enabled("meta")
    with torch.autocast(kind, dtype=torch.bfloat16):
        assert checks.autocast_enabled(kind) and not checks.autocast_enabled("meta")


def test_mismatch() -> None:
    x, weight = torch.ones(2, 3, 4, 5), torch.ones(1)
    assert checks.mismatch(x, 3, 2, weight) is None and checks.mismatch(x, None, 2, weight) is None
    assert checks.mismatch(x, 3, 3, weight) == "expected 5 dimensions [N, 3, D, H, W], got shape [2, 3, 4, 5]"
    assert checks.mismatch(x, 4, 2, weight) == "expected 4 channels, [N, 4, H, W], got shape [2, 3, 4, 5]"
    assert "expected a tensor on" in str(checks.mismatch(x.to("meta"), 3, 2, weight))
    other = checks.mismatch(x.double(), 3, 2, weight)
    assert other == "expected dtype torch.float32, that of the parameters, got torch.float64"
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert checks.mismatch(x.bfloat16(), 3, 2, weight) is None
