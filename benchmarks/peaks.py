"""What this machine can do at most: multiply-adds, matrix products, copies. Kernels are measured against it."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernels import copy_bandwidth
from benchmarks.stopwatch import Stopwatch
from build_backend.environment import cxx_compiler

SIDES = (1024, 2048)
COPIED = 2**28


class Peaks(NamedTuple):
    """Of the threads that torch has, in one dtype."""

    gemm: float  # flops per second of torch's best product of two large matrices
    copy: float  # bytes per second, read and written, by a copy
    multiply_adds: float | None  # flops per second of nothing but multiply-adds; None where that is not known

    def bound(self, flops: float, moved: float) -> float:
        """Returns the seconds that ``flops`` and ``moved`` bytes take at least, one hidden behind the other."""
        return max(flops / self.gemm, moved / self.copy)


def peaks(dtype: torch.dtype, stopwatch: Stopwatch, sides: tuple[int, ...] = SIDES, copied: int = COPIED) -> Peaks:
    """Measures with the threads that torch has. ``sides``: of the square matrices; ``copied``: bytes."""
    alone = multiply_adds().get(dtype)
    return Peaks(
        max(gemm(dtype, side, stopwatch) for side in sides),
        copy_bandwidth(stopwatch, copied),
        None if alone is None else alone * 1e9 * torch.get_num_threads(),
    )


def gemm(dtype: torch.dtype, side: int, stopwatch: Stopwatch) -> float:
    """Returns flops per second of ``torch.mm`` of two matrices of ``side`` x ``side``, at its best."""
    a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / min(stopwatch.times(lambda: torch.mm(a, b, out=out), 5))


# Twelve chains of multiply-adds, more than the processor's latency; nothing else.
_PEAK = r"""
#include <immintrin.h>
#include <time.h>
#define CHAINS(op, x) asm volatile( \
  op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) \
  :: "v"(x) : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11")
#define FMA(i) "vfmadd231ps %0, %0, %%zmm" #i "\n"
#define DOT(i) "vdpbf16ps %0, %0, %%zmm" #i "\n"
extern "C" double gflops(int bf16) {
  const __m512 zero = _mm512_setzero_ps();
  timespec a, b;
  const int rounds = 1000000;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
  for (int i = 0; i < rounds; ++i)
    if (bf16) CHAINS(DOT, zero); else CHAINS(FMA, zero);
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
  return rounds * 12.0 * 16 * 2 * (bf16 ? 2 : 1) / ((b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec));
}
"""


@functools.cache
def multiply_adds() -> dict[torch.dtype, float]:
    """GFLOP/s of one thread that does nothing but multiply-adds; empty where there is no AVX-512 with bf16."""
    from torch.backends import cpu

    if cpu.get_cpu_capability() != "AVX512" or "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(_PEAK)
        compiler = cxx_compiler() or "c++"
        subprocess.run([compiler, "-O2", "-mavx512f", "-shared", "-fPIC", source, "-o", library], check=True)
        gflops = ctypes.CDLL(str(library)).gflops
    gflops.restype = ctypes.c_double
    return {dtype: max(gflops(bf16) for _ in range(5)) for bf16, dtype in enumerate((torch.float32, torch.bfloat16))}
