"""Launch configurations: pure functions of shape, dtype and architecture, fixed by default.

The tables hold what compiles without spills and within shared memory on each architecture (tests/test_aot.py
compiles every entry). PREFKERN_AUTOTUNE=1 opens a timed search over `neighbours` of the table's entry instead, once
per kernel, architecture, dtype and shape (N rounded up to a power of two, so that lengths do not repeat it).
"""

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Arch:
    """A kind of processor: `name` is sm_90, gfx942, ... or "interpreter"; shared memory in bytes per program."""

    name: str
    shared_memory: int
    num_sms: int

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def target(self) -> GPUTarget:
        """What triton compiles for."""
        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)


# Opt-in shared memory of one program and the processor count of the usual board.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 163 * 1024, 108),
        Arch("sm_90", 227 * 1024, 132),
        Arch("sm_100", 227 * 1024, 148),
        Arch("gfx942", 64 * 1024, 304),
    )
}


def arch_of(device: torch.device) -> Arch:
    """The architecture of a device; of the interpreter where kernels are interpreted."""
    return _interpreter() if triton.knobs.runtime.interpret else _arch_of(device)


def _interpreter() -> Arch:
    return Arch("interpreter", 1 << 30, 1)


@functools.cache
def _arch_of(device: torch.device) -> Arch:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Arch(properties.gcnArchName.split(":")[0], 64 * 1024, properties.multi_processor_count)
    name = f"sm_{properties.major}{properties.minor}"
    return Arch(name, properties.shared_memory_per_block_optin, properties.multi_processor_count)


def on_its_device(launcher: Callable) -> Callable:
    """Decorator: launch on the device of the first argument. Triton itself launches on whichever is current."""

    @functools.wraps(launcher)
    def launch(tensor: torch.Tensor, *args, **kwargs):
        with torch.cuda.device_of(tensor):
            return launcher(tensor, *args, **kwargs)

    return launch


def require_dot_dtype(dtype: torch.dtype) -> None:
    """Raise rather than let the interpreter multiply bf16 matrices: its tl.dot returns garbage on them."""
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        raise TypeError("kernels with a matmul cannot be interpreted in bfloat16: use float32 or float16")


MAX_ROW_SPLITS = 16
# Threads of a row program, and the bytes that one of them loads and stores at a time: four pieces of 16.
_ROW_THREADS, _THREAD_BYTES = 256, 64


