"""Operators called by hand: absurd arguments are refused by name, never with a crash, never in silence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import _extension, kernels
from tests.kernels.operator_abuse import HUGE, freed, shortened
from tests.support.helpers import DEVICE

ROOT = Path(__file__).resolve().parents[2]
ops = torch.ops.densenet_ext
pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[tuple[str, list[str], list | None]]]:
    """For each operator what was wrong, whom the message may blame, and [is it a RuntimeError, its first line]."""
    run = subprocess.run(
        [sys.executable, "tests/kernels/operator_abuse.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"exit code {run.returncode} at {lines[-1:]}: {run.stderr[-1000:]}"
    found = defaultdict(list)
    for line in lines:
        if len(line) == 4:
            found[line[0]].append(tuple(line[1:]))
    return found


@pytest.mark.parametrize("name", kernels.OPS)
def test_absurd_arguments_are_refused_by_name(name: str, outcomes) -> None:
    assert len(outcomes[name]) > 20
    wrong = []
    for text, blamed, error in outcomes[name]:
        if error is None:
            wrong.append(f"{text}: accepted")
        elif not error[0] or not re.search(rf"densenet_ext: .*\b({'|'.join(blamed)})\b.*: expected .*got", error[1]):
            wrong.append(f"{text}: {error[1]}")
    assert not wrong, "\n".join(wrong)


def norm(C: int) -> tuple[Tensor, Tensor, None, None, float]:
    return torch.zeros(C), torch.ones(C), None, None, 1e-5


def test_in_place_where_a_kernel_reads_only_what_it_writes() -> None:
    x, grad = torch.randn(9, 8), torch.randn(9, 8)
    expected = torch.empty(9, 8)
    for call, target in [
        (lambda out, source: ops.bn_relu(source, *norm(8), out), x),
        (lambda out, source: ops.bn_relu_backward(source, x, *norm(8), None, None, out), grad),
        (lambda out, source: ops.feature_grad(source, x, *torch.randn(3, 8), 0.0, None, 0, out), grad),
    ]:
        torch.manual_seed(1)
        call(expected, target)
        torch.manual_seed(1)
        in_place = target.clone()
        call(in_place, in_place)
        torch.testing.assert_close(in_place, expected, rtol=0, atol=0)


def test_gradients_of_the_bottleneck_add_to_a_gradient_in_its_place() -> None:
    x, weight, dz, old = torch.randn(9, 8), torch.randn(5, 8), torch.randn(9, 5), torch.randn(9, 8)
    results = []
    for grad_in, grad_x in ((old, torch.empty(9, 8)), (old.clone(), None)):
        grad_x = grad_in if grad_x is None else grad_x
        nothing = (None,) * 5
        sums = torch.empty(2, 8)
        ops.bn_relu_conv1x1_backward(
            x, *norm(8), weight, dz, *nothing, 0.0, None, None, grad_in, False, grad_x, None, *sums, None, None
        )
        results.append(grad_x)
    assert torch.equal(*results)


def test_neighbouring_columns_and_gaps_between_rows_are_apart() -> None:
    """A vector between the rows of a buffer, and single rows of it, too."""
    buffer = torch.zeros(9, 20)
    ops.channel_stats(buffer[:, :4], buffer[0, 4:8], buffer[8, 16:])
    with pytest.raises(RuntimeError, match="mean: expected storage apart from that of x"):
        ops.channel_stats(buffer[:, :4], buffer[0, 3:7], buffer[8, 16:])
    with pytest.raises(RuntimeError, match="mean: expected storage apart from that of var"):
        ops.channel_stats(buffer[:, :4], buffer[0, 4:8], buffer[0, 7:11])
    ops.bn_relu(buffer[2:3, :8], *norm(8), buffer[2:3, 8:16])
    with pytest.raises(RuntimeError, match="out: expected storage apart from that of x"):
        ops.bn_relu(buffer[2:3, :8], *norm(8), buffer[2:3, 7:15])


def test_features_may_not_lie_in_other_columns_of_their_result() -> None:
    """The first feature's result would be written where the second is still to be read."""
    out = torch.randn(9, 8)
    with pytest.raises(RuntimeError, match="out: expected storage apart from that of features"):
        ops.cat_bn_relu([torch.randn(9, 4), out[:, :4]], *norm(8), out)


