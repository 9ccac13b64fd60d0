"""What only a GPU has: streams, graphs, no synchronisation, several devices, TF32, loss scaling (``--device cuda``)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import kernels, reference
from tests.support import lookalikes
from tests.support.helpers import DEVICE, F64, assert_equal, dense_block, error, make_input, make_layers

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.type != "cuda", reason="runs with --device cuda")]
CPU = torch.device("cpu")
TINY = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "bn_size": 2, "num_classes": 5}


def tiny(dtype: torch.dtype = F64, **options: Any) -> dx.DenseNet:
    return dx.DenseNet(**TINY, **options).to(dtype)


def images(n: int = 4, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=dtype)


def state(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in module.state_dict().values()]


class Training:
    """Steps of SGD on labels that follow the images, from tensors whose memory stays."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x.clone()
        self.labels = torch.arange(len(x)) % 5
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def on_a_stream(run: Callable[[], Any]) -> Any:
    """``run()`` on a stream of its own, finished when this returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


# ---- streams and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_a_training_step_in_a_graph(save: str) -> None:
    model = tiny(save=save)
    model.features.norm5.momentum = None  # its factor must stay on the device
    eager, captured = Training(copy.deepcopy(model), images()), Training(model, images())
    captured.x.copy_(eager.x)
    for _ in range(3):
        on_a_stream(captured.step)  # what allocates once and for all, and chooses algorithms
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured.step()
    for _ in range(3):
        batch = images()
        eager.x.copy_(batch)
        captured.x.copy_(batch)
        graph.replay()
        assert_equal([loss], [eager.step()], 1e-9)
    assert_equal(state(captured.model), state(eager.model), 1e-8)
    assert model.features.norm5.num_batches_tracked == 6  # capturing ran nothing


def test_dropout_in_a_graph_draws_anew_at_every_replay() -> None:
    block, x = dx.DenseBlock(2, 8, 2, 4, 0.5).double(), torch.randn(2, 8, 9, 9, dtype=F64)
    with torch.no_grad():
        on_a_stream(lambda: block(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
        found = []
        for _ in range(2):
            graph.replay()
            found.append(out.clone())
    assert not torch.equal(*found)
    dropped = (found[0][:, 8:] == 0).double().mean()
    assert 0.4 < dropped < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_in_a_graph(dtype: torch.dtype) -> None:
    model, x = tiny(dtype).eval(), images(dtype=dtype)
    with torch.no_grad():
        on_a_stream(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(2):
            x.copy_(images(dtype=dtype))
            graph.replay()
            assert torch.equal(out, model(x))


def test_everything_runs_on_the_current_stream() -> None:
    """The input is ready long after the launch: what ran on another stream would have read something else."""
    model, x = tiny(), images()
    expected = Training(copy.deepcopy(model), x * 2)
    expected.step()
    late = Training(model, torch.zeros_like(x))

    def run() -> None:
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.x.copy_(x * 2)
        late.step()

    on_a_stream(run)
    assert_equal(state(late.model), state(expected.model), 1e-10)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """A context in which whatever waits for the GPU raises."""

    @contextlib.contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with forbidden(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1).item()  # it does raise
    yield forbidden


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_no_synchronisation(no_synchronisation: Any, training: bool, save: str) -> None:
    model, x = tiny(drop_rate=0.2, save=save).train(training), images().requires_grad_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model(x).sum().backward()
    with no_synchronisation():
        model(x).sum().backward()
        with torch.no_grad():
            model(x)


def test_layers_and_functions_do_not_synchronise(no_synchronisation: Any) -> None:
    layer, x = dx.DenseLayer(8, 4, 2, 0.0).double(), [make_input(2, 3, 5, 5), make_input(2, 5, 5, 5)]
    weight = torch.randn(6, 8, 1, 1, dtype=F64, requires_grad=True)

    def run() -> None:
        layer(x).sum().backward()
        dx.functional.bottleneck(x, weight, None, None, training=True).sum().backward()

    run()
    with no_synchronisation():
        run()


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_a_model_that_is_moved_after_fuse() -> None:
    with CPU:
        plain = lookalikes.DenseNet(growth_rate=4, num_init_features=8, bn_size=2).double()
        fused, x = dx.fuse(copy.deepcopy(plain)), torch.randn(2, 3, 16, 16, dtype=F64)
        expected = fused(x)
        expected.square().sum().backward()
    moved = dx.fuse(copy.deepcopy(plain)).cuda()
    assert "float64 on cuda: the compiled part computes" in dx.report(moved).notes
    out = moved(x.cuda())
    out.square().sum().backward()
    assert_equal([out.cpu()], [expected])
    for p, q in zip(moved.parameters(), fused.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert_equal([p.grad.cpu()], [q.grad], 1e-8)
    assert_equal([b.cpu() for b in moved.buffers()], list(fused.buffers()))
    assert_equal([moved.cpu().eval()(x)], [fused.eval()(x)])


def test_mixed_devices_are_named() -> None:
    model, block = tiny(), dx.DenseBlock(1, 6, 2, 3, 0.0).double()
    with pytest.raises(ValueError, match=f"x: expected a tensor on {DEVICE}, as the parameters, got one on cpu"):
        model(images().cpu())
    with pytest.raises(ValueError, match=f"init_features: expected a tensor on {DEVICE}.* got one on cpu"):
        block(torch.randn(2, 6, 4, 4, dtype=F64, device=CPU))
    features = [make_input(2, 3, 4, 4), make_input(2, 3, 4, 4).detach().cpu()]
    with pytest.raises(ValueError, match=rf"features\[1\]: expected device {DEVICE}.* got cpu"):
        dx.functional.cat_bn_relu(features, None, None, training=True)
    x, one = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match="var: expected .*"):
        torch.ops.densenet_ext.bn_relu(x, one, one.cpu(), None, None, 1e-5, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="out: expected .*"):
        torch.ops.densenet_ext.bn_relu(x, one, one, None, None, 1e-5, torch.empty_like(x, device=CPU))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    model, x = tiny(), images()
    expected = Training(copy.deepcopy(model), x)
    expected.step()
    other = Training(model.to("cuda:1"), x.to("cuda:1"))
    other.labels = other.labels.to("cuda:1")
    other.step()
    assert torch.cuda.current_device() == 0
    assert_equal([t.to(DEVICE) for t in state(other.model)], state(expected.model), 1e-9)
    with pytest.raises(ValueError, match="x: expected a tensor on cuda:1, as the parameters, got one on cuda:0"):
        model(x)
    y = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="mean: expected"):
        mean = torch.ones(3, device="cuda:1")
        torch.ops.densenet_ext.bn_relu(y, mean, mean, None, None, 1e-5, torch.empty_like(y))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel() -> None:
    model, x = tiny().eval(), images()
    expected = model(x)
    assert_equal([nn.DataParallel(model)(x)], [expected])


def test_bad_rows_are_named() -> None:
    x, one = torch.randn(8, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match="x: expected float32, float64, bfloat16 or float16"):
        torch.ops.densenet_ext.bn_relu(x.long(), one, one, None, None, 1e-5, torch.empty_like(x))
    overlapping = torch.randn(20).as_strided((8, 3), (2, 1))
    with pytest.raises(RuntimeError, match="x: expected contiguous channels and rows that do not overlap"):
        torch.ops.densenet_ext.bn_relu(overlapping, one, one, None, None, 1e-5, torch.empty_like(x))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _legacy(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


def _by_operator(allowed: bool) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"


@pytest.mark.parametrize("allow", [_legacy, _by_operator], ids=["allow_tf32", "fp32_precision"])
def test_tf32_follows_the_setting_of_convolutions(allow: Callable[[bool], None]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    x = make_input(4, 256, 16, 16, dtype=torch.float32)
    weight = (torch.randn(128, 256, 1, 1) / 16).requires_grad_()
    cotangent = torch.randn(4, 128, 16, 16)
    inputs = [x, weight]
    exact = F.conv2d(F.batch_norm(x.double(), None, None, training=True).relu(), weight.double())
    exact_grads = torch.autograd.grad(exact, inputs, cotangent.double())
    try:
        for allowed in (False, True):
            allow(allowed)
            out = dx.functional.bottleneck(x, weight, None, None, training=True)
            found = [out, *torch.autograd.grad(out, inputs, cotangent)]
            for got, expected in zip(found, [exact, *exact_grads], strict=True):
                size = error(got, expected)
                assert (5e-5 < size < 1e-2) if allowed else size < 5e-5
    finally:
        torch.backends.cudnn.conv.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_training_with_autocast_and_loss_scaling(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = tiny(torch.float32).to(memory_format=layout)
    x, labels = images(20, torch.float32).contiguous(memory_format=layout), torch.arange(20) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


def test_an_overflow_reaches_the_loss_scaler() -> None:
    model, x = tiny(torch.float32), images(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cuda", torch.float16):
        loss = model(x).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_network_gives_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        training = Training(tiny(torch.float32, drop_rate=0.1), images(8, torch.float32))
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for _ in range(3):
                training.step()
        runs.append(state(training.model))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_dropout_is_the_processors() -> None:
    """The mask is a hash of the seed: the same on every device."""
    seed = torch.tensor([2**40 + 7])
    x, out = torch.ones(70, 12), torch.empty(70, 12)
    torch.ops.densenet_ext.append_features(x, out, None, None, 0.3, seed, 2)
    assert_equal([out.cpu()], [kernels.plain.dropout_factor(seed.cpu(), 2, 70, 12, 0.3, torch.float32)], 1e-6)


def test_a_block_of_several_kinds_of_layers_in_float64() -> None:
    """Odd widths in one buffer: no column is aligned to 16 bytes."""
    layers = [*make_layers(5, 3, 7, 2), *make_layers(11, 1, 5, 1), *make_layers(12, 12, 48, 1)]
    x = make_input(3, 5, 11, 7)
    assert_equal([dense_block(x, layers)], [reference.dense_block(x, layers, update=False)])
