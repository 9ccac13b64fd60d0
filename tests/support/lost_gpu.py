"""What becomes of a run when a test leaves the GPU with an error (a plugin; tests/conftest.py takes its hook).

After a kernel's fault, an address that is none for instance, every call of the same process fails, whatever it is: one
wrong kernel would count as hundreds of failures. So the process ends behind the test that did it. Of several (-n)
pytest starts another in its place, which goes on with the next tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest
import torch

EXIT_CODE = 3


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if torch.get_default_device().type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = f"{item.nodeid} left the GPU with an error: {error}"
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(reason, returncode=EXIT_CODE)
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(reason, file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)  # no exception gets out of a process of xdist's
    return result
