"""Captum's attributions and the maps of pytorch-grad-cam are the same for fused models."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.peers.twins import (
    NETS,
    HeadedByModules,
    assert_all_fused,
    images,
    library,
    outcome,
    pair,
    same,
    torchvision_net,
)

EACH = pytest.mark.parametrize("name", NETS)
LAST_NORM = {"torchvision": "features.norm5", "timm": "features.norm5", "monai": "features.norm5"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says which hooks it sets
        yield


def captum() -> Any:
    return library("captum.attr")


def saliency(model: nn.Module, x: Tensor) -> Any:
    return captum().Saliency(model).attribute(x, target=1)


def integrated_gradients(model: nn.Module, x: Tensor) -> Any:
    return captum().IntegratedGradients(model).attribute(x, target=1, n_steps=4, return_convergence_delta=True)


def guided_backprop(model: nn.Module, x: Tensor) -> Any:
    return captum().GuidedBackprop(model).attribute(x, target=1)


def deconvolution(model: nn.Module, x: Tensor) -> Any:
    return captum().Deconvolution(model).attribute(x, target=1)


def occlusion(model: nn.Module, x: Tensor) -> Any:
    return captum().Occlusion(model).attribute(x, target=1, sliding_window_shapes=(3, 16, 16), strides=(3, 16, 16))


def gradient_shap(model: nn.Module, x: Tensor) -> Any:
    np.random.seed(0)
    torch.manual_seed(0)
    return captum().GradientShap(model).attribute(x, baselines=x.flip(0), n_samples=2, target=1)


ATTRIBUTIONS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    made.__name__: made
    for made in (saliency, integrated_gradients, guided_backprop, deconvolution, occlusion, gradient_shap)
}


@EACH
@pytest.mark.parametrize("how", ATTRIBUTIONS)
def test_attributions_of_the_input(name: str, how: str) -> None:
    if how in ("guided_backprop", "deconvolution") and name == "timm":
        pytest.skip("timm's ReLU is a part of its norm: Captum finds it and leaves its hooks on it")
    models = pair(NETS[name]().double().eval())
    assert_all_fused(models[1])
    same(models, lambda model: ATTRIBUTIONS[how](model, images().requires_grad_()))
    assert_all_fused(models[1])  # Captum took its hooks away again


def test_deep_lift() -> None:
    """DeepLift wants each ReLU to be a module of its own that does not work in place."""
    models = pair(HeadedByModules().double().eval())

    def run(model: nn.Module) -> Any:
        return captum().DeepLift(model).attribute(images().requires_grad_(), images().flip(0), target=1)

    same(models, run)


@EACH
@pytest.mark.parametrize("layer", ["last norm", "features.denseblock1", "features.denseblock2", "features"])
def test_captum_grad_cam(name: str, layer: str) -> None:
    path = LAST_NORM[name] if layer == "last norm" else layer

    def run(model: nn.Module) -> Any:
        cam = captum().LayerGradCam(model, model.get_submodule(path))
        return cam.attribute(images(), target=1), captum().LayerActivation(model, model.get_submodule(path)).attribute(
            images()
        )

    same(pair(NETS[name]().double().eval()), run, layout=True)


@pytest.mark.parametrize(
    "layer", ["features.denseblock1.denselayer2", "features.denseblock1.denselayer1.conv2", "features.transition1"]
)
def test_captum_layers_inside_units(layer: str) -> None:
    def run(model: nn.Module) -> Any:
        part = model.get_submodule(layer)
        return (
            captum().LayerActivation(model, part).attribute(images()),
            captum().LayerGradientXActivation(model, part).attribute(images(), target=1),
            captum().LayerConductance(model, part).attribute(images(), target=1, n_steps=3),
        )

    models = pair(torchvision_net().double().eval())
    same(models, run)
    assert_all_fused(models[1])


def test_captum_internal_influence_of_neurons() -> None:
    def run(model: nn.Module) -> Any:
        part = model.features.denseblock1
        return captum().NeuronGradient(model, part).attribute(images(), (0, 1, 1))

    same(pair(torchvision_net().double().eval()), run)


# ---- pytorch-grad-cam ------------------------------------------------------------------------------------------------


def grad_cam(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module pytorch_grad_cam; where OpenCV is missing, what it does here (to scale a map) is PyTorch's."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        stand_in: Any = ModuleType("cv2")
        stand_in.COLORMAP_JET = 2  # a default of an argument
        stand_in.resize = lambda image, size: nn.functional.interpolate(
            torch.from_numpy(image)[None, None], size[::-1], mode="bilinear"
        )[0, 0].numpy()
        monkeypatch.setitem(sys.modules, "cv2", stand_in)
    return library("pytorch_grad_cam")


CAMS = ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM", "EigenGradCAM", "ScoreCAM", "AblationCAM"]


@pytest.mark.parametrize("how", CAMS)
@pytest.mark.parametrize("layer", ["features.norm5", "features.denseblock2", "features.denseblock1.denselayer2"])
def test_grad_cam(how: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "AblationCAM" and "denselayer" in layer:
        pytest.skip("AblationCAM replaces the layer by one that takes no list")
    cams = grad_cam(monkeypatch)

    def run(model: nn.Module) -> Any:
        with getattr(cams, how)(model=model, target_layers=[model.get_submodule(layer)]) as cam:
            maps = cam(images(dtype=torch.float32), targets=[lambda scores: scores[1]] * 2)
        return torch.from_numpy(maps), model(images(dtype=torch.float32))

    models = pair(torchvision_net().eval())
    same(models, run, tolerance=2e-3)
    assert_all_fused(models[1])


def test_guided_backprop_of_grad_cam(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces the model's ReLU modules by others, and puts them back."""
    cams = grad_cam(monkeypatch)

    def run(model: nn.Module) -> Any:
        guided = cams.GuidedBackpropReLUModel(model=model, device=torch.device("cpu"))
        return torch.from_numpy(guided(images(1).requires_grad_(), target_category=1)), model(images())

    same(pair(torchvision_net().double().eval()), run)


@EACH
@pytest.mark.parametrize("layer", ["features.norm5", "features.denseblock2", "features.transition1"])
def test_monai_grad_cam(name: str, layer: str) -> None:
    visualize = library("monai.visualize")

    def run(model: nn.Module) -> Any:
        return visualize.GradCAM(nn_module=model, target_layers=layer)(x=images(1, 64))

    # before a ReLU in place (the last norm's) PyTorch refuses the backward hook that MONAI sets: then it does here, too
    same(pair(NETS[name]().double().eval()), lambda model: outcome(run, model))


def test_hook_on_the_last_norm_by_hand() -> None:
    """The usual forty lines: activations kept by a forward hook, their gradient by a hook on the tensor.

    torchvision's head applies its ReLU in place: what the hook kept is then the activation behind it.
    """

    def run(model: nn.Module) -> Any:
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            kept["activation"] = out
            out.register_hook(lambda grad: kept.__setitem__("gradient", grad))

        handle = model.features.norm5.register_forward_hook(keep)
        model(images())[:, 1].sum().backward()
        handle.remove()
        weights = kept["gradient"].mean((2, 3), keepdim=True)
        return kept, (weights * kept["activation"]).sum(1).relu()

    same(pair(torchvision_net().double().eval()), run, layout=True)
