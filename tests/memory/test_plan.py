"""`plan` says what a training step needs before it runs: exact bytes kept, a close peak, the largest batch."""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.memory import command
from densenet_ext.memory.counting import Allocations, SavedBytes, storage_bytes
from densenet_ext.memory.shapes import ShapesMode
from tests.support import command_line
from tests.support.fusing_helpers import net
from tests.support.helpers import DEVICE, allocations, kept_for_backward

SHAPE = (3, 3, 32, 32)


def own(**kwargs: Any) -> nn.Module:
    return dx.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=3, **kwargs)


def really_kept(model: nn.Module, dtype: torch.dtype, autocast: bool) -> int:
    model = copy.deepcopy(model)
    x = torch.randn(SHAPE, dtype=torch.float32 if autocast else dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        with kept_for_backward([x, *model.parameters(), *model.buffers()]) as kept:
            out = model(x)
    del out
    return kept.bytes


def frozen_norms(model: nn.Module) -> nn.Module:
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d) and i % 2:
            module.eval()
    return model


def partly_frozen(model: nn.Module) -> nn.Module:
    for parameter in list(model.parameters())[:5]:
        parameter.requires_grad_(False)
    return model


MODELS = {
    "fused": lambda: dx.fuse(net().float()),
    "dropout": lambda: dx.fuse(net(drop_rate=0.2).float()),
    "evaluation": lambda: dx.fuse(net().float()).eval(),
    "frozen norms": lambda: frozen_norms(dx.fuse(net().float())),
    "partly frozen": lambda: partly_frozen(dx.fuse(net().float())),
    "own": own,
    "small inputs": lambda: own(small_inputs=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_kept_bytes_are_those_of_a_real_forward(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]()
    autocast = dtype == torch.bfloat16
    found = dx.plan(model, SHAPE, dtype)
    assert found.dtype == dtype and found.autocast == autocast
    for level in ("bottlenecks", "features"):
        twin = copy.deepcopy(model)
        dx.fuse(twin, save=level) if isinstance(twin, dx.DenseNet) else dx.fuse(dx.unfuse(twin), save=level)
        assert found[level].kept == really_kept(twin, dtype, autocast), level
    if not isinstance(model, dx.DenseNet):
        assert found["unfused"].kept == really_kept(dx.unfuse(copy.deepcopy(model)), dtype, autocast)


def test_plain_pytorch_keeps_the_same() -> None:
    compiled = dx.plan(dx.fuse(net()), SHAPE)
    with kernels.force_plain():
        plain = dx.plan(dx.fuse(net()), SHAPE)
    assert [level.kept for level in plain] == [level.kept for level in compiled]


def test_pure_low_precision_is_that_of_the_parameters() -> None:
    model = dx.fuse(net().to(torch.bfloat16))
    for dtype in (None, torch.bfloat16):
        found = dx.plan(model, SHAPE, dtype)
        assert not found.autocast and found["bottlenecks"].kept == really_kept(model, torch.bfloat16, False)
    assert found["unfused"].kept == really_kept(dx.unfuse(model), torch.bfloat16, False)


def test_one_more_image_adds_what_it_says() -> None:
    model = dx.fuse(net())
    found, larger = dx.plan(model, SHAPE), dx.plan(model, (10, *SHAPE[1:]))
    for level in found:
        assert larger[level.name].kept - level.kept == 7 * level.kept_per_image
    assert found["features"].kept < found["bottlenecks"].kept < found["unfused"].kept


@pytest.mark.parametrize("level", ["bottlenecks", "features", "unfused"])
def test_the_peak_is_that_of_a_real_step(level: str) -> None:
    if kernels.backend("cpu") != "compiled":
        pytest.skip("plain PyTorch has temporaries of its own")
    shape = (16, 3, 64, 64)
    model = net(growth_rate=8).float()
    if level != "unfused":
        dx.fuse(model, save=level)
    found = dx.plan(model, shape)[level]
    x = torch.randn(shape)

    def step() -> None:
        model(x).backward(torch.ones(16, 10))

    step()
    for parameter in model.parameters():
        parameter.grad = None
    _, peak = allocations(step)
    standing = storage_bytes([x, *model.parameters(), *model.buffers()])
    assert found.peak - standing == pytest.approx(peak, rel=0.03)


def test_the_largest_batch_is_the_largest() -> None:
    model = dx.fuse(net())
    found = dx.plan(model, SHAPE, save="features", memory="3 MB", optimizer_state=2)
    assert found.memory == 3_000_000 and found.optimizer == 2 * found.gradients
    for level in found:
        batch = level.largest_batch
        assert batch is not None and batch > 3
        for n, fits in ((batch, True), (batch + 1, False)):
            peak = dx.plan(model, (n, *SHAPE[1:]), save="features", optimizer_state=2)[level.name].peak
            assert (peak <= 3_000_000) == fits, (level.name, n)


def test_nothing_fits() -> None:
    model = dx.fuse(net())
    bytes_of_parameters = storage_bytes([*model.parameters(), *model.buffers()])
    found = dx.plan(model, SHAPE, memory=bytes_of_parameters + 1)
    assert [level.largest_batch for level in found] == [0, 0, 0]


def test_one_level_beside_the_unfused_form() -> None:
    assert [level.name for level in dx.plan(net(), SHAPE, save="features")] == ["features", "unfused"]
    assert [level.name for level in dx.plan(net(), SHAPE)] == ["bottlenecks", "features", "unfused"]


def test_a_model_that_is_not_fused_and_one_without_data() -> None:
    fused, plain = dx.plan(dx.fuse(net()), SHAPE), dx.plan(net(), SHAPE)
    assert fused == plain
    assert dx.plan(copy.deepcopy(net()).to("meta"), SHAPE) == plain


def test_what_is_not_fused_stays_so() -> None:
    model = net()
    dx.fuse(model.features.denseblock2)
    found = dx.plan(model, SHAPE)
    assert found["bottlenecks"].kept == really_kept(model, torch.float64, False)
    assert "2 of 3 dense blocks run unfused at every level: densenet_ext.report says why" in found.notes


def test_the_librarys_memory_mode_is_off_in_the_unfused_form() -> None:
    found = dx.plan(net(efficient=True), SHAPE)
    assert "unfused: the library's own memory mode is off" in found.notes
    assert found["unfused"] == dx.plan(net(), SHAPE)["unfused"]


def test_the_model_stays_as_it_is() -> None:
    model = dx.fuse(net(drop_rate=0.2), save="features")
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()
    hook = model.features.denseblock1.denselayer1.relu1.register_forward_hook(lambda module, args, out: None)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    gradients, random_state = [p.grad for p in model.parameters()], torch.get_rng_state()
    dx.plan(model, SHAPE)
    dx.report(model, SHAPE)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {row.save for row in dx.report(model) if row.kind == "dense block" and row.fused} == {"features"}
    hook.remove()


def test_wrapped_and_altered_models() -> None:
    model = dx.fuse(net())
    wanted = [level.kept for level in dx.plan(model, SHAPE)]
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    for wrapped in (compiled, nn.DataParallel(copy.deepcopy(model)), torch.optim.swa_utils.AveragedModel(model)):
        assert [level.kept for level in dx.plan(wrapped, SHAPE)] == wanted
    conv = model.features.denseblock1.denselayer1.conv1
    prune.l1_unstructured(conv, "weight", 0.5)
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()  # conv.weight is no leaf now
    model.mean = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    model.register_forward_pre_hook(lambda module, args: args[0] - module.mean)
    assert dx.plan(model, SHAPE)["bottlenecks"].kept > wanted[0]  # the pruned block runs unfused


def test_it_costs_no_memory() -> None:
    model = dx.fuse(net().float())
    _, peak = allocations(lambda: dx.plan(model, (512, 3, 128, 128)))
    assert peak < 2**20


def test_the_table() -> None:
    lines = str(dx.plan(dx.fuse(net().float()), SHAPE, torch.bfloat16, memory="1GiB")).splitlines()
    assert lines[0] == "one training step on [3, 3, 32, 32], bfloat16 autocast"
    assert lines[1].split("  ")[0] == "save" and lines[1].endswith("largest batch in 1.0 GiB")
    assert [line.split()[0] for line in lines[3:6]] == ["bottlenecks", "features", "unfused"]
    assert lines[6].startswith("the peak includes parameters ")
    with pytest.raises(KeyError):
        dx.plan(net(), SHAPE)["everything"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "densenet121"}, TypeError, "plan: model: expected a torch.nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "plan: model: expected dense blocks, found none in this Linear"),
        ({"input_shape": 3}, TypeError, r"input_shape: expected \[N, C, \*spatial\]"),
        ({"input_shape": (3, 32)}, ValueError, r"input_shape: expected \[N, C, \*spatial\] .*, got \[3, 32\]"),
        ({"input_shape": (0, 3, 32, 32)}, ValueError, r"input_shape\[0\]: expected an integer of at least 1, got 0"),
        ({"input_shape": (2, 3, 8, 8)}, ValueError, r"input_shape: the model does not take \[2, 3, 8, 8\]: .*2 pixels"),
        ({"input_shape": (2, 4, 32, 32)}, ValueError, r"does not take \[2, 4, 32, 32\]: .*expected input"),
        ({"dtype": torch.int8}, TypeError, "plan: dtype: expected one of torch.float32.*, got torch.int8"),
        ({"save": "all"}, ValueError, "save: expected one of 'bottlenecks', 'features', got 'all'"),
        ({"memory": "much"}, ValueError, "memory: expected bytes, or a text such as '80GiB' or '24 GB', got 'much'"),
        ({"memory": 1.5}, TypeError, "memory: expected bytes, or a text"),
        ({"memory": "1 KiB"}, ValueError, r"memory: expected more than the parameters' [\d.]+ KiB, got 1.0 KiB"),
        ({"optimizer_state": -1}, ValueError, "optimizer_state: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dx.plan(**{"model": net(), "input_shape": SHAPE, **arguments})


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5k", 1500), ("512 mib", 2**29), ("7", 7), ("7 B", 7), (7, 7)],
)
def test_sizes_of_memory(text: Any, size: int) -> None:
    from densenet_ext import checks

    assert checks.memory("memory", text) == size


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_weighs_every_unit() -> None:
    model = dx.fuse(net())
    found = dx.report(model, SHAPE)
    planned = dx.plan(model, SHAPE)
    assert (found.kept, found.kept_unfused) == (
        planned["bottlenecks"].kept_per_image,
        planned["unfused"].kept_per_image,
    )
    rows = {row.name: row for row in found}
    # the buffer and every z: 8 x 8 pixels, then 4 x 4, of float64
    assert rows["features.denseblock1"].kept == 8 * 64 * (8 + 2 * 4 + 2 * 8)
    assert rows["features.denseblock2"].kept == 8 * 16 * (8 + 2 * 4 + 2 * 8)
    assert rows["features.transition1"].kept == 0  # its input is the block's buffer
    assert rows[""].kept == 8 * 16  # what the classifier reads
    assert sum(row.kept or 0 for row in found) == found.kept
    assert sum(row.kept_unfused or 0 for row in found) == found.kept_unfused
    lines = str(found).splitlines()
    assert lines[0].split() == ["unit", "name", "fused", "save", "kept/image", "unfused", "why", "not"]
    assert any(line.split() == ["all", *_readable(found.kept), *_readable(found.kept_unfused)] for line in lines)


def _readable(size: Any) -> list[str]:
    return f"{size / 1024:.1f} KiB".split()


def test_report_of_what_is_not_fused_and_of_own_models() -> None:
    found = dx.report(net(), SHAPE)
    assert found.kept == found.kept_unfused and all(row.kept == row.kept_unfused for row in found)
    mine = dx.report(own(), SHAPE)
    assert mine.kept is not None and mine.kept_unfused is not None and mine.kept < mine.kept_unfused
    pair = dx.report(nn.Sequential(dx.fuse(net()), nn.Linear(10, 4).double()), SHAPE)
    assert pair.kept is not None and all(row.kept is not None for row in pair)


def test_report_without_shape_weighs_nothing() -> None:
    found = dx.report(dx.fuse(net()))
    assert found.kept is None and {row.kept for row in found} == {None} and "kept" not in str(found)
    with pytest.raises(ValueError, match=r"input_shape: the model does not take \[2, 3, 8, 8\]"):
        dx.report(dx.fuse(net()), (2, 3, 8, 8))


def test_a_refused_batch_is_told_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it has a handler of its own, on stderr
    log.addHandler(caplog.handler)
    filters = list(log.filters)
    try:
        for refuse in (dx.plan, dx.report):
            with pytest.raises(ValueError, match="does not take"):
                refuse(dx.fuse(net()), (2, 3, 8, 8))
            assert not caplog.records and log.filters == filters
        with pytest.raises(RuntimeError, match="too small"), FakeTensorMode():  # as everyone else's errors are
            F.avg_pool2d(torch.empty(1, 1, 1, 1), 2)
        assert caplog.records
    finally:
        log.removeHandler(caplog.handler)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_and_what_exists_not_at_all() -> None:
    x, w = torch.randn(4, 5), torch.randn(5, requires_grad=True)
    saved = SavedBytes([x, w])
    with saved:
        y = w.exp()  # saves its result
        ((y * y[:5]).sum() + (w * w).sum()).backward()
    assert saved.total == y.untyped_storage().nbytes()


def test_a_freed_storage_leaves_the_timeline() -> None:
    mode, found = ShapesMode(), Allocations()
    with mode, mode.telling(found.note):
        x = torch.empty(100)
        y = x + 1
        del x
        y.add_(1).view(10, 10)
        torch.empty(50)
    assert found.timeline == [400, 800, 600]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_asks_for_what_the_call_takes() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser.add_argument)
    asked = vars(parser.parse_args([]))
    assert asked.keys() == inspect.signature(command.plan).parameters.keys()
    assert asked == {
        "model": "densenet121",
        "image": None,
        "batch": 32,
        "dtype": "fp32",
        "save": None,
        "memory": None,
        "optimizer_state": 0,
    }


def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dx, "densenet_bc", lambda: own(small_inputs=True))
    ended = command_line.run(
        "plan", "--model", "densenet_bc", "--image", "8", "--batch", "2", "--dtype", "bf16", "--memory", "1GiB"
    )
    assert ended.code == 0
    assert (
        ended.output == f"densenet_bc: {dx.plan(own(small_inputs=True), (2, 3, 8, 8), torch.bfloat16, memory='1GiB')}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "resnet50"), ["--model", "densenet121", "densenet_bc", "'resnet50'"]),
        (("--image", "8"), ["--image: densenet121 does not take [32, 3, 8, 8]: input: expected at least 2 pixels"]),
        (("--memory", "1MB"), ["--memory: expected more than the parameters'"]),
        (("--memory", "plenty"), ["--memory", "'80GiB'"]),
        (("--dtype", "int8"), ["--dtype", "bf16"]),
        (("--save", "all"), ["--save", "features"]),
        (("--batch", "0"), ["--batch", "at least 1"]),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], words: list[str]) -> None:
    ended = command_line.run("plan", *arguments)
    assert ended.code == 2 and all(word in ended.text for word in words), ended.text
