"""BatchNorm modules as values, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import increment_version

from densenet_ext import kernels
from densenet_ext.algorithm.kept import Kept
from densenet_ext.algorithm.values import Norm


def check_count(norm: Norm, size: Sequence[int]) -> None:
    """PyTorch's own ValueError when a norm in training sees one value per channel of an input of ``size``."""
    if norm.batch_stats and not norm.group:
        M = size[0]
        for n in size[2:]:
            M *= n
        if M == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}")


def update_running_stats(
    norms: Sequence[Norm], means: Sequence[Tensor], vars: Sequence[Tensor], counts: Sequence[int | Tensor]
) -> None:
    """Moves the running statistics of all ``norms`` once, with the batch's means and biased variances [C] in acc.

    counts: the values per channel behind them; tensors [1], which are not read here, where processes make one batch.

    running = (1 - momentum) running + momentum batch, with the unbiased variance, as ``nn.BatchNorm``. A norm that
    occurs twice moves twice. Momentum None: the factor 1 / num_batches_tracked stays on the device.

    As ``nn.BatchNorm``'s, mean and variance move without a new version: a norm that is also called by itself saves
    them for its backward pass, in which training does not read them. The counter gets a new one.
    """
    moving = [
        entry for entry in zip(norms, means, vars, counts, strict=True) if entry[0].update and entry[0].batch_stats
    ]
    while moving:
        # norms that occur again wait for the next round: within one the order of the steps is free
        seen: set[int] = set()
        now: list[_Moving] = []
        later: list[_Moving] = []
        for entry in moving:
            key = id(entry[0].running_mean if entry[0].running_mean is not None else entry[0].num_batches_tracked)
            (later if key in seen else now).append(entry)
            seen.add(key)
        with _same_versions(now):
            _move_once(now)
        moving = later


class Movement:
    """The running statistics of all norms of a unit, and where in its results the batch's statistics of each lie."""

    def __init__(self, norms: Sequence[Norm], which: Sequence[int], parts: Sequence[slice]) -> None:
        """which, parts: norm i reads the channels parts[i] of the pair of means and variances which[i]."""
        moving = [i for i, norm in enumerate(norms) if norm.update and norm.batch_stats]
        self._moving = moving
        self._norms = [norms[i] for i in moving]
        self._parts = [parts[i] for i in moving]
        self._which, self._starts = [which[i] for i in moving], [parts[i].start for i in moving]
        self._running = [t for norm in self._norms for t in (norm.running_mean, norm.running_var) if t is not None]
        self._momenta = [norm.momentum for norm in self._norms if norm.momentum is not None]
        self._counters = [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]
        # one operation moves them all: no average over all batches, and none without statistics
        self._alike = len(self._momenta) == len(self._norms) and len(self._running) == 2 * len(self._norms)
        self._alike = self._alike and not any(norm.group for norm in self._norms)
        self._kept: Kept | None = None
        self._dtype: torch.dtype | None = None  # of the statistics that are kept

    def move(self, means: Sequence[Tensor], vars: Sequence[Tensor], counts: int | Sequence[int | Tensor]) -> None:
        """Moves them by pairs of means and biased variances in acc.

        counts: the values per channel behind them, one number, or one for each norm.
        """
        if not self._norms or (self._alike and isinstance(means[0], FakeTensor)):  # which has nothing to move
            return
        kept = self._keep(means[0]) if isinstance(counts, int) else None
        if kept is None or not isinstance(counts, int):
            pairs = list(zip(self._which, self._parts, strict=True))
            own = [counts] * len(pairs) if isinstance(counts, int) else [counts[i] for i in self._moving]
            batch = [means[i][part] for i, part in pairs], [vars[i][part] for i, part in pairs]
            update_running_stats(self._norms, *batch, own)
            return
        unbiased = counts / (counts - 1) if counts > 1 else float("nan")
        kernels.select(means[0]).move_running_stats(kept.number, means, vars, unbiased)
        if self._counters:
            increment_version(self._counters)

    def _keep(self, like: Tensor) -> Kept | None:
        """The tensors that one compiled operation moves, or None where they have to be moved one by one."""
        if not self._alike or not like.is_cpu or torch.compiler.is_compiling():
            return None
        ops = kernels.select(like)
        if not hasattr(ops, "move_running_stats"):
            return None
        if self._kept is None or self._dtype != like.dtype or not self._kept.hold():
            self._kept, self._dtype = None, like.dtype
            counted = all(t.dtype == torch.int64 and t.numel() == 1 and t.is_cpu for t in self._counters)
            if counted and {(t.dtype, t.device) for t in self._running} == {(like.dtype, like.device)}:
                lists = self._running[0::2], self._running[1::2], self._counters
                self._kept = Kept(ops, ops.keep_norms(*lists, self._which, self._starts, self._momenta))
        return self._kept


