"""A network that learns: one step, evaluation, and the state that a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states

from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import Examples
from densenet_ext.training.data.loading import Batches, derived
from densenet_ext.training.metrics import Row, Sums
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes

MOMENTUM = 0.9
DROPS = (0.5, 0.75)  # parts of the epochs after which the learning rate is divided by 10
_FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_FILE = states.StateDictOptions(full_state_dict=True)


class Learner:
    """``network`` with the optimizer and the schedule of ``options``, in one or several processes."""

    def __init__(self, network: nn.Module, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.device = options, processes, processes.device
        self.network = network.to(self.device)
        self._wrapped = processes.wrap(self.network, options.sync_bn)
        if options.compile:
            # In place: names of parameters stay. Each size of a batch has its own code: with one for several, the last
            # bits of a resumed run could depend on which sizes had come before.
            self.network.compile(dynamic=False)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), options.lr, MOMENTUM, weight_decay=options.weight_decay, nesterov=True
        )
        drops = [math.ceil(part * options.epochs) for part in DROPS]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, drops, gamma=0.1)
        self._stepping: Any = self.processes.setup_optimizers(self.optimizer)
        self.steps = 0

    @property
    def advice(self) -> str:
        """What to try when the loss is no number any more."""
        return "Try a smaller --lr" + ("" if self.options.amp == "off" else ", or --amp off")

    def batches(self, examples: Examples, shuffle: bool = False) -> Batches:
        """Returns this process's batches of ``examples``. Raises UserError as :class:`Batches`."""
        return Batches(examples, self.options, self.processes, shuffle)

    def step(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        """Makes one step of SGD on this process's part of a batch of ``count`` images over all processes.

        ``images`` [n, C, H, W] float32 and ``labels`` [n] are on the device. Returns [2] float32, not waited for: the
        sum of the part's losses, and how many first guesses are wrong.
        """
        # Dropout draws from torch's generators: what it draws depends on the step alone, so that a resumed run draws it
        # again, and not the same in every process.
        torch.manual_seed(derived(self.options.seed, "step", self.steps, self.processes.global_rank))
        self.steps += 1
        if not self.network.training:  # every step would go through all modules
            self.network.train()
        figures = _figures(self._wrapped(images), labels)
        # Gradients are averaged over the processes, whose parts may differ in size: this is the whole batch's mean.
        self.processes.backward(figures[0] * (self.processes.world_size / count))
        self._stepping.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures.detach()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Sums:
        """Returns losses and errors on this and all other processes' parts of ``batches``, in evaluation mode.

        Every process has to have the same number of batches, on the device; some of them may be empty.
        """
        self.processes.share_buffers(self.network)
        self.network.eval()
        figures, count = [torch.zeros(2, device=self.device)], 0
        for images, labels in batches:
            with self.processes.autocast():
                scores = self.network(images)
            figures.append(_figures(scores, labels))
            count += len(labels)
        # Added up on the host: float64 is not on every device, and the device would be waited for in any case.
        sums = torch.stack(figures).cpu().double().sum(0).tolist()
        loss, wrong, total = self.processes.total(torch.tensor([*sums, count], dtype=torch.float64)).tolist()
        return Sums(loss, int(wrong), int(total))

    def end_epoch(self, training: Sums, validation: Sums | None) -> Row:
        """Returns the figures of the epoch that ends, and moves the learning rate on."""
        measured = (None, None) if validation is None else (validation.mean_loss, validation.error)
        epoch, lr = self.schedule.last_epoch + 1, self.schedule.get_last_lr()[0]
        self.schedule.step()
        return Row(epoch, float(lr), training.mean_loss, training.error, *measured)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Returns whether every parameter is a number, in every process."""
        norms = torch.stack([_local(parameter).float().norm() for parameter in self.network.parameters()])
        return bool(self.processes.total((~norms.isfinite()).sum()) == 0)

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, on the CPU, in the first process; the others have to call it too.

        Tensors have the names of the network's own state dict, whatever wraps or shards it.
        """
        self.processes.share_buffers(self.network)
        # Asked for the state of an optimizer without one, PyTorch would make a step.
        optimizer = (
            states.get_optimizer_state_dict(self.network, self.optimizer, options=_FULL) if self.optimizer.state else {}
        )
        return {
            "model": states.get_model_state_dict(self.network, options=_FULL),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": self.processes.strategy.precision.state_dict(),
            "steps": self.steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state` has given. Raises UserError when it is another network's."""
        try:
            states.set_model_state_dict(self.network, state["model"], options=_FROM_FILE)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"the checkpoint is of another network: {error}") from error
        if state["optimizer"]:
            states.set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"], options=_FROM_FILE)
        self.schedule.load_state_dict(state["schedule"])
        self.processes.strategy.precision.load_state_dict(state["scaler"])
        self.steps = state["steps"]


def _figures(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns [2] float32: the sum of the losses, and how many first guesses are wrong."""
    losses = F.cross_entropy(scores.float(), labels, reduction="sum")
    wrong = (scores.detach().argmax(1) != labels).sum()
    return torch.stack((losses, wrong.float()))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
