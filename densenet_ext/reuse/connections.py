"""The strength with which each layer of a dense block uses each earlier one, from the weights of any checkpoint.

Source: Huang, Liu, van der Maaten & Weinberger, "Densely Connected Convolutional Networks" (CVPR 2017), section 5,
"Feature Reuse", and figure 5: the absolute weights that connect source s with layer l, summed, over their number.

Blocks are found by their shapes, so that names don't matter: a block is what holds nothing but layers (a 1x1 and a 3x3
convolution, or one convolution larger than 1x1), where each layer reads as many features as there are once all layers
before it have added theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext.errors import UserError

# Where trainers keep the network (Lightning and timm: state_dict), in the order in which they are tried.
_ENTRIES = ("model", "state_dict", "model_state", "model_state_dict", "net", "network")
# Put into the names of what they wrap: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LAYER = re.compile(r"denselayer\d+")
_CLASSIFIES = re.compile(r"class|final|head|logit|score", re.IGNORECASE)

Names = tuple[str, ...]
"""A dotted name's parts."""


@dataclass(frozen=True)
class Connections:
    """One dense block of L layers. Sources are its input and its layers; readers its layers and what comes behind."""

    name: str  # "denseblock1"; "" where the state dict is that of a block
    use: Tensor  # [L + 1, L + 1] or without ``behind`` [L + 1, L], float32: mean |w| of (source, reader); NaN: not read
    features: tuple[int, ...]  # per source: C_0, then what each layer adds
    behind: str | None  # the last reader: "transition", "classifier", or None where no weight reads the whole block
    known: bool  # its layers are called denselayer1, ..., as in the libraries whose layers append

    @property
    def layers(self) -> int:
        """L."""
        return len(self.features) - 1


class Share(NamedTuple):
    """A part of the absolute weights of one or several readers, and the part of the features that they read by it."""

    weight: float
    features: float  # what ``weight`` would be if all weights were equal


class _Layer(NamedTuple):
    path: Names  # of the convolution that reads
    weight: Tensor  # [out, C_l, *kernel]
    new: int  # features that the layer adds

    @property
    def name(self) -> str:
        return ".".join((*self.path, "weight"))


class _Block(NamedTuple):
    path: Names
    layers: list[_Layer]
    known: bool

    @property
    def total(self) -> int:
        return self.layers[-1].weight.shape[1] + self.layers[-1].new


def connections(checkpoint: Mapping[Any, Any], new_first: bool = False) -> list[Connections]:
    """Returns the dense blocks of a state dict, or of the first one inside a dict, in the network's order.

    The weights of a block without bottlenecks are averaged over the kernel, too; 16-bit weights in float32.

    ``new_first``: layers join their features as ``cat([new, x])``. Every library that is known here appends
    (``cat([x, new])``), code of one's own may not, and weights don't tell: whoever wrote ``forward`` has to.

    Raises UserError when there are no dense blocks, when the layers of one don't fit together, or when a weight is
    not a number.
    """
    for held in _state_dicts(checkpoint):
        weights = _weights(held)
        found = list(_blocks(_tree(weights), ()))
        if found:
            behind = _readers_behind(found, weights)
            short = _shortened([block.path for block in found])
            pairs = zip(found, short, behind, strict=True)
            return [_connections(block, name, reader, new_first) for block, name, reader in pairs]
    raise UserError(
        f"the checkpoint has no dense blocks; it holds {', '.join(map(str, list(checkpoint)[:3])) or 'nothing'}"
    )


def shares(block: Connections, readers: Sequence[int]) -> tuple[Share, Share, Share] | None:
    """Returns what falls on the block's input, on older layers and on the layer just before: means over ``readers``.

    Readers are columns of ``block.use``. Those without a layer before them, and those whose weights are all 0, don't
    count; None where no reader does.
    """
    features = torch.tensor(block.features, dtype=torch.float32, device="cpu")
    rows = []
    for reader in readers:
        sizes = features[: reader + 1]
        weight = block.use[: reader + 1, reader] * sizes
        if reader > 0 and weight.sum() > 0:
            rows.append([_thirds(weight), _thirds(sizes)])
    if not rows:
        return None
    first, older, last = torch.tensor(rows, device="cpu").mean(0).T.tolist()
    return Share(*first), Share(*older), Share(*last)


def _thirds(values: Tensor) -> list[float]:
    part = values / values.sum()
    return [float(part[0]), float(part[1:-1].sum()), float(part[-1])]


# ---- the state dict inside a file ------------------------------------------------------------------------------------


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, of ``content`` and then of the dicts inside it, the better known entries first."""
    inner = [content.get(entry) for entry in _ENTRIES] + list(content.values())
    for holder in (content, *(each for each in inner if isinstance(each, Mapping))):
        yield {key: value for key, value in holder.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _weights(state: Mapping[str, Tensor]) -> dict[Names, Tensor]:
    """The weights of convolutions and linear layers, by path without what wrappers put into it."""
    found = {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        if last == "weight" and tensor.dim() in (2, 3, 4, 5) and tensor.is_floating_point():
            found[tuple(part for part in path if part not in _WRAPPERS)] = tensor
    return found


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _tree(weights: Mapping[Names, Tensor]) -> dict[str, Any]:
    """Convolutions' weights in nested dicts, as their modules are nested: {"conv1": {"weight": ...}}."""
    root: dict[str, Any] = {}
    for path, weight in weights.items():
        if weight.dim() > 2:
            node = root
            for part in path:
                node = node.setdefault(part, {})
            node["weight"] = weight
    return root


