"""The dense block against the usual formulation: values, every gradient, every buffer."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from densenet_ext import kernels, reference
from densenet_ext.algorithm.layout import from_rows, row_pitch
from densenet_ext.algorithm.values import Layer
from tests.support.covering import BACKENDS, pairs
from tests.support.helpers import (
    F64,
    SPATIAL,
    assert_equal,
    buffers,
    clone,
    dense_block,
    generator,
    gradcheck,
    gradients,
    make_input,
    make_layers,
    no_warnings,
    norms_of,
    parameters,
)

LEVELS = ["bottlenecks", "features"]
MODES = {
    "train": True,
    "frozen": False,
    "mixed": [True, False, False, True, True, False],
}


def compare(x: Tensor, layers: list[Layer], save: str = "bottlenecks", tolerance: float = 1e-9, steps: int = 1) -> None:
    """Output, gradients and buffers of ``steps`` calls, against the reference."""
    others = clone(layers)
    inputs, other_inputs = parameters(layers), parameters(others)
    if x.requires_grad:
        inputs, other_inputs = [x, *inputs], [x, *other_inputs]
    for _ in range(steps):
        got, expected = dense_block(x, layers, save), reference.dense_block(x, others)
        assert_equal([got], [expected], tolerance)
        grad = torch.randn_like(expected)
        assert_equal(gradients(got, inputs, grad), gradients(expected, other_inputs, grad), tolerance)
        assert_equal(buffers(norms_of(layers)), buffers(norms_of(others)), tolerance)


@pytest.mark.parametrize(
    ("dims", "mode", "save", "backend"), pairs([1, 2, 3], MODES, LEVELS, BACKENDS), indirect=["backend"], ids=str
)
def test_equals_reference(dims: int, mode: str, save: str, backend: str) -> None:
    compare(
        make_input(2, 5, *SPATIAL[dims]), make_layers(dims=dims, batch=MODES[mode]), save, steps=3 if dims == 2 else 1
    )


@pytest.mark.parametrize(("mode", "save", "backend"), pairs(MODES, LEVELS, BACKENDS), indirect=["backend"], ids=str)
def test_gradcheck(mode: str, save: str, backend: str) -> None:
    layers, x = make_layers(2, 1, 3, 3, batch=MODES[mode]), make_input(2, 2, 3, 2)
    assert gradcheck(lambda *_: dense_block(x, layers, save), [x, *parameters(layers)], backend)


@pytest.mark.parametrize("save", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck(mode: str, save: str) -> None:
    modes = MODES[mode]
    layers = make_layers(2, 2, 3, 2, batch=modes if isinstance(modes, bool) else modes[:4])
    x = make_input(2, 2, 2, 2)
    inputs = [x, *parameters(layers)]
    assert torch.autograd.gradgradcheck(lambda *_: dense_block(x, layers, save), inputs, fast_mode=True)


@pytest.mark.parametrize("save", LEVELS)
def test_gradcheck_with_dropout(save: str, backend: str) -> None:
    layers, x = make_layers(2, 1, 3, 2, drop_rate=0.4), make_input(2, 2, 3, 2)

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return dense_block(x, layers, save)

    inputs = [x, *parameters(layers)]
    assert gradcheck(run, inputs, backend)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


OPTIONS = [
    {"affine": False},
    {"momentum": None},
    {"momentum": 0.7},
    {"tracked": False},
    {"momentum": 1.0, "affine": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kinds_of_norms(options: dict, backend: str) -> None:
    compare(make_input(2, 5, 4, 3), make_layers(**options), steps=3)


def test_a_norm_that_occurs_twice_moves_twice() -> None:
    layers = make_layers()
    layers[2] = layers[2]._replace(norm2=layers[0].norm2, conv2=layers[0].conv2)
    others = clone(layers)
    others[2] = others[2]._replace(norm2=others[0].norm2, conv2=others[0].conv2)
    x = make_input(2, 5, 4, 3)
    got, expected = dense_block(x, layers), reference.dense_block(x, others)
    assert_equal(buffers(norms_of(layers)), buffers(norms_of(others)))
    assert layers[0].norm2.num_batches_tracked.item() == 2
    shared = [layers[0].conv2, layers[0].norm2.weight], [others[0].conv2, others[0].norm2.weight]
    assert_equal(gradients(got, shared[0]), gradients(expected, shared[1]))


def test_running_statistics_move_without_a_new_version() -> None:
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    before = [t._version for t in buffers(norms_of(layers))]
    dense_block(x, layers)
    moved = [now._version - then for now, then in zip(buffers(norms_of(layers)), before, strict=True)]
    assert moved == [0, 0, 1] * 6
    with torch.inference_mode():  # which counts no versions
        dense_block(x, make_layers())


SHAPES = {
    "one pixel": ((3, 5, 1, 1), {}),
    "one image": ((1, 5, 3, 3), {}),
    "primes": ((2, 7, 13, 11), {"k": 3, "b": 5}),
    "k = 12": ((2, 24, 5, 5), {"k": 12, "b": 48}),
    "k = 1": ((2, 3, 4, 4), {"k": 1, "b": 4}),
    "one channel": ((2, 1, 4, 4), {"k": 1, "b": 1}),
    "one layer": ((2, 5, 4, 4), {"count": 1}),
    "50 layers": ((2, 3, 3, 3), {"k": 2, "b": 4, "count": 50}),
    "a row": ((2, 5, 1, 9), {}),
}


@pytest.mark.parametrize(("shape", "save", "backend"), pairs(SHAPES, LEVELS, BACKENDS), indirect=["backend"], ids=str)
def test_odd_shapes(shape: str, save: str, backend: str) -> None:
    size, options = SHAPES[shape]
    compare(make_input(*size), make_layers(size[1], **options), save, tolerance=1e-7)


def test_layers_of_different_width(backend: str) -> None:
    first, second = make_layers(5, 3, 6, 1)[0], make_layers(8, 2, 9, 1)[0]
    compare(make_input(2, 5, 4, 3), [first, second])


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_convolutions_of_different_windows(save: str, backend: str) -> None:
    """5x5 by PyTorch's own on every device, beside 3x3; one weight asks for no gradient, where the others lie."""
    layers = make_layers(5, 3, 7, 4)
    for i, window in ((0, 5), (1, 5), (3, 5)):
        weight = torch.randn(3, 7, window, window, dtype=torch.float64) / 5
        layers[i] = layers[i]._replace(conv2=weight.requires_grad_(i != 1))
    x = make_input(2, 5, 6, 4)
    with torch.no_grad():
        expected = reference.dense_block(x, clone(layers), update=False)
        assert_equal([dense_block(x, clone(layers), save)], [expected], 1e-9)
    got, expected = dense_block(x, layers, save), reference.dense_block(x, layers, update=False)
    asked = [x, *(t for t in parameters(layers) if t.requires_grad)]
    grad = torch.randn_like(expected)
    assert_equal(gradients(got, asked, grad), gradients(expected, asked, grad), 1e-9)


