"""Who is measured: our networks and those that people use today, from the same weights and in both memory layouts."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

import densenet_ext as dx
from densenet_ext.errors import UserError
from densenet_ext.vision import import_torchvision

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LEVELS = ("bottlenecks", "features")
PLAIN = "plain"  # the usual formulation, nothing recomputed: what memory is compared with
COMPILED = "torch.compile"
LOOK_ALIKE = "efficient (look-alike)"
_LOOK_ALIKE_FILE = Path(__file__).parent.parent / "tests" / "support" / "lookalikes.py"


class Network(NamedTuple):
    """A DenseNet-BC and the images that it is measured on."""

    name: str
    title: str
    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    num_classes: int
    small_inputs: bool
    batch: int
    image: int  # height and width

    def keywords(self) -> dict[str, Any]:
        """What the three constructors have in common."""
        return {
            "growth_rate": self.growth_rate,
            "block_config": self.block_config,
            "num_init_features": self.num_init_features,
            "num_classes": self.num_classes,
        }


NETWORKS = {
    network.name: network
    for network in (
        Network("bc100", "DenseNet-BC-100 (k = 12)", 12, (16, 16, 16), 24, 10, True, batch=64, image=32),
        Network("densenet121", "DenseNet-121", 32, (6, 12, 24, 16), 64, 1000, False, batch=16, image=224),
        Network("densenet201", "DenseNet-201", 32, (6, 12, 48, 32), 64, 1000, False, batch=16, image=224),
        Network("densenet264", "DenseNet-264", 32, (6, 12, 64, 48), 64, 1000, False, batch=16, image=224),
    )
}


class Contender(NamedTuple):
    """One way to run the network."""

    who: str  # whose network, as the tables name it
    how: str  # its mode: what it saves, or how it is compiled
    layout: str  # key of LAYOUTS: of images and parameters
    ours: bool
    build: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        """One text that tells it from every other contender."""
        return f"{self.who}, {self.how}, {self.layout}"


class Unavailable(RuntimeError):
    """A contender that can't be built here; the message says why."""


def contenders(network: Network, efficient: Path | None = None, compiled: bool = True) -> Iterator[Contender]:
    """Everyone who is measured on ``network``, in both layouts: first ours, then the peers.

    ``efficient`` is a clone of gpleiss/efficient_densenet_pytorch; without it a look-alike of its network stands in.
    torchvision's class has the stem for large images only. torch.compile is given torchvision's network, or else the
    efficient implementation's, with nothing recomputed.
    """

    torchvisions, efficients = "torchvision", "efficient" if efficient else LOOK_ALIKE

    def ours(save: str) -> nn.Module:
        return dx.DenseNet(**network.keywords(), small_inputs=network.small_inputs, save=save)

    def pleiss(recompute: bool) -> nn.Module:
        model = efficient_densenet(efficient)
        return model(**network.keywords(), small_inputs=network.small_inputs, efficient=recompute)

    def torchvision(recompute: bool) -> nn.Module:
        return torchvision_densenet().DenseNet(**network.keywords(), memory_efficient=recompute)

    original, whose = (pleiss, efficients) if network.small_inputs else (torchvision, torchvisions)

    def fused(save: str) -> nn.Module:
        return dx.fuse(original(False), save=save)

    def compiled_original() -> nn.Module:
        model = original(False)
        model.compile()  # in place: the parameters keep their names
        return model

    def each(who: str, how: str, our: bool, build: Callable[..., nn.Module], *args: Any) -> Iterator[Contender]:
        for layout in LAYOUTS:
            yield Contender(who, how, layout, our, functools.partial(build, *args))

    for save in LEVELS:
        yield from each("densenet_ext", save, True, ours, save)
    for save in LEVELS:
        yield Contender(f"fuse({whose})", save, "contiguous", True, functools.partial(fused, save))
    if not network.small_inputs:
        yield from each(torchvisions, PLAIN, False, torchvision, False)
        yield from each(torchvisions, "memory_efficient=True", False, torchvision, True)
    yield from each(efficients, PLAIN, False, pleiss, False)
    yield from each(efficients, "efficient=True", False, pleiss, True)
    if compiled:
        yield Contender(whose, COMPILED, "channels_last", False, compiled_original)


def torchvision_densenet() -> ModuleType:
    """The module torchvision.models.densenet. Raises Unavailable where it can't be imported."""
    return peer("torchvision.models.densenet")


@functools.cache
def peer(name: str) -> ModuleType:
    """The module ``name`` of torchvision or of a library that needs it. Raises Unavailable where it can't be imported.

    Known are torchvision.models.densenet, timm.models.densenet, monai.networks.nets.densenet, torchxrayvision.models.
    """
    try:
        import_torchvision()
    except UserError as error:
        raise Unavailable("torchvision can't be imported") from error
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"{name.partition('.')[0]} can't be imported") from error


@functools.cache
def efficient_densenet(clone: Path | None) -> Callable[..., nn.Module]:
    """The efficient implementation's DenseNet class: of ``clone``, or the tests' look-alike of it.

    Raises Unavailable when the file is not there.
    """
    path = _LOOK_ALIKE_FILE if clone is None else clone / "models" / "densenet.py"
    if not path.is_file():
        raise Unavailable(f"there is no {path.parent.name}/{path.name}")
    spec = importlib.util.spec_from_file_location("benchmarks_efficient_densenet", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Callable[..., nn.Module], module.DenseNet)


def reason(error: BaseException) -> str:
    """The first line of an error, without this machine's paths: it goes into the results."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(?<![\w.])/[^\s'\":,]+", "...", line)[:200]
