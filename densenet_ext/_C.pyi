def build_facts() -> dict[str, str]:
    """Strings: compiler, torch, cuda (empty without GPU kernels), cuda_architectures (separated by semicolons)."""

def simd_level() -> str:
    """The SIMD level that the CPU kernels use now: "portable", "avx2" or "avx512"."""

def simd_levels() -> list[str]:
    """The levels that this build has and this processor runs, slowest first."""

def set_simd_level(name: str) -> None:
    """Choose the level; raises ValueError for one that is not in `simd_levels()`."""
