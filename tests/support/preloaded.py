"""Imports what processes of the tests need; the server of forks.py imports this, once."""

from __future__ import annotations

import contextlib
import gc
import importlib

from densenet_ext import vision
from densenet_ext.errors import UserError

for name in (
    "lightning_fabric.strategies",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torch.nn.parallel",
    "torch.utils.tensorboard",
    "densenet_ext.cli",
    "densenet_ext.training.running",
    "densenet_ext.compare.command",
):
    with contextlib.suppress(ImportError, UserError):  # what is not installed, tests ask for themselves
        importlib.import_module(name)

with contextlib.suppress(ImportError, UserError):
    vision.import_torchvision()

gc.freeze()  # none of that is garbage in a process that begins with it
