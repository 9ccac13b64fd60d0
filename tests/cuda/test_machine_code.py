"""The checks of machine code see what they look for; test_cuda_compiles.py runs them on the GPU kernels'."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cuda import machine_code
from tests.cuda.machine_code import Code

ARCHITECTURES = ("sm_80", "sm_90a")

LISTING = """
	.target	sm_90a
	.section	.text._Z3fooIdEvT_,"ax",@progbits
_Z3fooIdEvT_:
        /*0010*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0020*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0030*/                   STG.E.EF.64 [R2.64+0x8], R4 ;
        /*0040*/             @!UP1 STG.E.U16 [R2.64], R4 ;
        /*0050*/                   STG.E.128 [R2], R4 ;
        /*0060*/                   LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R2], desc[UR4][R6.64], P0 ;
.L_x_1:
        /*0070*/                   LDGDEPBAR ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
	.section	.text._Z3barv,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_reading_a_listing() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    foo, bar = machine_code.read(LISTING)
    assert (foo.name, foo.architecture) == ("foo<double>", "sm_90a")
    assert (bar.name, bar.instructions) == ("bar", Counter({"EXIT": 1}))
    assert foo.widths("STG") == {16: 2, 4: 1, 8: 1, 2: 1} and foo.widths("LDGSTS") == {16: 1}
    assert foo.loops == bar.loops == []
    assert foo.count("STG") == 5 and foo.count("STG.E.128") == 2 and foo.count("LDG") == 0


LOOPS = """
	.target	sm_80
	.section	.text._Z3barv,"ax",@progbits
        /*0000*/                   S2R R1, SR_TID.X ;
.L_x_1:
        /*0010*/                   FADD R0, R1, R2 ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_4:
        /*0070*/                   BRA `(.L_x_4);
"""


def test_reading_loops() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    (bar,) = machine_code.read(LOOPS)
    assert bar.loops == [(0, {"FADD": 1, "BRA": 1}), (1, {"HMMA.16816.F32": 1, "BRA": 2})]


# ---- code in which all holds, and what a fault of each kind makes of it ----------------------------------------------
ARITHMETIC = {
    "bfloat16": ("bfloat16, TensorMath<bfloat16>", "HMMA.16816.F32.BF16"),
    "float16": ("float16, TensorMath<float16>", "HMMA.16816.F32"),
    "tf32": ("float, Tf32Math", "HMMA.1688.F32.TF32"),
}


def right_code(architecture: str) -> list[Code]:
    found = []

    def add(name: str, *instructions: str) -> None:
        found.append(Code(name, architecture, Counter(instructions)))

    copies = ["LDGSTS.E.BYPASS.128.ZFILL"] * 9
    rows = ["STG.E.128"] * 8
    for types, product in ARITHMETIC.values():
        products = [product, "LDSM.16.M88.4"]
        for channels in (64, 96, 128):
            tile = f"bn_relu_conv1x1_tiles<{types}, {channels}"
            add(f"{tile}, false>", *copies, *rows, *products, "STG.E.U16", "LDG.E.U16")
            add(f"{tile}, true>", *copies, *rows, *products, *["STG.E"] * 3, "LDG.E")
        for channels in (64, 96, 128, 192):
            tile = f"bn_relu_conv1x1_backward_tiles<{types}, {channels}"
            add(f"{tile}, false, true, true>", *copies, *rows, *products, "LDG.E.128")
            add(f"{tile}, true, true, true>", *copies, *rows, *products, "STG.E.U16")
            add(f"{tile}, true, false, true>", *copies, *products)
        add(f"bn_relu_conv3x3_tiles<{types}, 32, true>", *copies, *products, "STG.E.64")
        add(f"conv3x3_dgrad_tiles<{types}, true>", *copies, *products, *rows)
        add(f"conv3x3_wgrad_tiles<{types}, 16>", *copies, *products, *["STG.E.64"] * 36)
    for types in ("bfloat16, 8", "float16, 8", "float, 4"):
        for name in ("bn_relu_kernel", "bn_relu_backward_kernel", "feature_grad_kernel", "moments", "backward"):
            add(f"{name}<{types}>", *rows)
        for name in ("bn_relu_backward_reduce_kernel", "complete_gradient"):
            add(f"{name}<{types}>", *rows, "STG.E")
        add(f"forward<{types}>", *rows, "STG.E" if types == "float, 4" else "STG.E.64")
    return found


Change = Callable[[Counter[str]], None]