def test_no_layers_and_empty_batch() -> None:
    x = make_input(2, 5, 4, 3)
    assert torch.equal(dense_block(x, []), x)
    for batch in (True, False):
        compare(make_input(0, 5, 4, 3), make_layers(batch=batch))


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 5, 4, 3, dtype=F64),
    "channels_last": lambda: torch.randn(2, 5, 4, 3, dtype=F64).contiguous(memory_format=torch.channels_last),
    "channel slice": lambda: torch.randn(2, 4, 3, 11, dtype=F64).permute(0, 3, 1, 2)[:, 3:8],
    "pixel slice": lambda: torch.randn(2, 9, 3, 5, dtype=F64).permute(0, 3, 1, 2)[:, :, ::2][:, :, :4],
    "permuted": lambda: torch.randn(3, 4, 5, 2, dtype=F64).permute(3, 2, 1, 0),
    "flipped batch": lambda: torch.randn(4, 3, 2, 5, dtype=F64).permute(2, 3, 0, 1),
    "expanded": lambda: torch.randn(1, 5, 1, 3, dtype=F64).expand(2, 5, 4, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_input_and_gradient(layout: str, backend: str) -> None:
    layers = make_layers()
    x = LAYOUTS[layout]().requires_grad_()
    got, expected = dense_block(x, layers), reference.dense_block(x, layers, update=False)
    assert_equal([got], [expected])
    assert got.is_contiguous(memory_format=torch.channels_last)
    inputs = [x, *parameters(layers)]
    grad = torch.cat([LAYOUTS[layout]() for _ in range(3)], 1)[:, :14]
    before = grad.clone()
    assert_equal(gradients(got, inputs, grad, retain_graph=True), gradients(expected, inputs, grad, retain_graph=True))
    assert torch.equal(grad, before), "the incoming gradient is only read"
    for g in (torch.ones((), dtype=F64).expand_as(got), torch.randn(2, 14, 1, 1, dtype=F64).expand_as(got)):
        assert_equal(gradients(got, inputs, g, retain_graph=True), gradients(expected, inputs, g, retain_graph=True))


def test_rows_of_every_layout() -> None:
    pitches = {name: row_pitch(make()) for name, make in LAYOUTS.items()}
    assert pitches["channels_last"] == 5 and pitches["channel slice"] == 11
    assert pitches["contiguous"] is None and pitches["expanded"] is None and pitches["pixel slice"] is None


@pytest.mark.parametrize("save", LEVELS)
def test_only_what_is_asked_for(save: str, backend: str) -> None:
    """Every subset of trainable tensors that a partly frozen net has."""
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    everything = [x, *parameters(layers)]
    expected = gradients(reference.dense_block(x, layers, update=False), everything)
    subsets = [[i] for i in range(len(everything))] + [[0, 9], [4, 16], [13, 14], list(range(7, 19)), [1, 2, 7, 8]]
    for subset in subsets:
        for i, t in enumerate(everything):
            t.requires_grad_(i in subset)
        out = dense_block(x, layers, save)
        assert_equal(gradients(out, [everything[i] for i in subset]), [expected[i] for i in subset])
    for t in everything:
        t.requires_grad_()
    out = dense_block(x, layers, save)
    for subset in subsets:
        got = gradients(out, [everything[i] for i in subset], retain_graph=True)
        assert_equal(got, [expected[i] for i in subset])


def test_two_forwards_before_a_backward_and_retain_graph(backend: str) -> None:
    layers, x, y = make_layers(), make_input(2, 5, 4, 3), make_input(3, 5, 2, 3)
    inputs = parameters(layers)
    first, second = dense_block(x, layers), dense_block(y, layers)
    expected = [gradients(reference.dense_block(t, layers, update=False), inputs) for t in (x, y)]
    assert_equal(gradients(first, inputs, retain_graph=True), expected[0])
    assert_equal(gradients(second, inputs), expected[1])
    assert_equal(gradients(first, inputs), expected[0])
    with pytest.raises(RuntimeError, match="second time"):
        gradients(first, inputs)


def test_output_used_twice_and_seen_between_units(backend: str) -> None:
    layers, more, x = make_layers(), make_layers(14, count=1), make_input(2, 5, 4, 3)
    results = []
    for block in (dense_block, reference.dense_block):
        mine = clone(layers), clone(more)
        middle = block(x, mine[0])
        middle.retain_grad()
        loss = block(middle, mine[1]).square().sum() + middle.sin().sum()
        loss.backward()
        results.append([middle.grad, *(p.grad for p in parameters([*mine[0], *mine[1]]))])
    assert_equal(results[0], results[1])


def test_changing_the_output_before_backward_is_an_error() -> None:
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    out = dense_block(x, layers)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    changed = dense_block(x.detach() * 1, layers)
    with torch.no_grad():
        layers[1].conv1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


def test_output_may_change_where_eager_may() -> None:
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    y = x * 1
    out = dense_block(y, layers)
    y.zero_()  # the block keeps its output, not its input
    assert_equal(gradients(out, [x]), gradients(reference.dense_block(x, layers), [x]))


def test_penalty_on_the_gradient(backend: str) -> None:
    """Double backward that starts from one gradient and ends at every parameter, twice the same weight included."""
    results = []
    layers, x = make_layers(drop_rate=0.3), make_input(2, 5, 4, 3)
    grad = torch.randn(2, 14, 4, 3, dtype=F64, generator=generator(0))
    torch.manual_seed(11)
    torch_seed = torch.randint(2**62, (1,))
    factors = [from_rows(kernels.plain.dropout_factor(torch_seed, i, 24, 3, 0.3, F64), x.shape) for i in range(3)]
    for block, options in ((dense_block, {}), (reference.dense_block, {"factors": factors, "update": False})):
        torch.manual_seed(11)
        (dx,) = gradients(block(x, layers, **options), [x], grad, create_graph=True)
        results.append(gradients(dx.square().sum(), [x, *parameters(layers)], torch.tensor(1.0, dtype=F64)))
    assert_equal(results[0], results[1])


def test_threads_do_not_see_each_other() -> None:
    layers = make_layers(update=False)
    inputs = [make_input(2, 5, 4, 3) for _ in range(4)]
    expected = [gradients(reference.dense_block(x, layers, update=False), [x])[0] for x in inputs]
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = gradients(dense_block(inputs[i], layers), [inputs[i]])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "save", "backend"),
    pairs([torch.float32, torch.bfloat16], LEVELS, BACKENDS),
    indirect=["backend"],
    ids=str,
)
def test_the_same_bits_from_run_to_run(dtype: torch.dtype, save: str, backend: str) -> None:
    layers, x = make_layers(24, 12, 48, dtype=dtype), make_input(4, 24, 9, 9, dtype=dtype)
    grad = torch.randn(4, 60, 9, 9).to(dtype)
    runs = []
    for _ in range(3):
        out = dense_block(x, layers, save)
        runs.append([out, *gradients(out, [x, *parameters(layers)], grad)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_levels_give_the_same_bits(backend: str) -> None:
    """What is computed again equals what was computed, to the last bit."""
    layers, x = make_layers(24, 12, 48, dtype=torch.float32), make_input(4, 24, 9, 9, dtype=torch.float32)
    runs = []
    for save in LEVELS:
        out = dense_block(x, layers, save)
        runs.append([out, *gradients(out, [x, *parameters(layers)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_value_per_channel_is_pytorchs_error() -> None:
    layers, x = make_layers(), make_input(1, 5, 1, 1)
    with pytest.raises(ValueError) as expected:
        nn.BatchNorm2d(5)(x.float())
    with pytest.raises(ValueError) as got:
        dense_block(x, layers)
    assert str(got.value) == str(expected.value)
    compare(x, make_layers(batch=False))


@pytest.mark.parametrize("mode", MODES)
def test_without_gradient_the_same_values(mode: str, backend: str) -> None:
    layers, x = make_layers(batch=MODES[mode]), make_input(2, 5, 4, 3)
    others = clone(layers)
    expected = dense_block(x, others)
    with torch.no_grad():
        got = dense_block(x, layers)
    assert_equal([got, *buffers(norms_of(layers))], [expected, *buffers(norms_of(others))])
    with torch.inference_mode():
        assert_equal([dense_block(x, layers)], [expected])


def test_no_warnings(backend: str) -> None:
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    with no_warnings():
        for t in parameters(layers)[:9]:
            t.requires_grad_(False)
        dense_block(x, layers).sum().backward()
        dense_block(x.detach(), layers, "features").sum().backward()
        with torch.no_grad():
            dense_block(x, layers)


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="save: expected one of 'bottlenecks', 'features', got 'all'"):
        dense_block(make_input(2, 5, 4, 3), make_layers(), "all")
