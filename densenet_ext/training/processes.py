"""The processes of a run on Lightning Fabric: torchrun's, or this one alone. The first one writes and prints.

Fabric joins them, wraps the network in DistributedDataParallel or FSDP2 and holds the precision. What stays here is
what Fabric does not offer: objects gathered from every process, buffers of the first one for all, SyncBatchNorm on the
CPU (DistributedDataParallel refuses it before the wrapping), and leaving in an order in which no thread aborts.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densenet_ext.errors import Ended, SharedError, UserError

T = TypeVar("T")

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces every process

# Who waits while the first process downloads, or checks its part of the images, has nothing to do for long.
_TIMEOUT = timedelta(hours=3)
# Running statistics differ between the processes while they train, and are shared when they are used: DDP is not to
# send them at every step. The argument has got another name in torch 2.13.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


class Processes(Fabric):
    """This process among those of a run: Lightning's Fabric, with what it does not offer."""

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of ``values`` over all processes."""
        return cast(Tensor, self.all_reduce(values, reduce_op="sum")) if self.world_size > 1 else values

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's ``value``, in the order of ranks; all wait for the last one."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers: the running statistics are those that it writes."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer.detach(), 0)

    def wrap(self, network: nn.Module, sync_bn: bool = False) -> nn.Module:
        """Returns what to call for a training step: ``network``, whose gradients are those of all processes."""
        sharded, sync_bn = isinstance(self.strategy, ModelParallelStrategy), sync_bn and self.world_size > 1
        if sync_bn and sharded:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        wrapped = self.setup_module(network)
        if sync_bn and not sharded:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return wrapped


def make_processes(device: str = "cpu", amp: str = "off", fsdp: bool = False) -> Processes:
    """Returns this process on ``device`` among those of torchrun, or alone.

    Raises UserError for ``fsdp`` without torchrun, and for a device that it can't train on.
    """
    alone = not started_by_torchrun()
    known = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * (alone and torch.backends.mps.is_available())
    kind, _, index = device.partition(":")
    if kind not in known:
        raise UserError(f"--device: expected one of {', '.join(known)}, got {device!r}")
    # Named as a plugin: from precision="16-mixed" Fabric makes bfloat16 on the CPU, and FSDP2 refuses it.
    precision = Precision() if amp == "off" else MixedPrecision("bf16-mixed" if amp == "bf16" else "16-mixed", kind)
    if alone:
        if fsdp:
            raise UserError("--fsdp: expected several processes: torchrun --nproc-per-node N -m densenet_ext train ...")
        devices = [int(index or 0)] if kind == "cuda" else 1
        return Processes(accelerator=kind, devices=devices, plugins=[precision, LightningEnvironment()])
    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    strategy: Strategy = (
        ModelParallelStrategy(_shard, data_parallel_size=size, tensor_parallel_size=1, timeout=_TIMEOUT)
        if fsdp
        else DDPStrategy(timeout=_TIMEOUT, **_NO_BROADCAST)
    )
    plugins: Any = [precision, TorchElasticEnvironment()]
    return Processes(accelerator=kind, devices=here, num_nodes=size // here, strategy=strategy, plugins=plugins)


def _shard(network: nn.Module, mesh: Any) -> nn.Module:
    """Returns ``network`` sharded as one.

    All parameters of a DenseNet are some tens of MiB, and gathering them block by block would send more messages than
    it saves memory. They are sharded again after a forward pass, too: evaluation has no backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard(network, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return network


def started_by_torchrun() -> bool:
    """Returns whether this is one of the processes that torchrun starts."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def agreed(processes: Processes, find: Callable[[], T]) -> T:
    """Returns what ``find`` returns in this process. A UserError that any process raises is raised in all of them.

    All wait for the last one: a process that went on alone would wait for the others for ever.
    """
    found, message = None, None
    try:
        found = find()
    except UserError as error:
        message = str(error)
    for text in processes.gather(message):
        if text is not None:
            raise UserError(text)
    return cast(T, found)


@contextlib.contextmanager
def joined(device: str | None, amp: str = "off", fsdp: bool = False) -> Iterator[Processes]:
    """Joins the processes that torchrun has started, or this one alone; ``device`` None is a GPU where there is one.

    Raises UserError as :func:`make_processes`, and SharedError instead of the error that a process gets when another
    one has gone.
    """
    processes = make_processes(device or ("cuda" if torch.cuda.is_available() else "cpu"), amp, fsdp)
    processes.launch()
    try:
        yield processes
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the network
        # NCCL would wait for the others, who may know nothing of an error here: torchrun ends them when this one ends.
        if processes.device.type != "cuda" or (isinstance(error, Ended) and error.everywhere):
            _leave()
        # Gloo's errors are RuntimeErrors that begin with the place in its source.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            raise SharedError("another process of the run has ended; the last checkpoint is kept") from error
        raise
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # what FSDP and DistributedDataParallel hold of the group has to be gone before its threads end
        dist.destroy_process_group()
