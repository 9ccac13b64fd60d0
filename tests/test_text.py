"""Tables and sizes for people to read."""

from __future__ import annotations

from densenet_ext.text import readable, table


def test_a_table_is_aligned_and_has_no_blanks_at_its_ends() -> None:
    assert table([["unit", "why"], ["a", ""], ["longer", "b"]]) == "unit    why\n------  ---\na\nlonger  b"


def test_sizes_have_up_to_four_digits() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 2**30: "1.0 GiB", 2**52: "4096.0 TiB"}
    assert {size: readable(size) for size in sizes} == sizes
