"""Networks with SyncBatchNorm in several processes, and their comparison with one process that has the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.algorithm import sync
from tests.distributed.worker import World
from tests.support.fusing_helpers import net

F64 = torch.float64


def synced(model: nn.Module, group: Any = None) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model), group)


def own(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return dx.DenseNet(4, (2, 2), 8, 2, num_classes=10, **kwargs).double()


def loss_of(out: Tensor) -> Tensor:
    return (
        (out * torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype, device=out.device).view(out[0].shape))
        .square()
        .sum()
    )


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


def compare(
    world: World,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    module: nn.Module,
    plain: nn.Module,
    x: Tensor,
    sizes: tuple[int, ...],
    steps: int = 2,
) -> None:
    """Trains ``module`` on this process's part and ``plain`` on the whole x, and compares all there is."""
    for step in range(steps):
        whole = (x + 0.1 * step).to(world.device).requires_grad_()
        part = world.share(whole.detach(), sizes).requires_grad_()
        out, wanted = ours(part), theirs(whole)
        close("output", out, world.share(wanted, sizes))
        module.zero_grad()
        plain.zero_grad()
        loss_of(out).backward() if len(out) else out.sum().backward()
        loss_of(wanted).backward()
        close("input", part.grad, world.share(whole.grad, sizes))
        with torch.no_grad():
            for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    close(name, world.total(p.grad), q.grad)
                    step_taken = 0.01 * q.grad / q.grad.norm().clamp(min=1)  # short: many steps may follow
                    p -= step_taken
                    q -= step_taken
    for (name, a), b in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        close(name, a, b)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many exchanges there were."""
    count, wait = [0], sync._wait

    def counting(pending: Tensor) -> Tensor:
        count[0] += 1
        return wait(pending)

    sync._wait = counting
    try:
        yield count
    finally:
        sync._wait = wait


def usual(**kwargs: Any) -> Any:
    return net(block_config=(2, 2), **kwargs)
