"""What people do to the DenseNets that they have goes on working in a fused one, with the same numbers.

Each test does the same to a fused and to an unfused network and compares outputs, gradients and buffers.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing_helpers import assert_same_gradients, assert_same_state, images, net, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import densenet_ext as dx
from densenet_ext.fusing.forwards import installed

BLOCK = "features.denseblock1"


def pair(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The same network twice, the first fused."""
    return dx.fuse(net(**kwargs)), net(**kwargs)


def close(found: list[Any]) -> None:
    """The results of both networks are the same."""
    assert len(found) == 2
    torch.testing.assert_close(*found)


def train_step(model: nn.Module, x: Tensor | None = None) -> None:
    """Forward and backward pass, and a step of plain gradient descent."""
    model(images() if x is None else x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def layer(model: nn.Module, name: str = "denselayer1") -> Any:
    return model.get_submodule(f"{BLOCK}.{name}")


# ---- looking inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [BLOCK, "features.transition1", "features"])
def test_grad_cam_by_hooks(target: str) -> None:
    found = []
    for model in pair():
        model.eval()
        seen: dict[str, Tensor] = {}

        def look(module: nn.Module, args: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["maps"] = out.detach().clone()  # the ReLU behind features is in place
            out.register_hook(lambda grad: seen.update(grad=grad.clone()))

        module = model.get_submodule(target)
        module.register_forward_hook(look)
        if target != "features":  # the ReLU behind them refuses what a full backward hook returns, in eager too
            module.register_full_backward_hook(lambda module, into, out, seen=seen: seen.update(full=out[0].clone()))
        model(images().requires_grad_())[:, 3].sum().backward()
        assert torch.equal(seen.get("full", seen["grad"]), seen["grad"])
        weights = seen["grad"].mean((2, 3), keepdim=True)
        found.append((F.relu((weights * seen["maps"]).sum(1)), seen["grad"]))
    close(found)
    assert found[0][1].abs().max() > 0


def test_grad_cam_by_autograd_grad() -> None:
    found = []
    for model in pair():
        kept: list[Tensor] = []
        model.get_submodule(BLOCK).register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        score = model.eval()(images())[:, 1].sum()
        found.append(torch.autograd.grad(score, kept))
    close(found)


def test_grad_cam_of_own_models_stays_fused() -> None:
    model = dx.DenseNet(4, (2, 2), 8, num_classes=3).double().eval()
    kept: list[Tensor] = []
    model.features.denseblock1.register_forward_hook(lambda module, args, out: kept.append(out))  # type: ignore[union-attr]
    score = model(images())[:, 1].sum()
    (grad,) = torch.autograd.grad(score, kept)
    assert all(row.fused for row in dx.report(model))
    maps = kept[0].detach().requires_grad_()
    features = model.features
    again = F.relu(features.norm5(features.denseblock2(features.transition1(maps)))).mean((2, 3))  # type: ignore[operator]
    torch.testing.assert_close(grad, torch.autograd.grad(model.classifier(again)[:, 1].sum(), maps)[0])


def test_integrated_gradients() -> None:
    x, found = images(1), []
    for model in pair():
        model.eval()
        path = torch.linspace(0, 1, 5, dtype=x.dtype).view(-1, 1, 1, 1) * x
        (grad,) = torch.autograd.grad(model(path.requires_grad_())[:, 2].sum(), path)
        found.append(x[0] * grad.mean(0))
    close(found)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp_min(0) * (ctx.saved_tensors[0] > 0)


class GuidedReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Guided.apply(x)


def _guide(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, GuidedReLU())
        _guide(child)


@pytest.mark.parametrize("when", ["before", "after"])
def test_guided_backpropagation_by_replaced_relus(when: str) -> None:
    found = []
    for fused in (True, False):
        model = net().eval()
        if fused and when == "after":
            dx.fuse(model)
        _guide(model)
        if fused and when == "before":
            with pytest.warns(UserWarning, match="relu1 is a GuidedReLU, not a ReLU"):
                dx.fuse(model)
        x = images().requires_grad_()
        found.append(torch.autograd.grad(model(x)[:, 0].sum(), x))
    close(found)
    with torch.no_grad():
        plain = net().eval()
    x = images().requires_grad_()
    assert not torch.allclose(found[0][0], torch.autograd.grad(plain(x)[:, 0].sum(), x)[0])


def test_backward_hooks_on_relus_of_deconvnet() -> None:
    found = []
    for model in pair():
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
                module.register_full_backward_hook(lambda module, into, out: (into[0].clamp_min(0),))
        x = images().requires_grad_()
        found.append(torch.autograd.grad(model(x)[:, 0].sum(), x))
    close(found)


def test_feature_extraction_by_fx() -> None:
    model, plain = pair()
    traced = torch.fx.symbolic_trace(model.eval())
    output = next(node for node in traced.graph.nodes if node.op == "output")
    wanted = [node for node in traced.graph.nodes if node.target in ("features.pool0", "features.transition1.pool")]
    output.args = ({node.target: node for node in wanted},)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    found: dict[str, Tensor] = {}
    for name in ("features.pool0", "features.transition1.pool"):
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found.update({name: out.clone()})
        )
    plain.eval()(images())
    torch.testing.assert_close(traced(images()), found)


# ---- changed parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrisations_come_and_go(kind: str) -> None:
    models = pair()
    for model in models:
        torch.manual_seed(3)
        getattr(parametrizations, kind)(layer(model, "denselayer2").conv1)
        train_step(model)
    assert rows(models[0])[BLOCK].reason == "denselayer2.conv1 is parametrised"
    assert_same_state(*models)
    for model in models:
        parametrize.remove_parametrizations(layer(model, "denselayer2").conv1, "weight")
        train_step(model)
    assert rows(models[0])[BLOCK].fused
    assert_same_state(*models)


def test_the_old_weight_norm() -> None:
    models = pair()
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer(model).conv2)
        train_step(model)
    assert not rows(models[0])[BLOCK].fused
    assert_same_state(*models)
    for model in models:
        nn.utils.remove_weight_norm(layer(model).conv2)
        train_step(model)
    assert rows(models[0])[BLOCK].fused
    assert_same_state(*models)


