"""State dicts of other DenseNets: their names are translated when a state dict is loaded.

`adapt_state_dict` is a ``load_state_dict`` pre-hook for any module that holds dense blocks, at any depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# What nn.DataParallel and torch.compile put in front of the names of the model that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")
# Other spellings of torchvision's names.
_SPELLINGS = (
    # A legal child name until 2018: torchvision's and torchxrayvision's published checkpoints still carry such keys.
    (re.compile(r"(?:^|(?<=\.))(norm|conv)\.([12])(?=\.)"), r"\1\2"),
    # the efficient implementation
    (re.compile(r"(?:^|(?<=\.))norm_final(?=\.)"), "norm5"),
    # MONAI
    (re.compile(r"(?:^|(?<=\.))(denselayer\d+)\.layers(?=\.)"), r"\1"),
    (re.compile(r"(?:^|(?<=\.))class_layers\.out(?=\.)"), "classifier"),
)


def adapt_state_dict(
    module: nn.Module,
    state_dict: MutableMapping[str, Any],
    prefix: str = "",
    local_metadata: Mapping[str, Any] | None = None,
    strict: bool = True,
    missing_keys: list[str] | None = None,
    unexpected_keys: list[str] | None = None,
    error_msgs: list[str] | None = None,
) -> None:
    """Renames the keys of ``state_dict`` that start with ``prefix``, in place, to the names that ``module`` has.

    Understood are a ``module.`` (or ``_orig_mod.``) prefix, dotted layer names (``norm.1.weight``), the names of
    torchvision (also timm's and torchxrayvision's), of the efficient implementation (``norm_final``) and of MONAI
    (``layers.norm1``, ``class_layers.out``), and missing ``num_batches_tracked``, which keep the module's own count.
    The signature is that of ``nn.Module.register_load_state_dict_pre_hook``. Names that fit nothing stay as they are,
    for ``load_state_dict`` to report.

    Raises RuntimeError, before anything is loaded, when a shape differs or when no name fits: this is another network.
    """
    own = dict(_own_tensors(module))
    known = {_usual(name): name for name in own}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        new = name if name in own else _translate(name, known)
        if new != name and prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(key)
    _fill_batch_counts(module, state_dict, prefix)
    _refuse_another_network(module, own, state_dict, prefix)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in tensors if tensor is not None]


def _usual(name: str) -> str:
    """Returns ``name`` as torchvision spells it."""
    for pattern, usual in _SPELLINGS:
        name = pattern.sub(usual, name)
    return name


def _translate(name: str, known: Mapping[str, str]) -> str:
    """Returns the module's own name for ``name``; ``known``: the own names by what torchvision calls them."""
    usual = _usual(name)
    while usual not in known and usual.startswith(_WRAPPERS):
        usual = usual.split(".", 1)[1]
    return known.get(usual, name)


def _fill_batch_counts(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    for path, norm in module.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None:
            path = f"{path}." if path else ""
            if path + "running_mean" in state_dict and path + "num_batches_tracked" not in state_dict:
                count = norm.num_batches_tracked
                # A model on the meta device is about to get its values from the state dict: it has no count to keep.
                state_dict[path + "num_batches_tracked"] = torch.tensor(0) if count.is_meta else count.clone()


def _refuse_another_network(
    module: nn.Module, own: Mapping[str, Tensor], state_dict: Mapping[str, Any], prefix: str
) -> None:
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not given or not own:
        return
    kind = type(module).__name__
    if not any(name in own for name in given):
        names, more = ", ".join(map(repr, list(given)[:3])), ", ..." if len(given) > 3 else ""
        raise RuntimeError(
            f"state_dict: expected the names of this {kind} ({next(iter(own))!r}, ...), and none of the {len(given)} "
            f"names fits: got {names}{more}"
        )
    differing = [
        f"{name}: expected {list(own[name].shape)}, got {list(value.shape)}"
        for name, value in given.items()
        # nn.Module itself lets a tensor of one element stand for a scalar.
        if isinstance(value, Tensor) and name in own and own[name].dim() > 0 and own[name].shape != value.shape
    ]
    if differing:
        facts = _differences(own, given)
        shown = differing[:3] + ([f"... and {len(differing) - 3} more"] if len(differing) > 3 else [])
        raise RuntimeError(
            f"state_dict: of another network than this {kind}"
            + (f": expected {facts[0]}, got {facts[1]}" if facts else "")
            + ". Shapes that differ: "
            + "; ".join(shown)
        )


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, str] | None:
    ours, theirs = architecture(own), architecture(given)
    names = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if not names:
        return None
    expected, got = (", ".join(f"{name}={facts[name]}" for name in names) for facts in (ours, theirs))
    return expected, got


def architecture(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the constructor arguments of a DenseNet, as far as the names and shapes of its state dict tell them."""
    shapes = {_usual(name): tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}
    facts: dict[str, Any] = {}
    first_growth = shapes.get("features.denseblock1.denselayer1.conv2.weight")
    if first_growth is not None:
        facts["growth_rate"] = first_growth[0]
        facts["bn_size"] = first_growth[1] // first_growth[0]
    layers: dict[int, set[str]] = {}
    for name in shapes:
        found = re.match(r"features\.denseblock(\d+)\.denselayer(\d+)\.", name)
        if found:
            layers.setdefault(int(found[1]), set()).add(found[2])
    if layers:
        facts["block_config"] = tuple(len(layers[block]) for block in sorted(layers))
    stem = shapes.get("features.conv0.weight")
    if stem is not None:
        facts["num_init_features"], facts["in_channels"] = stem[:2]
        facts["small_inputs"] = "features.norm0.weight" not in shapes
    classifier = shapes.get("classifier.weight")
    if classifier is not None:
        facts["num_classes"] = classifier[0]
    return facts
