from densenet_ext.units.reading import Entry

def build_facts() -> dict[str, str]:
    """Strings: compiler, torch, cuda (empty without GPU kernels: why_no_cuda says why), cuda_architectures (by ";")."""

def simd_level() -> str:
    """The SIMD level that the CPU kernels use now: "portable", "avx2" or "avx512"."""

def simd_levels() -> list[str]:
    """The levels that this build has and this processor runs, slowest first."""

def set_simd_level(name: str) -> None:
    """Choose the level; raises ValueError for one that is not in `simd_levels()`."""

def why_no_kernel() -> str | None:
    """Why the kernels do not run on the current GPU, or None when they do. Only in builds with GPU kernels."""

def kept_hold(kept: int) -> bool:
    """The operation of this name, without the time that a call through the dispatcher takes."""

class Record:
    """What dictionaries hold, and of which classes objects are; in Python `units.reading.Record`."""

    def __init__(
        self, entries: list[Entry], typed: list[tuple[object, type]], absent: object, identical: bool
    ) -> None: ...
    def holds(self) -> bool:
        """Whether they hold it still."""

class Records:
    """Several records, and tensors that are kept, looked at as one."""

    def __init__(self, records: list[Record], kept: int) -> None:
        """kept: the number of the tensors."""

    def hold(self) -> bool:
        """Whether the records hold, and the tensors have the dtype, the device, the sizes and the strides they had."""
