"""The columns of its block's buffer that a dense layer reads and writes.

``cat([x, new])`` puts new features behind: the buffer is x, new 1, new 2, ... and layer l reads [0, C_l). ``cat([new,
x])`` puts them in front: ..., new 2, new 1, x, and it reads the last C_l columns. Either way it reads neighbours, so
that the kernels need no more than an offset.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Columns(NamedTuple):
    """Those of one layer; what the first layer reads is the block's input."""

    read: slice  # C_l
    new: slice  # k


def layer_columns(C: int, growth: tuple[int, ...], new_first: bool) -> list[Columns]:
    """Per layer, of a block that is given C features and whose layers add ``growth``."""
    C_total = C + sum(growth)
    columns = []
    for k in growth:
        if new_first:
            columns.append(Columns(slice(C_total - C, C_total), slice(C_total - C - k, C_total - C)))
        else:
            columns.append(Columns(slice(0, C), slice(C, C + k)))
        C += k
    return columns


def within(rows: Tensor, columns: slice, origin: int) -> Tensor:
    """The buffer's ``columns`` among ``rows``, whose first column is the buffer's column ``origin``."""
    return rows[:, columns.start - origin : columns.stop - origin]
