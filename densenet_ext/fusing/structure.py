"""Which modules could make up a dense layer, a block or a transition: found by their types and by how channels add up.

A layer holds norm and convolution twice (1x1, 3x3), or once (3x3), and besides them at most activations and dropouts.
Layers that follow one another, each taking as many channels as there are once all before it have added theirs, could be
a dense block. Names don't matter, and what ``forward`` does with the modules is not looked at here (``trial``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, normalization
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_ext.units.around import Transition
from densenet_ext.units.block import Block, Drop, Parts
from densenet_ext.units.built import Built, built
from densenet_ext.units.entry import original_class, unit_of
from densenet_ext.units.parts import activates, hook_on, submodule
from densenet_ext.units.reading import know_code

_NORMS = tuple(home.__name__ for home in (batchnorm, instancenorm, normalization))
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

MEMORY_MODES = ("memory_efficient", "efficient", "grad_checkpointing", "use_checkpoint", "with_cp")
"""What layers and blocks call the attribute that switches their own memory saving on."""


class Candidate(NamedTuple):
    """Layers that could be a dense block."""

    block: Block  # as far as it is known without trying it out
    whole: bool  # its module holds nothing else


def is_own_code(module: nn.Module) -> bool:
    """Returns whether what ``module`` does is all in the values that it returns, and not a library's business."""
    # what torch wraps models in (DataParallel, a compiled module) has a meaning beyond the values that it returns
    homes = (cls.__module__ for cls in type(module).__mro__)
    home = next(home for home in homes if not home.startswith("torch.distributed.fsdp"))  # a class that FSDP made
    return original_class(module) in _CONTAINERS or not home.startswith("torch.")


def candidates(module: nn.Module) -> list[Candidate]:
    """Returns the runs of layers among the children of ``module``, or of a container that is its only child."""
    if not is_own_code(module):
        return []
    prefix, holder = "", module
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if len(children) == 1 and isinstance(children[0][1], _CONTAINERS) and parts_of(children[0][1]) is None:
        if unit_of(children[0][1]) is not None:
            return []
        prefix, holder = f"{children[0][0]}.", children[0][1]
        children = [(name, child) for name, child in holder._modules.items() if child is not None]
    found = []
    for names, parts in _runs(children):
        layers = tuple(prefix + name for name in names)
        whole = len(names) == len(children)
        own = ("", *([prefix[:-1]] if prefix else []))
        found.append(Candidate(block_of(module, layers, parts, own if whole else ()), whole))
    return found


def what_else(module: nn.Module, candidate: Candidate) -> str:
    """Returns why a module of dense layers and something else is no dense block."""
    block = candidate.block
    prefix = block.layers[0].rpartition(".")[0]
    holder: Any = submodule(module, prefix)
    prefix = f"{prefix}." if prefix else ""
    names = [prefix + name for name, child in holder._modules.items() if child is not None]
    kinds = [type(submodule(module, name)) for name in names]
    kind = max(kinds, key=kinds.count)
    for name in names:
        other: Any = submodule(module, name)
        if type(other) is not kind:
            return f"{name} {hook_on(other) or f'is a {type(other).__name__}, not a {kind.__name__}'}"
    everything = Block(tuple(names), block.parts, Built((), ()))
    return everything.other_parts(module) or f"its {kind.__name__} modules are not alike"


def block_of(module: nn.Module, layers: tuple[str, ...], parts: Parts, own: Iterable[str]) -> Block:
    """Returns the unit of these layers of ``module``. ``own``: the modules around them that have code of their own."""
    own, names = list(own), [name for name in own if name]
    for layer in layers:
        own += [layer, *(f"{layer}.{name}" for name in parts.between)]
        names.append(layer)
        for part in (*parts.between, *parts.norms, *parts.convs, *parts.activations, *parts.dropouts):
            names += with_children(module, f"{layer}.{part}")
    drops = tuple(Drop(name, "p") for name in parts.dropouts)
    return Block(layers, parts, built(module, dict.fromkeys(names), own, MEMORY_MODES), drops, save="bottlenecks")


def with_children(module: nn.Module, name: str) -> list[str]:
    """Returns the name, and those of the activations inside of a norm."""
    part = submodule(module, name)
    if part is None or not activates(part):
        return [name]
    know_code(type(part))
    return [name, *(f"{name}.{child}" for child, inner in part._modules.items() if inner is not None)]