_Moving = tuple[Norm, Tensor, Tensor, int | Tensor]  # norm, mean, variance, count


def _same_versions(moving: Sequence[_Moving]) -> AbstractContextManager[None]:
    """Inside its ``with``, mean and variance of the norms move without a new version."""
    if torch.compiler.is_compiling():
        return nullcontext()
    running = [t for norm, *_ in moving for t in norm[2:4] if t is not None]
    if torch.is_inference_mode_enabled():
        running = [t for t in running if not t.is_inference()]  # those have no version
    return _unsafe_preserve_version_counter(tuple(running))


class _Alike(NamedTuple):
    """Norms that move by the same factors: one operation for all."""

    momentum: float
    unbiased: float
    running_means: list[Tensor]
    means: list[Tensor]
    running_vars: list[Tensor]
    vars: list[Tensor]


def _move_once(moving: list[_Moving]) -> None:
    counters = [n.num_batches_tracked for n, *_ in moving if n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    alike: list[_Alike] = []
    for norm, mean, var, count in moving:
        if norm.running_mean is None or norm.running_var is None:
            continue
        if norm.running_mean.device != mean.device:
            raise ValueError(
                f"running statistics: expected on {mean.device}, as the features, got on {norm.running_mean.device}"
            )
        if isinstance(count, Tensor):
            unbiased, var = 1.0, var * (count / (count - 1))
        else:
            unbiased = count / (count - 1) if count > 1 else float("nan")
        if norm.momentum is not None and norm.running_mean.dtype == norm.running_var.dtype == mean.dtype:
            # compared, not hashed: under torch.compile a count may be a symbol, and a hash would fix its value
            group = next((g for g in alike if g.momentum == norm.momentum and g.unbiased == unbiased), None)
            if group is None:
                group = _Alike(norm.momentum, unbiased, [], [], [], [])
                alike.append(group)
            group.running_means.append(norm.running_mean)
            group.means.append(mean)
            group.running_vars.append(norm.running_var)
            group.vars.append(var)
        else:
            factor = _factor(norm, mean)
            _move_one(norm.running_mean, mean, factor)
            _move_one(norm.running_var, var * unbiased, factor)
    for group in alike:
        torch._foreach_mul_(group.running_means + group.running_vars, 1 - group.momentum)
        torch._foreach_add_(group.running_means, group.means, alpha=group.momentum)
        torch._foreach_add_(group.running_vars, group.vars, alpha=group.momentum * group.unbiased)


def _factor(norm: Norm, mean: Tensor) -> Tensor | float:
    if norm.momentum is not None:
        return norm.momentum
    if norm.num_batches_tracked is None:
        return 0.0
    return norm.num_batches_tracked.to(mean.dtype).reciprocal()


def _move_one(running: Tensor, batch: Tensor, factor: Tensor | float) -> None:
    running.copy_(running.to(batch.dtype) * (1 - factor) + batch * factor)
