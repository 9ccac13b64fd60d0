"""Which tests `make test-fast` leaves out besides those that are marked ``slow`` themselves: whole groups of them."""

from __future__ import annotations

from tests.support.selection import reason_of

# Pattern of a test's name (selection.py): reason.
SLOW = {
    "*::*[emulated]": "the GPU's kernels in the emulator; test_emulation.py has a call of each",
}


def reason_to_wait(nodeid: str) -> str | None:
    """Returns why the test ``nodeid`` is not among the fast ones, or None when it may be."""
    return reason_of(nodeid, SLOW)
