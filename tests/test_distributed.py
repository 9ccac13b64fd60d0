"""Many processes: SyncBatchNorm inside fused units, DistributedDataParallel, FSDP2.

The processes are real ones, on gloo, or on NCCL where there are GPUs enough; ``distributed_worker`` starts them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch.distributed as dist
from distributed_worker import cases, outcomes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
MODULES = ("distributed_sync",)
outcomes_of = cache(outcomes)


@pytest.mark.parametrize(("module", "case"), [(module, case) for module in MODULES for case in cases(module)])
def test_processes(module: str, case: str) -> None:
    wrong = outcomes_of(module, limit=120)[case]
    assert not wrong, wrong
