"""Training: data, the loop over epochs, checkpoints."""

from __future__ import annotations

from densenet_ext.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from densenet_ext.training.data import Split, load_digits
from densenet_ext.training.loop import Settings, TrainingError, train

__all__ = [
    "CheckpointError",
    "Settings",
    "Split",
    "TrainingError",
    "load_checkpoint",
    "load_digits",
    "save_checkpoint",
    "train",
]