def test_pruning_and_its_removal() -> None:
    models = pair()
    for model in models:
        for conv in (layer(model).conv1, model.features.transition1.conv):
            prune.l1_unstructured(conv, "weight", 0.5)
        train_step(model)
        train_step(model)
    assert rows(models[0])[BLOCK].reason == "denselayer1.conv1 has a forward pre-hook"
    assert_same_state(*models)
    for model in models:
        for conv in (layer(model).conv1, model.features.transition1.conv):
            prune.remove(conv, "weight")
    assert all(row.fused for row in dx.report(models[0]))
    close([model(images()) for model in models])
    assert (layer(models[0]).conv1.weight == 0).sum() == layer(models[0]).conv1.weight.numel() // 2


def test_norms_in_evaluation_inside_a_training_network() -> None:
    models = pair()
    for model in models:
        train_step(model)
        layer(model).norm1.eval()
        layer(model, "denselayer2").norm2.eval()
        train_step(model)
        model.features.transition1.norm.eval()
        model.train()
        layer(model, "denselayer2").norm1.eval()
        train_step(model)
    assert_same_state(*models)
    counts = [int(module.num_batches_tracked) for module in models[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(counts) == {2, 3}


def test_the_momentum_changes_between_steps() -> None:
    models = pair()
    for model in models:
        for momentum in (0.1, 0.9, None, 0.0):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = momentum
            train_step(model)
    assert_same_state(*models)


def test_parameters_are_replaced_and_filled_in_place() -> None:
    models = pair()
    for model in models:
        train_step(model)
        with torch.no_grad():
            layer(model).conv1.weight.mul_(2)
            layer(model).norm2.bias.data.fill_(0.3)
        layer(model).norm1.weight = nn.Parameter(torch.full_like(layer(model).norm1.weight, 0.7))
        model.get_submodule(BLOCK).denselayer2.norm1.running_var = torch.full((12,), 2.0, dtype=torch.float64)
        train_step(model)
    assert_same_state(*models)
    close([model.eval()(images()) for model in models])


def test_freezing_and_thawing() -> None:
    models = pair()
    for model in models:
        for frozen in (True, False):
            model.features.requires_grad_(not frozen)
            train_step(model)
    assert_same_state(*models)


def test_a_moving_average_with_buffers() -> None:
    averages = []
    for model in pair():
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        for _ in range(2):
            train_step(model)
            average.update_parameters(model)
        averages.append(average)
        assert all(row.fused for row in dx.report(average)) == (model is not None and len(averages) == 1)
    assert_same_state(*averages)
    close([average.eval()(images()) for average in averages])


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_shallow_copy_runs_unfused_and_may_be_fused() -> None:
    model, plain = pair()
    for name in (BLOCK, "features.transition1", "features", ""):
        twin = copy.copy(model.get_submodule(name))
        assert installed(twin) is None
        assert installed(model.get_submodule(name)) is not None
    block, x = model.get_submodule(BLOCK), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    twin, wanted = copy.copy(block), copy.copy(plain.get_submodule(BLOCK))
    for shallow in (twin, wanted):  # children are the copy's own to take away, as in any module
        shallow._modules = dict(shallow._modules)
        del shallow._modules["denselayer2"]
    close([twin(x), wanted(x)])
    close([block(x), plain.get_submodule(BLOCK)(x)])
    dx.fuse(twin)
    close([twin(x), wanted(x)])
    assert installed(twin) is not installed(block) and rows(twin)[""].fused
    assert_same_state(block, plain.get_submodule(BLOCK))


def test_a_class_with_a_state_of_its_own() -> None:
    module = dx.fuse(net()).get_submodule(BLOCK)
    kind = type("Noting", (type(module),), {"__getstate__": lambda self: {**self.__dict__, "noted": True}})
    module.__class__ = kind
    assert copy.copy(module).noted and copy.deepcopy(module).noted
    assert installed(copy.copy(module)) is None and installed(copy.deepcopy(module)) is not None


def test_a_fused_block_in_another_model() -> None:
    model, plain = pair()
    block = model.features.denseblock1
    other = nn.Sequential(block, nn.BatchNorm2d(16).double())
    del model
    close(
        [
            other[0](images()[:, :1].expand(-1, 8, -1, -1)),
            plain.features.denseblock1(images()[:, :1].expand(-1, 8, -1, -1)),
        ]
    )
    del block, other


# ---- how gradients are asked for -------------------------------------------------------------------------------------


def test_gradient_accumulation() -> None:
    models = pair()
    for model in models:
        for i in range(3):
            (model(images() + i).square().mean() / 3).backward()
    assert_same_gradients(*models)
    assert_same_state(*models)


def test_gradients_of_some_inputs_and_backward_into_some() -> None:
    found = []
    for model in pair():
        x = images().requires_grad_()
        wanted = [x, layer(model).conv2.weight, model.features.transition1.norm.bias]
        loss = model(x).square().mean()
        found.append(torch.autograd.grad(loss, wanted, retain_graph=True))
        loss.backward(inputs=wanted[1:2])
        assert layer(model).conv1.weight.grad is None
        found[-1] += (wanted[1].grad,)
    close(found)


def test_hooks_on_parameters() -> None:
    models, seen = pair(), []
    for model in models:
        layer(model).conv1.weight.register_hook(lambda grad: grad * 2)
        layer(model).norm1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        model(images()).square().mean().backward()
    assert_same_gradients(*models)
    close(seen)


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_double_backward(save: str) -> None:
    models = dx.fuse(net(), save=save), net()
    found = []
    for model in models:
        x = images().requires_grad_()
        grads = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        found.append(x.grad)
    close(found)
    assert_same_gradients(*models)


def test_hessian_vector_products() -> None:
    x = images()
    close([torch.autograd.functional.hvp(lambda x, m=m: m(x).square().sum(), x, x)[1] for m in pair()])


def test_functional_gradients_in_training() -> None:
    found = []
    for model in pair():
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(parameters: Any, buffers: Any, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, (parameters, buffers), (images(),)).square().sum()

        found.append((torch.func.grad(loss)(parameters, buffers), buffers))
    close(found)
    assert found[0][1]["features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 1


def test_per_sample_gradients_in_training_are_refused_as_eagers() -> None:
    messages = []
    for model in pair():
        with pytest.raises(RuntimeError) as caught:
            torch.func.vmap(lambda image, model=model: model(image[None]))(images())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_anomaly_mode_names_the_place() -> None:
    models = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly mode is slow
        with torch.autograd.detect_anomaly():
            for model in models:
                model(images()).square().mean().backward()
            assert_same_gradients(*models)
            with torch.no_grad():
                layer(models[0]).conv1.weight[0, 0] = float("nan")
            with pytest.raises(RuntimeError, match="returned nan values"):
                models[0](images()).square().mean().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", [BLOCK, "features", ""])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradient_checkpointing(around: str, reentrant: bool, drop_rate: float) -> None:
    """Statistics move twice, as in eager (pytorch #96136): that is the checkpoint's doing, not ours."""
    models = dx.fuse(net(drop_rate=drop_rate)), net(drop_rate=drop_rate)
    if drop_rate > 0:  # another draw than eager's: compare with the fused network without checkpoint
        models = models[0], copy.deepcopy(models[0])
    for model in models:
        torch.manual_seed(5)
        if drop_rate == 0 or model is models[0]:
            module = model.get_submodule(around)
            inner = module.forward
            module.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)  # type: ignore[method-assign]
        model(images().requires_grad_()).square().mean().backward()
    assert_same_gradients(*models)
    if drop_rate == 0:
        assert_same_state(*models)
        assert int(layer(models[0]).norm1.num_batches_tracked) == 2


def test_checkpoint_of_a_fused_module_called_from_outside() -> None:
    models = pair()
    for model in models:
        checkpoint(model, images().requires_grad_(), use_reentrant=False).square().mean().backward()
    assert_same_gradients(*models)
    assert_same_state(*models)


def test_saved_tensors_on_the_cpu() -> None:
    models = pair()
    for model in models:
        with torch.autograd.graph.save_on_cpu():
            out = model(images())
        out.square().mean().backward()
    assert_same_gradients(*models)


def test_inference_mode_and_no_grad() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        models = pair()
        with mode():
            close([model(images()) for model in models])
            close([model.eval()(images()) for model in models])
        assert_same_state(*models)


# ---- export ----------------------------------------------------------------------------------------------------------


def test_an_exported_program_takes_other_batches_and_loads_again() -> None:
    model = dx.fuse(net()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for n in (2, 5):
        torch.testing.assert_close(again(images(n)), model(images(n)))
    assert all(row.fused for row in dx.report(model))


def test_export_in_training_has_gradients_and_moves_statistics() -> None:
    models = [torch.export.export(model, (images(),)).module() for model in pair()]
    for model in models:
        model(images()).square().mean().backward()
    assert_same_state(*models)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