@dataclass(frozen=True)
class RowConfig:
    """block_n rows a program, read block_v columns at a time; each row keeps so many lanes of running sums."""

    block_n: int
    block_v: int
    lanes: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class HeadConfig:
    """Matmul tile of (block_n, block_v), summed block_d at a time; group_n row blocks share the L2 cache.

    per_sm: programs that one processor's registers and shared memory hold at once.
    tma: tiles are fetched by the copy engine (sm_90 and later) and not by loads.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 16
    per_sm: int = 1
    tma: bool = False


Config = TypeVar("Config", RowConfig, HeadConfig)


def row_config(V: int, dtype: torch.dtype, arch: Arch, *, writes: bool) -> RowConfig:
    """Row kernels, of which some write as much as they read; short rows share a program."""
    if arch.name == "interpreter":
        # Its cost is the number of programs, not their size.
        block_v = min(triton.next_power_of_2(V), 512)
        return RowConfig(2**15 // block_v, block_v, lanes=1, num_warps=1)
    thread_bytes = _THREAD_BYTES // 2 if writes else _THREAD_BYTES
    block_v = min(triton.next_power_of_2(V), _ROW_THREADS * thread_bytes // dtype.itemsize)
    num_warps = _ROW_THREADS // arch.warp_size
    if block_v * dtype.itemsize < _ROW_THREADS * thread_bytes:
        # At most as many rows as one warp writes the results of: on AMD a barrier does not wait for another's stores.
        return RowConfig(min(32, max(1, 1024 // block_v)), block_v, lanes=1, num_warps=num_warps // 2)
    return RowConfig(1, block_v, _ROW_THREADS, num_warps)


def row_splits(N: int, V: int, config: RowConfig, arch: Arch) -> int:
    """Parts that every row is cut into, one program each; at most MAX_ROW_SPLITS, and 1 where there are many rows.

    Enough that few rows still fill the chip, by parts of a tile or more; and by parts of four tiles or more, enough
    that a last wave of programs that is not full costs little.
    """
    tiles = triton.cdiv(V, config.block_v)
    if arch.name == "interpreter":
        return min(2, tiles)
    splits, blocks = 1, triton.cdiv(N, config.block_n)
    for wanted, least_tiles in ((_FILLED * arch.num_sms, 1), (_EVEN * arch.num_sms, 4)):
        while blocks * splits < wanted and 2 * splits * least_tiles <= tiles and splits < MAX_ROW_SPLITS:
            splits *= 2
    return triton.cdiv(tiles, triton.cdiv(tiles, splits))  # none of them empty


# Row programs a processor: what keeps its share of the memory busy, and what evens out the last of them.
_FILLED, _EVEN = 3, 32


def can_bulk_copy(matrix: torch.Tensor) -> bool:
    """Whether the copy engine takes tiles of it: rows of unit stride that start at multiples of 16 bytes, in order."""
    (rows, cols), (stride, unit) = matrix.shape, matrix.stride()
    aligned = stride * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    return aligned and unit == 1 and stride >= cols > 0 and rows > 0


def head_config(
    N: int, dtype: torch.dtype, arch: Arch, *, bare: bool, bulk_copies: bool, gradient: bool = False, bias: bool = True
) -> HeadConfig:
    """Matmul kernels, which keep one (block_n, block_v) fp32 tile, and what they make of it, in registers.

    A tile of 128 x 256 asks a third less of the L2 cache for each product than two of 128 x 128, where it fits.

    bare: they make little of it: no softcap, entropy, mean or filter.
    bulk_copies: `can_bulk_copy` of both operands.
    gradient: whether they differentiate the tile and write it, instead of folding it into row sums.
    bias: whether one is added to it.
    """
    if arch.name == "interpreter":
        return HeadConfig(128, 256, 64, num_warps=1, num_stages=1, group_n=2)
    if dtype == torch.float32:  # IEEE products: no tensor cores, so small tiles that leave registers for the operands
        return HeadConfig(64, 128, 16, num_warps=8, num_stages=2)
    if arch.name.startswith("gfx"):
        if bare and N <= _FEW_ROWS:
            return HeadConfig(64, 128, 64, num_warps=4, num_stages=2, per_sm=2)
        if bare:
            return HeadConfig(128, 256, 32, num_warps=8, num_stages=2)
        return HeadConfig(128, 128, 64, num_warps=8, num_stages=2)
    if arch.shared_memory < ARCHS["sm_80"].shared_memory:  # consumer boards
        return HeadConfig(128, 128, 32, num_warps=8, num_stages=2)
    tma = bulk_copies and arch.name.startswith(("sm_9", "sm_10"))
    if arch.name.startswith("sm_9"):
        bare = bare or not (gradient or bias)
    if bare and N <= _FEW_ROWS and not arch.name.startswith("sm_10"):
        return HeadConfig(64, 128, 64, num_warps=4, num_stages=4, per_sm=2, tma=tma)
    if bare and tma and (gradient or arch.name.startswith("sm_9")):
        return HeadConfig(128, 256, 64, num_warps=8, num_stages=4, tma=tma)
    return HeadConfig(128, 128, 64, num_warps=8, num_stages=4 if tma else 3, tma=tma)


# Up to here the head is bound by reading the weight: a tile of half the height, for more programs and loads in flight.
_FEW_ROWS = 64


# The cost of a tile in units of one step over block_d, as a model: what follows its product, and a program's start.
_TILE_STEPS, _PROGRAM_STEPS = 4, 8
# The parts of the row sums may take this, 20 bytes a row and part, or what the L2 cache asks for.
_PARTS_BYTES = 8 << 20


def tiles_per_program(N: int, D: int, V: int, config: HeadConfig, arch: Arch) -> int:
    """Vocabulary tiles that one program of the forward folds: few enough that few rows fill the chip, and evenly.

    The programs that run at once shall be of group_n row blocks at most, whose hidden states the L2 cache holds, so
    the vocabulary is cut into parts for the others. Of 1, 2, ... waves of programs, with as many parts as they have
    room for, the cheapest is taken, the first of equals: a last wave that is nearly empty costs as much as a full one.
    """
    tiles, row_blocks = _ceil(V, config.block_v), _ceil(N, config.block_n)
    if arch.name == "interpreter":
        return min(2, tiles)
    slots = arch.num_sms * config.per_sm
    steps = _ceil(D, config.block_d) + _TILE_STEPS
    least = min(tiles, max(1, slots // min(row_blocks, config.group_n)))
    most = min(tiles, max(least, _PARTS_BYTES // (20 * N)))
    first = _ceil(row_blocks * least, slots)
    best = None
    for waves in range(first, first + 16):
        each = _ceil(tiles, max(least, min(most, waves * slots // row_blocks)))
        cost = _ceil(row_blocks * _ceil(tiles, each), slots) * (each * steps + _PROGRAM_STEPS)
        best = min(best or (cost, -each), (cost, -each))
    return -best[1]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def combine_block(arch: Arch) -> tuple[int, int]:
    """Parts of the vocabulary, and rows, that one program holds while it adds the parts up."""
    return (32, 1024) if arch.name == "interpreter" else (32, 32)


def slice_width(N: int, V: int, config: HeadConfig, itemsize: int, workspace_bytes: int) -> int:
    """Columns of a slice of the vocabulary in the backward: whole tiles that fit the workspace, evenly shared out."""
    tiles = triton.cdiv(V, config.block_v)
    most = max(1, workspace_bytes // (N * config.block_v * itemsize))
    return triton.cdiv(tiles, triton.cdiv(tiles, most)) * config.block_v


def neighbours(config: Config) -> list[Config]:
    """The configuration and those one step away from it."""
    found = [config]
    for name in ("block_v", "block_d", "num_warps"):
        if hasattr(config, name):
            found += [replace(config, **{name: v}) for v in (getattr(config, name) // 2, getattr(config, name) * 2)]
    found += [replace(config, num_stages=config.num_stages + step) for step in (-1, 1) if config.num_stages + step > 0]
    found += [replace(config, tma=False)] if getattr(config, "tma", False) else []
    return [c for c in found if 1 <= c.num_warps <= 16 and c.block_v >= 16 and getattr(c, "block_d", 16) >= 16]


_best: dict[tuple, Any] = {}


def choose(key: Iterable, config: Config, launch: Callable[[Config], Any]) -> Config:
    """`config`, or under PREFKERN_AUTOTUNE=1 the fastest of its neighbours on this very call.

    `launch` runs the kernel with a configuration and must be repeatable: it may not overwrite its inputs.
    """
    if os.environ.get("PREFKERN_AUTOTUNE") != "1" or triton.knobs.runtime.interpret:
        return config
    key = (*key, config)
    if key not in _best:
        _best[key] = min(neighbours(config), key=lambda c: _milliseconds(c, launch))
    return _best[key]


def _milliseconds(config: Config, launch: Callable[[Config], Any]) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(config))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def register_limit(registers: int, arch: Arch) -> dict[str, int]:
    """Launch option: most registers of a thread. Left alone, ptxas spills a few to fit one more program in."""
    return {"maxnreg": registers} if arch.name.startswith("sm_") else {}


@dataclass(frozen=True)
class Specialization:
    """One kernel with fixed argument types and constants, as the launcher would have it compiled.

    Fields:
        name: what the table shows.
        kernel: the @triton.jit function.
        signature: triton type of each run-time argument: "*bf16", "i64", "i32", "fp32", ... Pointers are taken as
            16-byte aligned unless the kernel does not specialise on it; so are integers listed in `divisible` (strides,
            mostly).
        constexprs: value of each other argument; None for a pointer that is not given, 1 for a unit stride.
        num_warps, num_stages: launch options.
        tensor_cores: whether its matmul has to run on them.
        sizes: of its launch in the committed table, where they are not the reference's, as {"V": 507}; see roofline.py.
        config: what the constants were made of.
        limits: more launch options, of `register_limit`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = field(default=())
    tensor_cores: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    config: RowConfig | HeadConfig | None = None
    limits: dict[str, int] = field(default_factory=dict)


# triton's names of the element types.
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
