"""What tests look at in two processes at once; the second one fails at the end (test_train_processes.py)."""

from __future__ import annotations

import os
import time
from unittest import mock

import torch
from torch import Tensor, nn

import densenet_ext
from densenet_ext.cli import errors_told
from densenet_ext.errors import TrainingError, UserError
from densenet_ext.training.learner import Learner
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, joined, make_processes


def main() -> None:
    """Prints in the first process what held, a line for each."""
    with errors_told(), joined("cpu") as processes:
        for check in (buffers_are_shared, overflow_skips_the_step_everywhere, dropout_differs):
            if all(processes.gather(check(processes))) and processes.is_global_zero:
                print("held:", check.__name__, flush=True)
        if not processes.is_global_zero:
            raise TrainingError("no more images")
        processes.total(torch.ones(1))  # waits for the one that has gone


def refuse() -> None:
    """Raises the same error in each process, in the first one a second later, as on a busy machine."""
    with errors_told():
        if os.environ["RANK"] == "0":
            time.sleep(1)
        raise UserError("--batch-size: expected less")


def learner_of(processes: Processes, drop_rate: float = 0.0, **options: object) -> Learner:
    torch.manual_seed(0)
    network = densenet_ext.densenet_bc(depth=10, growth_rate=4, num_classes=10, in_channels=1, drop_rate=drop_rate)
    return Learner(network, Options.of({"data": "digits", **options}), processes)


def buffers_are_shared(processes: Processes) -> bool:
    network = nn.BatchNorm2d(3)
    network.running_mean.fill_(2 + processes.global_rank)
    network.running_var.copy_(torch.arange(3.0) + processes.global_rank)
    network.num_batches_tracked.fill_(7 * processes.global_rank)
    processes.share_buffers(network)
    state = network.state_dict()
    expected = {"running_mean": [2.0] * 3, "running_var": [0.0, 1.0, 2.0], "num_batches_tracked": 0}
    return all(state[name].tolist() == value for name, value in expected.items())


def overflow_skips_the_step_everywhere(processes: Processes) -> bool:
    """An infinite gradient in the shard of one process: the others must not move on alone."""
    with mock.patch("torch._C._get_accelerator", return_value=torch.device("cuda")):  # --device cpu beside a GPU
        processes = make_processes("cpu", amp="fp16", fsdp=True)
        processes.launch()
        learner = learner_of(processes)
    scaler = processes.strategy.precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    weight, step = learner.network.features.conv0.weight, scaler.step

    def overflow(optimizer: torch.optim.Optimizer) -> object:
        if processes.global_rank == 1:
            weight.grad.to_local().view(-1)[0] = torch.inf
        return step(optimizer)

    moved = []
    for scaler.step in (step, overflow):
        before = whole(learner.network)
        learner.step(torch.randn(4, 1, 16, 16), torch.arange(4), 8)
        moved.append([not torch.equal(a, b) for a, b in zip(before, whole(learner.network), strict=True)])
    return all(moved[0]) and not any(moved[1]) and scaler.get_scale() == 128.0


def whole(network: nn.Module) -> list[Tensor]:
    return [parameter.full_tensor().detach().clone() for parameter in network.parameters()]


def dropout_differs(processes: Processes) -> bool:
    """The same images lose other features in each process, and the same ones when a step is repeated."""
    losses = []
    for _ in range(2):
        learner = learner_of(processes, drop_rate=0.5)
        images = torch.linspace(-1, 1, 4 * 256).view(4, 1, 16, 16)
        losses.append(float(learner.step(images, torch.arange(4), 8)[0]))
    return losses[0] == losses[1] and len(set(processes.gather(losses[0]))) == processes.world_size
