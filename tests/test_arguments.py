"""Arguments of the command line are checked as those of a call are, and refused in argparse's way."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from densenet_ext import arguments, checks


def parsed(words: str, **argument: Any) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--size", **argument)
    return parser.parse_args(["--size", words]).size


def test_what_a_check_accepts_is_what_it_returns() -> None:
    assert parsed("7", **arguments.integer(1)) == 7 and parsed("7", **arguments.integer(1, 7)) == 7
    assert parsed("0.5", **arguments.number(checks.probability)) == 0.5
    assert parsed("2 KiB", type=arguments.read(str, checks.memory)) == 2048


@pytest.mark.parametrize(
    ("words", "argument", "refusal"),
    [
        ("0", arguments.integer(1), "expected an integer of at least 1, got 0"),
        ("8", arguments.integer(1, 7), "expected an integer from 1 to 7, got 8"),
        ("1.5", arguments.integer(1), "expected an integer of at least 1, got '1.5'"),
        ("many", arguments.number(checks.positive), "expected a finite number above 0, got 'many'"),
        ("nan", arguments.number(checks.positive), "expected a finite number above 0, got nan"),
        ("much", {"type": arguments.read(str, checks.memory)}, "expected bytes, or a text such as"),
    ],
)
def test_what_a_check_refuses_is_told_in_its_words(words: str, argument: dict[str, Any], refusal: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=f"^argument --size: {refusal}"):
        parsed(words, **argument)