def _blocks(node: dict[str, Any], path: Names) -> Iterator[_Block]:
    children = {name: child for name, child in node.items() if isinstance(child, dict)}
    known = all(_LAYER.fullmatch(name) for name in children)
    if len(children) > 1 or (children and known):
        layers = [_layer(child, (*path, name)) for name, child in _in_order(children)]
        found = [layer for layer in layers if layer is not None]
        if len(found) == len(layers) and _fit(found):
            yield _Block(path, found, known)
            return
    for name, child in children.items():
        yield from _blocks(child, (*path, name))


def _in_order(children: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """By number where all have one (safetensors sorts names: "10" before "2"), otherwise as in the file."""
    numbers = {name: re.fullmatch(r"(.*?)(\d+)", name) for name in children}
    if len({found[1] if found else name for name, found in numbers.items()}) > 1:
        return list(children.items())
    return sorted(children.items(), key=lambda item: int(found[2]) if (found := numbers[item[0]]) else 0)


def _fit(layers: Sequence[_Layer]) -> bool:
    """Returns whether each layer reads all features of those before it."""
    pairs = zip(layers, layers[1:], strict=False)
    return all(after.weight.shape[1] == before.weight.shape[1] + before.new for before, after in pairs)


def _layer(node: dict[str, Any], path: Names) -> _Layer | None:
    """A layer whose only convolutions are 1x1 and larger in turn, or a single larger one."""
    found = _convolutions(node, path)
    small = [at for at, weight in found.items() if _pointwise(weight)]
    large = [at for at, weight in found.items() if not _pointwise(weight)]
    if len(large) != 1 or len(small) > 1:
        return None
    new = found[large[0]]
    if small and found[small[0]].shape[0] != new.shape[1]:
        return None
    reads = (small or large)[0]
    return _Layer(reads, found[reads], new.shape[0])


def _convolutions(node: dict[str, Any], path: Names) -> dict[Names, Tensor]:
    found: dict[Names, Tensor] = {path: node["weight"]} if "weight" in node else {}
    for name, child in node.items():
        if isinstance(child, dict):
            found |= _convolutions(child, (*path, name))
    return found


def _pointwise(weight: Tensor) -> bool:
    return all(size == 1 for size in weight.shape[2:])


# ---- what comes behind a block ---------------------------------------------------------------------------------------


def _readers_behind(blocks: Sequence[_Block], weights: Mapping[Names, Tensor]) -> list[tuple[Names, Tensor] | None]:
    """Per block the linear layer or 1x1 convolution that reads all its features, if there is one."""
    inside = {layer.path[: len(block.path) + 1] for block in blocks for layer in block.layers}
    free = [at for at, w in weights.items() if _pointwise(w) and not any(at[: len(p)] == p for p in inside)]
    found: dict[int, Names] = {}
    for total in {block.total for block in blocks}:
        waiting = [n for n, block in enumerate(blocks) if block.total == total]
        found.update(_matched(waiting, [at for at in free if weights[at].shape[1] == total], blocks, weights))
    return [(found[n], weights[found[n]]) if n in found else None for n in range(len(blocks))]


def _matched(
    numbers: Sequence[int], readers: Sequence[Names], blocks: Sequence[_Block], weights: Mapping[Names, Tensor]
) -> Iterator[tuple[int, Names]]:
    """Blocks, by number, with ``readers`` of as many features as they have: one for each in order, or those next to it.

    The order is the file's, but for linear layers, which come behind convolutions.
    """
    order = {at: place for place, at in enumerate(weights)}
    readers = sorted(readers, key=lambda at: (weights[at].dim() == 2, order[at]))
    if len(readers) == len(numbers):
        yield from zip(numbers, readers, strict=True)
        return
    starts = [order[block.layers[0].path] for block in blocks] + [len(order)]
    for number in numbers:
        start, end = starts[number : number + 2]
        behind = [at for at in readers if start < order[at] < end] or (readers if len(numbers) == 1 else [])
        if behind:
            yield number, behind[0]


def _shortened(paths: Sequence[Names]) -> list[str]:
    """Names without the parts that all have in common."""
    while len(paths[0]) > 1 and all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [".".join(path) for path in paths]


# ---- the numbers -----------------------------------------------------------------------------------------------------


def _connections(block: _Block, name: str, behind: tuple[Names, Tensor] | None, new_first: bool) -> Connections:
    features = (block.layers[0].weight.shape[1], *(layer.new for layer in block.layers))
    readers = [(layer.name, layer.weight) for layer in block.layers]
    kind = None
    if behind is not None:
        path, weight = behind
        readers.append((".".join((*path, "weight")), weight))
        kind = "classifier" if weight.dim() == 2 or _CLASSIFIES.search(".".join(path)) else "transition"
    use = torch.full((len(features), len(readers)), torch.nan, device="cpu")
    for l, (weight_name, weight) in enumerate(readers):
        use[: l + 1, l] = _mean_per_source(weight_name, weight, features[: l + 1], new_first)
    return Connections(name, use, features, kind, block.known)


def _mean_per_source(name: str, weight: Tensor, features: Sequence[int], new_first: bool) -> Tensor:
    """[sources] of ``weight`` [out, C, *kernel]: the mean of |w| over each source's input channels."""
    per_channel = weight.detach().to("cpu", torch.float32).abs().mean([0, *range(2, weight.dim())])  # [C]
    if not bool(per_channel.isfinite().all()):
        raise UserError(f"{name}: expected numbers, got NaN or infinity: take a checkpoint from before the loss grew")
    sizes = list(features)
    parts = per_channel.split(sizes[::-1] if new_first else sizes)
    return torch.stack([part.mean() for part in (parts[::-1] if new_first else parts)])
