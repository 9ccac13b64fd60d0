"""The processes of a run: torchrun's, or this one alone.

DistributedDataParallel or FSDP2 around the network, sums over all processes, and the rule that the first one writes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densenet_ext.training.errors import LossError, LostError, UserError
from densenet_ext.training.interruption import Interrupted

# Who waits while the first process downloads, or checks its part of the images, has nothing to do for long.
_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # of this process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in every process, in the order of ranks; all wait for the last one."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers: the running statistics are those that it writes."""
        if self.size > 1:
            kinds: dict[torch.dtype, list[Tensor]] = {}
            for buffer in network.buffers():
                kinds.setdefault(buffer.dtype, []).append(buffer)
            for buffers in kinds.values():  # one message instead of hundreds
                values = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
                dist.broadcast(values, 0)
                for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
                    buffer.detach().copy_(value.view_as(buffer))

    @torch.no_grad()
    def check_sync_bn(self, network: nn.Module, images: Tensor) -> None:
        """Refuses, as UserError, ``--sync-bn`` for a ``network`` with norms that are not in fused units, on the CPU.

        PyTorch's SyncBatchNorm runs on GPUs only. ``images`` [N, C, H, W] are such as ``network`` takes; a copy of it
        is tried. Every process has to call this.
        """
        if self.size == 1 or self.device.type != "cpu":
            return
        trial = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        try:
            trial.train()(images)
        except ValueError as error:
            if "SyncBatchNorm" not in str(error):
                raise
            raise UserError(
                "--sync-bn: expected a network whose norms are all fused, got one with others, and PyTorch's "
                "SyncBatchNorm runs on GPUs only: leave out --sync-bn or --no-fused, or take a network of this library"
            ) from error

    def wrap(self, network: nn.Module, sync_bn: bool, fsdp: bool) -> nn.Module:
        """What to call for a training step: ``network``, whose gradients are those of all processes.

        ``sync_bn`` and ``fsdp`` change ``network`` itself: its norms become SyncBatchNorm, its parameters are sharded.

        Raises UserError for ``fsdp`` without torchrun.
        """
        if fsdp and not dist.is_initialized():
            raise UserError("--fsdp: expected several processes: torchrun --nproc-per-node N -m densenet_ext train ...")
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # As one: all parameters of a DenseNet are some tens of MiB, and gathering them block by block would send
            # more messages than it saves memory.
            self._synchronise(network, sync_bn)
            # On this device: left to itself, FSDP takes the GPUs of the machine, whatever --device says.
            mesh = init_device_mesh(self.device.type, (self.size,))
            # Sharded again after a forward pass, too: evaluation has no backward pass that would do it.
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
            return network
        if self.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        # The statistics differ between the processes while they train, and are shared when they are used.
        wrapped = DistributedDataParallel(network, device_ids=devices, **_NO_BROADCAST)
        # Afterwards: DistributedDataParallel refuses SyncBatchNorm on processors, where PyTorch's own does not run.
        self._synchronise(network, sync_bn)
        return wrapped

    def _synchronise(self, network: nn.Module, sync_bn: bool) -> None:
        if sync_bn and self.size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun has started, or this one alone, with the ``device`` of this one.

    ``device`` None is a GPU where there is one, for each process its own. Raises UserError for a device that is none,
    and LostError in place of the error that a process gets when another one has gone.
    """
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = _device(device, local, started)
    if not started:
        yield Processes(device=place)
        return
    if not dist.is_available():
        raise UserError("torchrun: this torch was built without torch.distributed, so it trains in one process only")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    on_gpu = place.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT, device_id=place if on_gpu else None)
    try:
        yield Processes(rank, size, place)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the network
        # NCCL would wait for the others, who may know nothing of an error here: torchrun ends them when this one ends.
        if not on_gpu or isinstance(error, (Interrupted, LossError)):  # which all raise at the same step
            _leave()
        if _is_lost(error):
            raise LostError(
                "another process of the run has ended: its own message or torchrun's report says why; "
                "the last checkpoint is kept"
            ) from error
        raise
    _leave()


def _is_lost(error: BaseException) -> bool:
    # Gloo's errors are RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _leave() -> None:
    # What FSDP and DistributedDataParallel hold of the group has to be gone before: its threads end in order then.
    gc.collect()
    dist.destroy_process_group()


# The argument has got another name in torch 2.13.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


def _device(name: str | None, local_rank: int, several: bool) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank if several else torch.cuda.current_device())
        torch.ones(1, device=device).item()  # "meta" makes tensors and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # PyTorch lists what it was built with behind that
        raise UserError(f"--device: expected a device of this machine, got {name!r}: {reason}") from error
    if several and device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: torchrun trains on cpu or cuda, got {name!r}")
    return device
