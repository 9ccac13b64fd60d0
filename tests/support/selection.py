"""Tables of tests by pattern: which tests does a table name, and with what reason?"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch


def reason_of(nodeid: str, table: Mapping[str, str]) -> str | None:
    """Returns the reason of the first pattern that names the test ``nodeid``, or None.

    A test is "tests/folder/file.py::function[parameters]". A pattern is "file", "file::function" or
    "file::function[parameter]", where a file without a folder may lie in any.
    """
    name, _, parameters = nodeid.rstrip("]").partition("[")
    file, _, function = name.partition("::")
    for pattern, reason in table.items():
        pattern, _, parameter = pattern.rstrip("]").partition("[")
        file_pattern, _, function_pattern = pattern.partition("::")
        where = file if "/" in file_pattern else file.rpartition("/")[2]
        alike = fnmatch(where, file_pattern) and fnmatch(function, function_pattern or "*")
        if alike and (not parameter or parameter in parameters.split("-")):
            return reason
    return None
