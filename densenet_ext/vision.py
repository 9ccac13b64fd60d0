"""torchvision, also where its compiled operators don't load; or a sentence about what to install."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from densenet_ext.errors import UserError

_KEPT: list[Any] = []  # a Library withdraws what it declared when it is collected


@functools.cache
def import_torchvision() -> ModuleType:
    """Returns the module torchvision with its parts ``datasets``, ``models`` and ``transforms.v2``.

    Those need none of its compiled operators, which don't load beside every build of torch. Raises UserError, with what
    to install, where it can't be imported all the same.
    """
    try:
        try:
            torchvision = importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            torchvision = _import_without_operators()
        importlib.import_module("torchvision.transforms.v2")
        return torchvision
    except ModuleNotFoundError as error:
        missing = "is not installed" if error.name == "torchvision" else f"needs {error.name}, which is not installed"
        raise UserError(f"torchvision {missing}: {_install()}") from error
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"torchvision doesn't go with torch {torch.__version__} ({reason}): {_install()}") from error


def _import_without_operators() -> ModuleType:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # the import itself asks for these two by name
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    for left_behind in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[left_behind]
    return importlib.import_module("torchvision")


def _install() -> str:
    """Returns how to install the torchvision that belongs to this torch: 2.N goes with 0.(N + 15) up to 2.14.

    From 0.29.1 on a release of torchvision is for every later torch.
    """
    release = min(int(torch.__version__.split(".")[1]), 14) + 15
    return f"pip install numpy pillow, and pip install --no-deps 'torchvision==0.{release}.*'"
