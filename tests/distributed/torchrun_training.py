"""What a user writes who trains on several processes: ``torchrun --nproc-per-node 2 torchrun_training.py state.pt``.

A fused DenseNet with SyncBatchNorm; each process takes its part of every batch. On GPUs that is
DistributedDataParallel; DDP takes no SyncBatchNorm on the CPU, so there the gradients are averaged by hand.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the network is that of the tests

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import densenet_ext as dx
from tests.support.lookalikes import DenseNet

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    model = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, small_inputs=False)
    return dx.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model.double()))


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (6,))) for _ in range(STEPS)]


def train(rank: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """The state after a few steps on part ``rank`` of ``size`` equal parts of each batch."""
    model = network().to(device)
    assert all(row.fused for row in dx.report(model)), str(dx.report(model))
    with_ddp = size > 1 and device.type == "cuda"
    run: nn.Module = DistributedDataParallel(model, device_ids=[device]) if with_ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in batches():
        x, y = images.chunk(size)[rank].to(device), labels.chunk(size)[rank].to(device)
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        if size > 1 and not with_ddp:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = dist.is_nccl_available() and torch.cuda.device_count() >= size
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    state = train(rank, size, device)
    if rank == 0:
        torch.save(state, sys.argv[1])
    gc.collect()  # norms refer to the group; whatever is left of them would end its threads out of order
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
