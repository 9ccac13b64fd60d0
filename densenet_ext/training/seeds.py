"""Seeds that follow from the run's seed and a place in the run.

What is drawn at a place depends on that place alone: a resumed run draws what an uninterrupted one draws, whatever
number of processes and workers it has, and no generator's state has to be kept.
"""

from __future__ import annotations

import hashlib


def derived(*place: int | str) -> int:
    """Returns a seed of 63 bits for ``place``: the run's seed, what it is for, epoch, index."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
