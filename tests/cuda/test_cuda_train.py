"""`densenet-ext train` on a GPU, in processes of its own: the default device of the tests is none of its concern."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from tests.support.training_runs import TINY, checkpoint, differences, start

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"),
]


@pytest.mark.parametrize("how", [(), ("--amp", "bf16"), ("--amp", "fp16"), ("--compile",)], ids=" ".join)
def test_training_on_a_gpu(tmp_path, how):
    ended = start("train", *TINY, "--device", "cuda", "--epochs", 3, *how, "--out", tmp_path).finish(timeout=300)
    assert ended.code == 0 and ", fused, on cuda:0" in ended.text, ended.output
    history = checkpoint(tmp_path)["history"]
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["memory_mib"] > 0


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    options = (*TINY, "--device", "cuda", "--deterministic", "--epochs", 3)
    for name in ("whole", "cut"):
        ended = start("train", *options, "--out", tmp_path / name).finish(timeout=300)
        assert ended.code == 0, ended.output
    assert differences(tmp_path / "whole", tmp_path / "cut") == []  # repeatable: what a resume rests on
    best = tmp_path / "cut" / "best.pt"
    best.replace(tmp_path / "cut" / "checkpoint.pt")  # an earlier epoch, as a killed run leaves it
    ended = start("train", "--resume", "--out", tmp_path / "cut").finish(timeout=300)
    assert ended.code == 0, ended.output
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_comparison_counts_the_allocators_peak(tmp_path):
    how = (*TINY, "--device", "cuda", "--epochs", 2, "--seeds", 1, "--out", tmp_path)
    ended = start("compare", *how).finish(timeout=300)
    assert ended.code == 0 and "peak of a step" in ended.text, ended.output
