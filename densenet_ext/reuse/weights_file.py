"""Reads what other people's training wrote: a file of torch.save or of safetensors, without running code from it."""

from __future__ import annotations

import argparse
import errno
import importlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.serialization

from densenet_ext.training.errors import UserError
from densenet_ext.training.files import check_archive

# What torch.load says with weights_only where a pickle asks for more than tensors, numbers, texts and containers.
_ASKS_FOR_CODE = ("Unsupported global", "Unsupported class", "TorchScript", "Trying to call", "Can only build Tensor")
# What timm's and Lightning's trainers put beside the weights: the command line, and paths. Making one does nothing.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


def read_weights_file(path: Path) -> Mapping[Any, Any]:
    """Returns what the file holds, on the CPU: a state dict, or a training's dict with one inside.

    A name that ends in ``.safetensors`` is read by the package safetensors, anything else by torch.load with
    ``weights_only=True``.

    Raises UserError when the file is missing, can't be read, is damaged, would run code, or holds no dict.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, expected a checkpoint's file: name a file in it, or make one file of a distributed "
            f"checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} checkpoint.pt"
        )
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"the checkpoint {path} holds a {type(content).__name__}, expected a state dict")
    return content


def _torch_file(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kinds of files that are refused below, in one sentence
        try:
            if zipfile.is_zipfile(path):  # not so before torch 1.6
                check_archive(path)
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for files that are not its own
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a cut file: a seek to before its start
                raise
            if any(words in str(error) for words in _ASKS_FOR_CODE):
                raise UserError(
                    f"the checkpoint {path} holds Python objects, not only tensors, and loading them would run code "
                    "from the file: where you trust it, load it and save its model's state_dict() to a file of its own"
                ) from error
            raise _damaged(path, "of torch.save") from error


def _safetensors(path: Path) -> Any:
    try:
        library = importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error
    with open(path, "rb"):  # the library's own error for a missing file differs from one version to the next
        pass
    try:
        return library.load_file(path)
    except Exception as error:
        raise _damaged(path, "of safetensors") from error


def _damaged(path: Path, kind: str) -> UserError:
    size = path.stat().st_size
    return UserError(f"cannot read the checkpoint {path} ({size:,} bytes): it is damaged, or no file {kind}")