def test_a_lazy_clone_gets_memory_of_its_own() -> None:
    x = torch.randn(9, 8)
    before, out = x.clone(), torch._lazy_clone(x)
    ops.bn_relu(torch.randn(9, 8), *norm(8), out)
    assert torch.equal(x, before) and not torch.equal(out, before)


@pytest.mark.parametrize("C", [0, 3])
def test_nothing_to_do_is_done(C: int) -> None:
    """No rows, no channels, and sizes that only tensors without memory have."""
    rows = torch.empty(2**40 if C == 0 else 0, C)
    ops.bn_relu(rows, *norm(C), torch.empty_like(rows))
    ops.channel_stats(rows, torch.empty(C), torch.empty(C))
    ops.cat_bn_relu([rows, rows], *norm(2 * C), rows.new_empty(len(rows), 2 * C))
    ops.cat_bn_relu([], *norm(0), torch.empty(5, 0))
    size = [len(rows), 1, 1, 1]
    ops.bn_relu_avg_pool(rows, size, [1, 1, 1], *norm(C), torch.empty_like(rows))
    sums = torch.ones(2, C)
    ops.bn_relu_backward_reduce(rows, rows, *norm(C), *sums)
    assert not sums.any()


def test_a_convolution_of_no_channels_is_its_bias() -> None:
    out = torch.empty(7, 5)
    ops.bn_relu_conv1x1(torch.empty(7, 0), *norm(0), torch.empty(5, 0), torch.arange(5.0), False, out, None, None)
    assert torch.equal(out, torch.arange(5.0).expand(7, 5))
    ops.bn_relu_conv1x1(
        torch.empty(2**40, 0), *norm(0), torch.empty(0, 0), None, False, torch.empty(2**40, 0), *(None,) * 2
    )


def test_tensors_without_data_do_nothing_together_only() -> None:
    meta = torch.empty(9, 8, device="meta")
    vector = torch.empty(8, device="meta")
    ops.channel_stats(meta, vector, vector.clone())
    with pytest.raises(RuntimeError, match="mean: expected a tensor on cpu as the other arguments, got one on meta"):
        ops.channel_stats(torch.randn(9, 8), mean=vector, var=torch.empty(8))
    with pytest.raises(RuntimeError, match="features: expected a tensor on meta"):
        ops.cat_bn_relu([meta, torch.empty(9, 8)], *(torch.empty(16, device="meta"),) * 2, None, None, 1e-5, meta)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, on kinds of tensors that are in beta
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Tensor.to_sparse, "sparse_coo"),
        (Tensor.to_sparse_csr, "sparse_csr"),
        (Tensor.to_mkldnn, "_mkldnn"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "quantized"),
    ],
)
def test_tensors_of_another_kind_are_refused_by_name(change, kind: str) -> None:
    x, vector = torch.rand(9, 8), torch.rand(8)
    message = f": expected a strided tensor on .*, got a {kind} one on cpu"
    with pytest.raises(RuntimeError, match=f"densenet_ext: x{message}"):
        ops.channel_stats(change(x), vector, vector.clone())
    with pytest.raises(RuntimeError, match=f"densenet_ext: features{message}"):
        ops.cat_bn_relu([x, change(x)], torch.rand(16), torch.rand(16), None, None, 1e-5, torch.empty(9, 16))


# ---- the running statistics of many norms ----------------------------------------------------------------------------


def moving() -> dict[str, Any]:
    """A valid call for two norms of 4 and 2 channels; the second reads behind the first's part of a longer vector."""
    return {
        "running_means": [torch.zeros(4), torch.zeros(2)],
        "running_vars": [torch.ones(4), torch.ones(2)],
        "means": [torch.arange(4.0), torch.arange(6.0)],
        "vars": [torch.full((4,), 3.0), torch.arange(6.0)],
        "which": [0, 1],
        "starts": [0, 3],
        "momenta": [0.5, 0.25],
        "unbiased": 2.0,
    }


