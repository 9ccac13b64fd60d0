"""In which order files run: those that take long come first, so that with several workers none is left with one alone.

A file is a worker's work as a whole (`--dist loadfile`), since its tests share what they have compiled or trained.
"""

from __future__ import annotations

# Seconds of a processor's core that a file takes; others take less than ten, or are quick one by one.
LONGEST = {
    "tests/cuda/test_cuda_compiles.py": 400,  # where the wheel is not there yet; minutes of the compiler
    "tests/cuda/test_emulation_conv1x1.py": 90,  # where the emulated kernels are not compiled yet
    "tests/cuda/test_emulation_machine.py": 60,  # where its faulty kernels are not compiled yet
    "tests/distributed/test_distributed.py": 60,
    "tests/fusing/test_matrix.py": 58,
    "tests/build_backend/test_build.py": 55,  # where there is clang
    "tests/fusing/test_fuse_compile.py": 50,
    "tests/docs/test_docs.py": 45,
    "tests/kernels/test_kernels.py": 45,
    "tests/cuda/test_emulation_operators.py": 32,
    "tests/cuda/test_emulation_conv3x3.py": 30,
    "tests/training/test_train_processes.py": 30,
    "tests/training/test_train_resume.py": 30,
    "tests/algorithm/test_block.py": 26,
    "tests/training/test_train.py": 26,
    "tests/algorithm/test_compile.py": 25,
    "tests/compare/test_train_compare.py": 25,
    "tests/docs/test_docs_commands.py": 20,
    "tests/fusing/test_fuse_generic.py": 19,
    "tests/peers/test_captures.py": 19,
    "tests/peers/test_inputs.py": 19,
    "tests/training/test_train_pictures.py": 18,
    "tests/benchmarks/test_depth_benchmark.py": 15,
    "tests/tools/test_gpu_tool.py": 15,
    "tests/benchmarks/test_gpu_benchmarks.py": 14,
    "tests/memory/test_plan.py": 14,
    "tests/peers/test_hooks.py": 13,
    "tests/algorithm/test_basic_block.py": 12,
    "tests/memory/test_memory.py": 11,
    "tests/support/test_lost_gpu.py": 11,
    "tests/algorithm/test_block_operators.py": 10,
    "tests/build_backend/test_packaging.py": 10,
    "tests/peers/test_changes.py": 10,
    "tests/training/test_train_images.py": 10,
}


def place(nodeid: str) -> int:
    """Returns the place of the test's file: low for one that takes long."""
    return -LONGEST.get(nodeid.partition("::")[0], 0)
