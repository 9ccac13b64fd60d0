"""Releases of timm that people still pin: each in a process of its own, from a folder that holds nothing else.

pip install --no-deps --target FOLDER timm==0.4.12
OLD_TIMM=FOLDER[:FOLDER...] python -m pytest tests/peers/test_old_timm.py
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = [folder for folder in os.environ.get("OLD_TIMM", "").split(os.pathsep) if folder]

CHECKS = {
    "trains": """
same(pair(net().double()), train_step)
same(pair(net().double()), lambda model: train_step(model, images(3, 48)))
same(pair(net(num_classes=0).double()), train_step)
""",
    "evaluates": """
same(pair(net().double().eval()), train_step)
same(pair(net().double().eval()), lambda model: model.forward_features(images()), layout=True)
""",
    "is fused": """
model = fuse(net())
assert_all_fused(model, ("dense block", "transition"))
result = dx.verify(model.double(), images())
assert IDENTITY or result.fused_units == len(fused_kinds(model)), result
""",
    "drop rates": """
same(pair(net(drop_rate=0.2).double().eval()), train_step)
""",
    "memory mode": """
models = pair(net(memory_efficient=True).double().eval())
same(models, train_step)
assert_all_fused(models[1], ("dense block", "transition"))
""",
    "scripts": """
same(pair(net().double().eval()), lambda model: torch.jit.script(model)(images()))
""",
    "blur pooling": """
blur = importlib.import_module("timm.models.layers").BlurPool2d
same(pair(net(stem_type="deep", aa_layer=blur).double()), train_step)
""",
}
PROGRAM = """
import importlib, json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch
from tests.peers.twins import *
import densenet_ext as dx
densenet = library("timm.models.densenet")
assert densenet.__file__.startswith(os.environ["FOLDER"]), densenet.__file__
def net(**kwargs):
    torch.manual_seed(0)
    return densenet.DenseNet(**{"growth_rate": 8, "block_config": (2, 2), "num_classes": 5, **kwargs})
found = {}
for name, code in json.loads(sys.stdin.read()).items():
    try:
        exec(code, {**globals()})
        found[name] = ""
    except Exception:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


@functools.cache
def outcomes(folder: str) -> dict[str, str]:
    """What each check raises, all of them in one process."""
    path = os.pathsep.join([folder, str(Path(__file__).resolve().parents[2])])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, "FOLDER": folder},
        input=json.dumps(CHECKS),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not FOLDERS, reason="OLD_TIMM names no folder")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: Path(folder).name)
@pytest.mark.parametrize("check", CHECKS)
def test_old_timm(folder: str, check: str) -> None:
    raised = outcomes(folder)[check]
    assert not raised, raised[-2000:]