def move(
    running_means: list[Tensor], running_vars: list[Tensor], means: list[Tensor], vars: list[Tensor],
    which: list[int], starts: list[int], momenta: list[float], unbiased: float,
) -> None:  # fmt: skip
    """Has the norms kept for one call."""
    norms = ops.keep_norms(running_means, running_vars, [], which, starts, momenta)
    try:
        ops.move_running_stats(norms, means, vars, unbiased)
    finally:
        ops.drop_kept(norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_move_by_those_of_the_batch(dtype: torch.dtype) -> None:
    args = moving()
    for name in ("running_means", "running_vars", "means", "vars"):
        args[name] = [t.to(dtype) for t in args[name]]
    move(**args)
    (mean, other_mean), (var, other_var) = args["running_means"], args["running_vars"]
    assert mean.tolist() == [0, 0.5, 1, 1.5] and var.tolist() == [0.5 + 0.5 * 6] * 4
    assert other_mean.tolist() == [0.75, 1.0] and other_var.tolist() == [0.75 + 0.25 * 6, 0.75 + 0.25 * 8]


def test_a_norm_that_occurs_twice_moves_twice() -> None:
    running = torch.zeros(2), torch.ones(2)
    batch = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]
    move([running[0]] * 2, [running[1]] * 2, *batch, [0, 0], [0, 0], [0.5, 0.5], 1.0)
    assert running[0].tolist() == [0.75, 1.5] and running[1].tolist() == [2.5, 3.25]


ABSURD_VECTORS = {
    "of another dtype": lambda x: x.double(),
    "of integers": lambda x: x.to(torch.int32),
    "complex": lambda x: x.to(torch.complex64),
    "on the meta device": lambda x: x.to("meta"),
    "with gaps": lambda x: torch.stack([x, x], 1)[:, 0],
    "with freed storage": freed,
    "with shortened storage": shortened,
}
ABSURD_LISTS = {
    "which": [[0], [0, 1, 0], [], [0, 2], [0, -1], [HUGE, 0], [-HUGE - 1, 0]],
    "starts": [[0], [0, 3, 0], [], [0, 5], [1, 3], [-1, 3], [0, HUGE], [0, -HUGE - 1]],
    "momenta": [[0.5], [0.5, 0.5, 0.5], []],
}


@pytest.mark.parametrize("name", ["running_means", "running_vars", "means", "vars"])
@pytest.mark.parametrize("what", ABSURD_VECTORS)
def test_running_statistics_of_absurd_vectors_are_refused(name: str, what: str) -> None:
    # the first of the running means says in which dtype and where the others have to be
    args = moving()
    args[name][1] = ABSURD_VECTORS[what](args[name][1])
    with pytest.raises(RuntimeError, match=rf"densenet_ext: {name}: expected .*got"):
        move(**args)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ABSURD_LISTS.items() for value in values])
def test_running_statistics_by_absurd_numbers_are_refused(name: str, value: list[Any]) -> None:
    args = {**moving(), name: value}
    with pytest.raises(RuntimeError, match=rf"densenet_ext: ({name}|keep_norms): expected .*got"):
        move(**args)


@pytest.mark.parametrize("name", ["running_vars", "means", "vars"])
def test_running_statistics_in_lists_of_other_lengths_are_refused(name: str) -> None:
    for change in (lambda tensors: tensors[:1], lambda tensors: [*tensors, tensors[0]], lambda tensors: []):
        args = moving()
        args[name] = change(args[name])
        with pytest.raises(RuntimeError, match="densenet_ext: .*expected .*got"):
            move(**args)


def test_running_statistics_of_more_channels_than_the_batch_has_are_refused() -> None:
    for name in ("running_means", "running_vars", "means", "vars"):
        args = moving()
        args[name][0] = torch.zeros(5 if name.startswith("running") else 3)
        before = [t.clone() for t in args["running_means"]]
        with pytest.raises(RuntimeError, match="densenet_ext: .*expected .*got"):
            move(**args)
        assert all(map(torch.equal, args["running_means"], before))
