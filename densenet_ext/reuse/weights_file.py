"""Reads what other people's training wrote: a file of torch.save or of safetensors, without running code from it."""

from __future__ import annotations

import argparse
import importlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.serialization

from densenet_ext.errors import UserError
from densenet_ext.files import check_archive


def read_weights_file(path: Path) -> Mapping[Any, Any]:
    """Returns what the file holds, on the CPU: a state dict, or a training's dict with one inside.

    A name that ends in ``.safetensors`` is read by the package safetensors, anything else by torch.load with
    ``weights_only=True``. Raises UserError when the file is missing, damaged, would run code, or holds no dict.
    """
    try:
        if path.suffix == ".safetensors":
            content = importlib.import_module("safetensors.torch").load_file(path)
        else:
            content = _torch_file(path)
    except ImportError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # either library raises many kinds for files that are not its own
        # Not in torch.load's words, which are advice to load it without weights_only.
        raise UserError(
            f"the checkpoint {path} is damaged, or holds Python objects, which could run code; save a state_dict()"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"the checkpoint {path} holds a {type(content).__name__}, expected a state dict")
    return content


def _torch_file(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # not so before torch 1.6
        check_archive(path)
    # Beside the weights timm keeps its command line; making one runs nothing.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about kinds of files that are refused in one sentence
        return torch.load(path, map_location="cpu", weights_only=True)
