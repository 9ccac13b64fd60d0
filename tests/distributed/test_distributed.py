"""Many processes: SyncBatchNorm inside fused units, DistributedDataParallel, FSDP2, a script under torchrun.

The processes are real ones, on gloo, or on NCCL where there are GPUs enough; ``worker`` starts them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import densenet_ext as dx
from tests.support.fusing_helpers import images, net

if not dist.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

from tests.distributed import torchrun_training
from tests.distributed.worker import cases, outcomes

HERE = Path(__file__).resolve().parent
MODULES = ("tests.distributed.sync", "tests.distributed.ddp", "tests.distributed.fsdp")
outcomes_of = cache(outcomes)


@pytest.mark.parametrize(("module", "case"), [(module, case) for module in MODULES for case in cases(module)])
def test_processes(module: str, case: str) -> None:
    wrong = outcomes_of(module, limit=300)[case]
    assert not wrong, wrong


def test_a_script_under_torchrun_equals_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(HERE / "torchrun_training.py"), str(tmp_path / "state.pt")]
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    got, wanted = torch.load(tmp_path / "state.pt"), torchrun_training.train(0, 1, torch.device("cpu"))
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nn.DataParallel needs two GPUs")
def test_data_parallel_equals_the_unfused() -> None:
    x = images(4).cuda()
    models = [nn.DataParallel(prepare(net().cuda())) for prepare in (dx.fuse, lambda model: model)]
    outs = [model(x) for model in models]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
