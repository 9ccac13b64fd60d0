"""Which tests do not run on a GPU (``--device cuda``), and why: an explicit list, printed at the end of such a run."""

from __future__ import annotations

from tests.support.selection import reason_of

# Pattern of a test's name (selection.py): reason.
LEFT_OUT = {
    "*::*[emulated]": "the GPU's operators over emulated kernels, for tensors of the processor",
    "test_emulation*.py": "executes the GPU kernels on the processor, without a GPU",
    "test_cuda_compiles.py": "compiles for several architectures; `make gpu` keeps ptxas' report of its own build",
    "test_machine_code.py": "reads listings of machine code",
    "test_build.py": "decisions of the build and errors of a machine without torch or compiler; no tensor is computed",
    "test_train*.py": "the command line, its data and its pictures, on the processor",
    "test_benchmarks.py": "arithmetic of the benchmarks and their files, on the processor",
    "test_cpu_benchmarks.py": "the processor's kernels and steps",
    "test_depth_benchmark.py": "the same",
    "test_workloads.py": "the same",
    "test_gpu_benchmarks.py": "arithmetic and files again; `make gpu` runs the benchmarks themselves",
    "test_gpu_kernels.py": "the same",
    "test_docs.py": "the pages show what the processor computes",
    "test_gpu_tool.py": "how `make gpu` runs its stages",
    "test_lost_gpu.py": "runs pytest with a stand-in for a GPU",
    "test_benchmark_tables.py": "the processor's benchmarks, and figures on pages",
    "test_docs_commands.py": "commands as the pages show them, on the processor",
    "test_site.py": "builds the site",
    "test_packaging.py": "what the package is to others; no tensor is computed",
    "test_prepare_venv.py": "the same of `make`",
    "test_sanitize.py": "the same of `make sanitize`",
    "test_import_graph.py": "reads the modules",
    "test_every_function.py": "reads the tests",
    "test_inference.py": "calls that are prepared, which a GPU has no form of",
    "test_workspace.py": "the memory of such calls",
    "test_stretch.py": "such calls, one after the other",
    "test_pack.py": "weights that are kept packed, as the processor's kernels read them",
    "test_packed.py": "the same",
    "test_memory.py::test_inference_needs_the_buffer_and_one_scratch": "counts every temporary, and cuDNN takes "
    "workspaces of its own choice; test_cuda.py measures peaks of whole networks",
    "test_memory.py::test_backward_needs_one_gradient_buffer": "the same",
}


def reason_to_leave_out(nodeid: str) -> str | None:
    """Returns why the test ``nodeid`` does not run on a GPU, or None when it does."""
    return reason_of(nodeid, LEFT_OUT)