def transition_of(module: nn.Module) -> Transition | None:
    """Returns ``module`` as a transition, as far as its modules tell; None when it is built otherwise."""
    if not is_own_code(module) or unit_of(module) is not None:
        return None
    names = _by_kind(module)
    if names is None or len(names["norm"]) != 1 or len(names["conv"]) != 1 or len(names["pool"]) > 1:
        return None
    if len(names["activation"]) > 1 or len(names["dropout"]) > 1:
        return None
    norm, conv = submodule(module, names["norm"][0]), submodule(module, names["conv"][0])
    if not isinstance(norm, _BatchNorm) or not isinstance(conv, _ConvNd):
        return None
    if norm.num_features != conv.in_channels or set(conv.kernel_size) != {1}:
        return None
    everything = [name for kind in names.values() for name in kind]
    parts = [inner for name in everything for inner in with_children(module, name)]
    how = built(module, parts, ("", *names["between"]))
    activations, dropouts, pools = (tuple(names[kind]) for kind in ("activation", "dropout", "pool"))
    return Transition(names["norm"][0], names["conv"][0], activations, dropouts, pools, how)


def parts_of(layer: nn.Module) -> Parts | None:
    """Returns the parts of a dense layer, or None when it is not built like one."""
    if not is_own_code(layer) or unit_of(layer) is not None or not layer._modules:
        return None
    names = _by_kind(layer)
    if names is None or names["pool"]:
        return None
    norms, convs = names["norm"], names["conv"]
    if len(norms) != len(convs) or len(convs) not in (1, 2):
        return None
    sizes = [set(conv.kernel_size) for conv in (submodule(layer, name) for name in convs) if isinstance(conv, _ConvNd)]
    if sizes != [{1}, {3}][-len(convs) :] and sizes != [{3}, {1}]:
        return None
    if sizes == [{3}, {1}]:  # in another order than they run in
        convs.reverse()
    norms = _in_order_of(layer, norms, convs)
    kinds = (norms, convs, *(names[kind] for kind in ("activation", "dropout", "between")))
    return Parts(*map(tuple, kinds))


def _in_order_of(layer: nn.Module, norms: list[str], convs: list[str]) -> list[str]:
    first: Any = submodule(layer, convs[0])
    return sorted(norms, key=lambda name: getattr(submodule(layer, name), "num_features", 0) != first.in_channels)


def _by_kind(module: nn.Module) -> defaultdict[str, list[str]] | None:
    """Returns the names of all that ``module`` consists of by kind; None where something is of no known kind."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, inner in _leaves(module, ""):
        kind = _kind_of(inner)
        if kind is None:
            return None
        names[kind].append(name)
    return names


def _kind_of(module: nn.Module) -> str | None:
    """Returns "norm", "conv", "activation", "dropout" or "pool"; "between" for what holds others; None for the rest."""
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, _POOLS):
        return "pool"
    homes = {cls.__module__ for cls in type(module).__mro__}
    if homes.intersection(_NORMS):
        return "norm"
    if activation.__name__ in homes:
        return "activation"
    if dropout.__name__ in homes:
        return "dropout"
    if module._modules or type(module) is nn.Identity:
        return "between"
    # what has neither parameters nor children may be somebody's own activation: it is named where it is another one
    return None if module._parameters or module._buffers else "activation"


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
            if _kind_of(child) == "between":
                yield from _leaves(child, f"{prefix}{name}.")


def _runs(children: list[tuple[str, nn.Module]]) -> Iterator[tuple[list[str], Parts]]:
    """Yields the longest runs of layers that are alike and whose channels add up."""
    run: list[str] = []
    parts: Parts | None = None
    kind, channels = None, 0
    for name, child in [*children, ("", None)]:
        found = None if child is None else parts_of(child)
        if run and (found != parts or type(child) is not kind or _channels(child, found)[0] != channels):
            assert parts is not None
            yield run, parts
            run = []
        if child is not None and found is not None and _fits(child, found):
            run.append(name)
            parts, kind = found, type(child)
            taken, added = _channels(child, found)
            channels = taken + added


def _channels(layer: Any, parts: Parts | None) -> tuple[int, int]:
    """Returns how many features a layer takes and adds."""
    if parts is None:
        return 0, 0
    first: Any = submodule(layer, parts.convs[0])
    last: Any = submodule(layer, parts.convs[-1])
    return first.in_channels, last.out_channels


def _fits(layer: nn.Module, parts: Parts) -> bool:
    convs: list[Any] = [submodule(layer, name) for name in parts.convs]
    norm: Any = submodule(layer, parts.norms[0])
    taken = convs[0].in_channels
    if getattr(norm, "num_features", getattr(norm, "num_channels", taken)) != taken:
        return False  # a norm behind its convolution, as in most networks
    return len(convs) == 1 or convs[1].in_channels == convs[0].out_channels