def all_code(name: str = "", change: Change | None = None) -> list[Code]:
    """Right code of both architectures, with a change to that of the last architecture's kernel of a name."""
    kernels = [kernel for architecture in ARCHITECTURES for kernel in right_code(architecture)]
    if change is not None:
        change([kernel for kernel in kernels if kernel.name == name][-1].instructions)
    return kernels


def check(kernels: Sequence[Code]) -> list[str]:
    return [
        *machine_code.narrow_stores(kernels, ARCHITECTURES),
        *machine_code.local_memory(kernels),
        *machine_code.wrong_products(kernels, ARCHITECTURES),
        *machine_code.missing_copies(kernels, ARCHITECTURES),
    ]


def test_right_code_passes() -> None:
    assert check(all_code()) == []


FORWARD = "bn_relu_conv1x1_tiles<bfloat16, TensorMath<bfloat16>, 128, true>"
FORWARD_ANY = "bn_relu_conv1x1_tiles<bfloat16, TensorMath<bfloat16>, 128, false>"
BACKWARD = "bn_relu_conv1x1_backward_tiles<float, Tf32Math, 128, true, true, true>"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (FORWARD_ANY, lambda c: c.update({"STG.E.128": -5, "STG.E.64": 10}), "3 stores of 16 bytes, not 4"),
        (FORWARD, lambda c: c.update({"STG.E.64": 1}), "narrow stores, by their bytes: {8: 1}"),
        (FORWARD, lambda c: c.update({"STG.E": 1}), "narrow stores, by their bytes: {4: 4}"),
        ("bn_relu_kernel<bfloat16, 8>", lambda c: c.pop("STG.E.128"), "no stores of 16 bytes"),
        ("moments<float, 4>", lambda c: c.update({"STG.E.U8": 1}), "narrow stores, by their bytes: {1: 1}"),
        ("moments<float, 4>", lambda c: c.update({"STL.64": 2}), "2 accesses to local memory"),
        ("moments<float, 4>", lambda c: c.update({"LDL": 1}), "1 accesses to local memory"),
        (FORWARD, lambda c: c.pop("HMMA.16816.F32.BF16"), "no products, not HMMA.16816.F32.BF16"),
        (FORWARD, lambda c: c.pop("LDSM.16.M88.4"), "operands without ldmatrix"),
        (BACKWARD, lambda c: c.update({"HMMA.16816.F32": 1}), "['HMMA.16816.F32', 'HMMA.1688.F32.TF32'], not"),
        (BACKWARD, lambda c: c.update({"LDG.E.128": 2}), "2 loads into registers"),
        (BACKWARD, lambda c: c.pop("LDGSTS.E.BYPASS.128.ZFILL"), "asynchronous copies, by their bytes: {}"),
        (FORWARD, lambda c: c.update({"LDGSTS.E.64": 1}), "asynchronous copies, by their bytes: {16: 9, 8: 1}"),
    ],
)
def test_a_fault_is_named(name: str, change: Change, words: str) -> None:
    sentences = check(all_code(name, change))
    assert sentences and all(sentence.startswith(f"sm_90a {name}: ") for sentence in sentences)
    assert any(words in sentence for sentence in sentences), sentences


def test_a_kernel_of_another_name_leaves_no_check_idle() -> None:
    with pytest.raises(AssertionError, match="no bn_relu_conv3x3_tiles"):
        check([kernel for kernel in all_code() if not kernel.name.startswith("bn_relu_conv3x3")])
    with pytest.raises(AssertionError, match="no "):
        check(right_code("sm_80"))


# ---- the programs ---------------------------------------------------------------------------------------------------
def test_the_toolkits_own_programs_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine_code, "in_wheel", lambda name: Path("wheel") / name)
    assert machine_code.find_programs(tmp_path) == [Path("wheel/cuobjdump"), Path("wheel/nvdisasm")]
    (tmp_path / "bin").mkdir()
    for name in machine_code.PROGRAMS:
        assert machine_code.find_programs(tmp_path) == [Path("wheel/cuobjdump"), Path("wheel/nvdisasm")]
        (tmp_path / "bin" / name).touch(mode=0o755)
    assert machine_code.find_programs(tmp_path) == [tmp_path / "bin" / name for name in machine_code.PROGRAMS]


def test_without_the_programs_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine_code.in_wheel("no-such-program") is None
    monkeypatch.setattr(machine_code, "in_wheel", lambda name: None if name == "nvdisasm" else Path(name))
    assert machine_code.find_programs(tmp_path) is None
