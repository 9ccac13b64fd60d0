"""SyncBatchNorm: the statistics of all processes of a group, and the sums of its backward pass.

Forward: process i has M_i rows of mean m_i and biased variance v_i; together (Chan)

    M = sum M_i        m = sum M_i m_i / M        v = sum M_i (v_i + (m_i - m)^2) / M

Backward: what a statistic receives from its consumers is summed over the processes, and its formulas divide by M. The
kernels divide by the rows that they see, M_i, so the sums go to them as (sum over processes) M_i / M. A parameter's own
gradient stays the process's, as ``nn.SyncBatchNorm`` has it: who trains averages or adds gradients anyway.

M_i may differ and may be 0: that process exchanges zeros. Which exchanges a unit makes, and in what order, follows from
its norms and from which of its tensors ask for gradients, never from data or sizes; so it is the same in every process
that runs the same model in the same mode. What breaks it, and hangs as it does with ``nn.SyncBatchNorm``: an input that
asks for its gradient in one process only, a hook on an inner module in one process only (its unit runs unfused there),
a forward pass in training that not all processes make.

Statistics that travel from unit to unit (``values.Stats``) are always the process's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def group_of(module: nn.Module) -> str:
    """The name of the process group over which a norm takes its statistics now; "" when they are the process's own.

    The rules of ``nn.SyncBatchNorm``: in training, with a process group of more than one process.
    """
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = module.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def shared_group(groups: Iterable[str], batch_stats: Iterable[bool]) -> str | None:
    """The one group of the norms that use the batch's statistics; None when they differ."""
    names = {group for group, batch in zip(groups, batch_stats, strict=True) if batch}
    return next(iter(names), "") if len(names) < 2 else None


def merge_stats(mean: Tensor, var: Tensor, M: int, group: str) -> Tensor:
    """Replaces mean and biased variance [C] of this process's M rows by those of all rows; gives their count [1]."""
    C = mean.shape[0]
    own = torch.cat([mean, var, mean.new_full((1,), M)]) if M > 0 else mean.new_zeros(2 * C + 1)
    size = dist.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    gathered = _wait(torch.ops._c10d_functional.all_gather_into_tensor(own, size, group)).view(size, 2 * C + 1)
    means, vars, counts = gathered.split((C, C, 1), dim=1)
    count = counts.sum(0)
    share = counts / count.clamp(min=1)
    # from the first process's mean on: a large mean then costs no digits
    mean.copy_(means[0] + (share * (means - means[0])).sum(0))
    var.copy_((share * (vars + (means - mean) ** 2)).sum(0))
    return count


def merge_sums(sums: Tensor, M: int, count: Tensor, group: str) -> Tensor:
    """``sums`` over all processes, times the process's share of the rows, M / count."""
    return _wait(torch.ops._c10d_functional.all_reduce(sums, "sum", group)) * (M / count)


def _wait(pending: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(pending)
