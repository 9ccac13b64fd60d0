"""Calls every operator on small odd shapes in every dtype, and the convolutions as on two multiprocessors, by several
tiles for a block and by large tiles: what ``make gpu`` runs under compute-sanitizer.

``python tests/kernels/every_operator.py --device cuda --seconds 60``. Arguments are made on the processor and copied,
so that the kernels of this package are nearly all that runs on the GPU. Results are not looked at: the other tests do
that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch import Tensor  # noqa: E402

from densenet_ext import kernels  # noqa: E402
from tests.support.kernel_calls import MAKERS, WIDE, Call, converted, wide_conv1x1  # noqa: E402

SHAPES = [(37, 12, True), (131, 70, True)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


# As few blocks as this, so that small shapes have several tiles for each (csrc/cuda/limits.h).
BLOCKS = {"DENSENET_EXT_TEST_MULTIPROCESSORS": "2"}


def calls(device: torch.device) -> Iterator[tuple[str, torch.dtype, Call, dict[str, str]]]:
    """Operator, dtype, arguments and environment: every operator once before any of them again, so that an early end
    leaves none out."""
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            for name in kernels.OPS:
                if device.type != "cpu" and name in kernels.CPU_OPS:
                    continue
                for call in MAKERS[name](*shape):
                    yield name, dtype, call, {}
            if number == 0 and dtype != torch.float64:
                for name in ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"):
                    for call in MAKERS[name](*shape):  # by the tiles that many pixels take
                        yield name, dtype, call, BLOCKS
                for N, C in WIDE[1:3]:
                    for name, call in wide_conv1x1(290, C, N, dtype):
                        yield name, dtype, call, BLOCKS


def moved(value: Any, device: torch.device) -> Any:
    """The same on ``device``; a slice stays a slice of wider rows, with the same memory around it."""
    if isinstance(value, list):
        return [moved(x, device) for x in value]
    if not isinstance(value, Tensor):
        return value
    base = value if value._base is None else value._base
    return base.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=60.0, help="starts no call after so many")
    options = parser.parse_args()
    missing = kernels.why_plain(options.device)
    if missing is not None:
        print(f"every_operator: nothing to call: {missing}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    end = time.monotonic() + options.seconds
    made = total = 0
    for name, dtype, call, environment in calls(options.device):
        total += 1
        if time.monotonic() > end:
            continue
        for variable in BLOCKS:
            os.environ.pop(variable, None)
        os.environ.update(environment)
        print(f"call {total}: {name} {str(dtype).removeprefix('torch.')} {environment or ''}", flush=True)
        arguments = [moved(value, options.device) for value in converted(call, dtype).values()]
        getattr(torch.ops.densenet_ext, name).default(*arguments)
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        made += 1
    print(f"{made} of {total} calls, {len(kernels.OPS)} operators in {len(DTYPES)} dtypes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
