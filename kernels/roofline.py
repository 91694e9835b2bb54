"""Occupancy of a compiled kernel, work of a launch, and the least time that work can take: arithmetic, no measurement.

    blocks    = min over registers, shared memory, tensor memory, warps and block slots of what one processor holds
    roof      = max(matmul FLOPs / matrix rate, fp32 operations / fp32 rate, special functions / their rate,
                    bytes / bandwidth)
    predicted = roof * ceil(waves) / waves,   waves = programs / (processors * blocks)

The rates are the peaks of datasheets, which no kernel reaches; every operand counts once, as if caches were perfect;
what overlaps, overlaps wholly. So `roof` is a bound from below. `predicted` adds that the last wave of programs leaves
processors idle, each program being given an even share of the machine. Neither is a measurement.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .tuning import ARCHS, Arch, Specialization, row_splits, slice_width, tiles_per_program


@dataclass(frozen=True)
class Board:
    """The usual board of an architecture; a processor is an SM or a compute unit, a warp there a wavefront.

    Fields:
        arch: how many processors it has, and how much shared memory one program gets.
        matrix_rate, fp32_rate: dense FLOP/s of 16-bit matrix units; of fp32 outside of them (tf32 is never used).
        fp32_per_clock: FLOPs of a processor behind fp32_rate, which gives the clock.
        bandwidth: bytes/s of device memory.
        warps, blocks: most that a processor holds; lone_blocks: blocks of one warp, where more of those fit.
        shared_reserved: bytes of shared memory that each block takes beside what it asked for, in steps of shared_step.
        tensor_memory: columns of accumulators a processor has beside its registers.
    """

    name: str
    arch: Arch
    matrix_rate: float
    fp32_rate: float
    fp32_per_clock: int
    bandwidth: float
    warps: int = 64
    blocks: int = 32
    lone_blocks: int = 32
    shared_reserved: int = 1024
    shared_step: int = 128
    tensor_memory: int = 0

    @property
    def processors(self) -> int:
        """How many."""
        return self.arch.num_sms

    @property
    def shared_memory(self) -> int:
        """Bytes that a processor has for blocks: one may have all of them, less the system's share."""
        return self.arch.shared_memory + self.shared_reserved

    @property
    def special_rate(self) -> float:
        """Exponentials, logarithms and reciprocals a second: 16 a clock and processor on all of these boards."""
        return self.fp32_rate / self.fp32_per_clock * 16


# Rates: NVIDIA A100 80GB SXM datasheet (2021), H200 SXM datasheet (2024) and HGX B200 datasheet (2025), dense, half of
# what they print with sparsity; AMD Instinct MI300X data sheet (2023). The MI300X's fp32 matrix units give its vector
# rate. Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and "Arithmetic
# Instructions"; the steps of allocation from CUDA's cuda_occupancy.h; PTX ISA, "Tensor Memory"; AMD CDNA 3 ISA guide;
# LLVM's AMDGPUBaseInfo, "getMaxWorkGroupsPerCU": a workgroup of several waves holds one of 16 barriers.
BOARDS = {
    board.arch.name: board
    for board in (
        Board("A100 80GB SXM", ARCHS["sm_80"], 312e12, 19.5e12, 128, 2.039e12),
        Board("H200 SXM", ARCHS["sm_90"], 989e12, 67e12, 256, 4.8e12),
        Board("B200 SXM", ARCHS["sm_100"], 2250e12, 75e12, 256, 7.7e12, tensor_memory=512),
        Board(
            "MI300X", ARCHS["gfx942"], 1307.4e12, 163.4e12, 256, 5.3e12,
            warps=32, blocks=16, shared_reserved=0, shared_step=512,
        ),
    )
}  # fmt: skip

# A processor has four partitions; each has 512 registers for every lane of a warp, handed out in eights. That is 65,536
# in units of 256 a warp on NVIDIA, and 512 vector registers a SIMD on CDNA 3.
PARTITIONS, LANE_REGISTERS, REGISTER_STEP = 4, 512, 8


@dataclass(frozen=True)
class Occupancy:
    """Programs that a processor holds at once, their warps as a fraction of the most, and what allows no more."""

    blocks: int
    fraction: float
    limit: str


def occupancy(board: Board, *, registers: int, shared: int, tensor_memory: int, warps: int) -> Occupancy:
    """Occupancy of a program with so many registers a thread, bytes of shared memory, columns and warps."""
    registers = max(registers, 1)
    limits = {
        "warps": board.warps // warps,
        "block slots": board.lone_blocks if warps == 1 else board.blocks,
        "registers": LANE_REGISTERS // _up(registers, REGISTER_STEP) * PARTITIONS // warps,
    }
    if shared + board.shared_reserved:
        limits["shared memory"] = board.shared_memory // _up(shared + board.shared_reserved, board.shared_step)
    if tensor_memory:
        limits["tensor memory"] = board.tensor_memory // tensor_memory
    limit = min(limits, key=limits.get)
    return Occupancy(limits[limit], limits[limit] * warps / board.warps, limit)


def _up(value: int, step: int) -> int:
    return math.ceil(value / step) * step


# The launches that the table is about, where a specialisation does not say otherwise (Specialization.sizes).
ROWS = (8192, 1024)
REFERENCE = {"D": 4096, "V": 128_256}
# Of a slice's gradient in the cut body's backward: the default where device memory is 128 GiB or more.
WORKSPACE_BYTES = 512 << 20

# What each pointer or descriptor leads to, as a product of sizes: N rows, D hidden, V vocabulary, R rank, P parts of
# the vocabulary, Q sums that the programs of a split row leave, B blocks of such rows, T tiles of N x V, S segments,
# G groups, C chains, A counters of who has arrived; "" is a single number.
EXTENTS = {
    "NV": ("logits", "out", "slice"),
    "ND": ("hidden",),
    "VD": ("weight",),
    "NR": ("low",),
    "VR": ("low_weight",),
    "V": ("bias",),
    "N": (
        "labels", "logp", "logps", "lse", "entropy", "top1", "mean", "collision", "grad_logp", "grad_entropy",
        "ref_logps", "token_weight", "g", "chain_of_token",
    ),
    "PN": ("max", "sum", "label", "dot", "total"),
    "QN": ("parts",),
    "T": ("kept", "tiles"),
    "S": ("segment_start", "segment_end", "scale", "target", "score", "u"),
    "G": ("group_offsets", "margin", "group_weight", "value"),
    "C": ("chain_offsets", "chain_tokens"),
    "B": ("row_arrived",),
    "A": ("arrived",),
    "": ("grad_scale", "count"),
}  # fmt: skip
EXTENT_OF = {pointer: extent for extent, pointers in EXTENTS.items() for pointer in pointers}
# The sparse product's other operands, by what it makes: rows are added to a sum, which is read and written.
ROWS_PRODUCT = {"other": ("VD",), "out": ("ND", "ND")}
COLUMNS_PRODUCT = {"other": ("ND",), "out": ("VD",)}

# Additions, multiplications and comparisons of a logit, without options: forward scales, compares, subtracts, goes to
# base 2 and adds; backward scales, subtracts, goes to base 2, multiplies twice and adds the label's share.
FORWARD_OPS, BACKWARD_OPS = 5, 6
# Of a row and operand of the tail, two-sum included; of a row and part when parts are folded.
TAIL_OPS, COMBINE_OPS = 10, 6


@dataclass(frozen=True)
class Work:
    """What one launch has to do, at least."""

    programs: int
    bytes: int
    matmul_flops: int
    fp32_ops: int
    special: int

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.matmul_flops + self.fp32_ops + self.special


# Kernels that see a slice of the vocabulary, and the argument that holds its gradient.
SLICED = {"lm_head_dlogits_kernel": "out_ptr", "sparse_product_kernel": "slice_ptr"}


def launch_sizes(spec: Specialization, arch: Arch, N: int) -> dict[str, int]:
    """Sizes of the reference launch over N rows, by the letters of EXTENTS."""
    constants, name = spec.constexprs, kernel_name(spec)
    sizes = {"N": N, **REFERENCE, "P": 1, "T": 1, "S": 1, "G": 1, "C": 1} | dict.fromkeys("RQBA", 0) | spec.sizes
    N, D, V = sizes["N"], sizes["D"], sizes["V"]
    if name.startswith(("row_softmax", "fused_logits")):
        splits = row_splits(N, V, spec.config, arch)
        if splits > 1:
            blocks = math.ceil(N / spec.config.block_n)
            sizes |= {"P": splits, "Q": 2 * splits, "B": blocks, "A": blocks}
    if name in ("lm_head_forward_kernel", "lm_head_combine_kernel"):
        tiles = math.ceil(V / spec.config.block_v)
        sizes["P"] = math.ceil(tiles / tiles_per_program(N, D, V, spec.config, arch))
    if name in SLICED:
        sizes["V"] = slice_width(N, V, spec.config, _itemsize(spec.signature[SLICED[name]]), WORKSPACE_BYTES)
        sizes["T"] = math.ceil(N / spec.config.block_n) * (sizes["V"] // spec.config.block_v)
    if "LINK" in constants:
        members = constants["BLOCK_K"]
        sizes["S"] = max(members, N // sizes.pop("segment_rows"))
        sizes["G"] = sizes["S"] // members
        sizes["C"] = 1 if constants["PREFIX"] else sizes["G"]
        sizes["A"] = sizes["C"]
    return sizes


def work(spec: Specialization, arch: Arch, N: int) -> Work:
    """Work of a specialisation's reference launch over N rows; a filter is taken to keep everything.

    Raises:
        ValueError: the kernel, or one of its pointers, is not known here.
    """
    sizes, constants = launch_sizes(spec, arch, N), spec.constexprs
    N, D, V, R, P = (sizes[name] for name in "NDVRP")
    logits, product = N * V, 2 * N * (D + R) * V
    row_blocks = math.ceil(N / constants.get("BLOCK_N", N))
    softcap = 2 if constants.get("HAS_SOFTCAP") else 0  # tanh: an exponential and a reciprocal
    forward, backward = ((ops * logits, (1 + softcap) * logits) for ops in (FORWARD_OPS, BACKWARD_OPS))
    match kernel_name(spec):
        case "row_softmax_forward_kernel":
            found = row_blocks * P, 0, *forward
        case "row_softmax_backward_kernel":
            found = row_blocks * P, 0, *backward
        case "fused_logits_forward_kernel":
            found = row_blocks * P + sizes["C"], 0, *forward
        case "lm_head_forward_kernel":
            found = row_blocks * P, product, *forward
        case "lm_head_dlogits_kernel":
            found = sizes["T"], product, *backward
        case "lm_head_combine_kernel":
            found = row_blocks, 0, COMBINE_OPS * N * P, N * P
        case "sparse_product_kernel":
            lines = math.ceil((V if constants["OF_COLUMNS"] else N) / constants["TILE_M"])
            found = lines * math.ceil(D / constants["BLOCK_D"]), product, 0, 0
        case "tail_kernel":
            found = sizes["C"], 0, TAIL_OPS * N, sizes["S"]
        case name:
            raise ValueError(f"{name} is unknown to roofline.work: say there what a launch of it does")
    programs, matmul, ops, special = found
    return Work(programs, _bytes(spec, sizes), matmul, ops, special)


def kernel_name(spec: Specialization) -> str:
    """Name of the kernel's Python function."""
    return spec.kernel.fn.__name__


def operands(spec: Specialization) -> Iterator[tuple[str, int]]:
    """Extent and bytes an element of everything that a launch reads or writes."""
    own = {True: COLUMNS_PRODUCT, False: ROWS_PRODUCT}.get(spec.constexprs.get("OF_COLUMNS"), {})
    for argument, kind in spec.signature.items():
        if not kind.startswith(("*", "tensordesc")):
            continue
        name = argument.removesuffix("_ptr")
        if name not in EXTENT_OF and name not in own:
            raise ValueError(f"{kernel_name(spec)}: {argument} is not in roofline.EXTENTS: say there what it leads to")
        for extent in own.get(name) or (EXTENT_OF[name],):
            yield extent, _itemsize(kind)


def _bytes(spec: Specialization, sizes: dict[str, int]) -> int:
    return sum(math.prod(sizes[size] for size in extent) * itemsize for extent, itemsize in operands(spec))


def _itemsize(kind: str) -> int:
    """Bytes of an element of "*bf16" or "tensordesc<bf16[128, 64]>"."""
    return max(8, int(re.search(r"\d+", kind)[0])) // 8


@dataclass(frozen=True)
class Prediction:
    """Times in seconds, what bounds them, and how full the waves of programs are."""

    roof: float
    bound: str
    waves: float

    @property
    def predicted(self) -> float:
        """The roof, and the idle places of the last wave."""
        return self.roof * math.ceil(self.waves) / self.waves


def predict(board: Board, load: Work, held: Occupancy, dtype_bits: int) -> Prediction:
    """Least time of a launch whose matmul, if any, multiplies numbers of so many bits."""
    times = {
        "memory": load.bytes / board.bandwidth,
        "matmul": load.matmul_flops / (board.matrix_rate if dtype_bits == 16 else board.fp32_rate),
        "fp32": load.fp32_ops / board.fp32_rate,
        "special functions": load.special / board.special_rate,
    }
    bound = max(times, key=times.get)
    return Prediction(times[bound], bound, load.programs / (board.processors * held.blocks))
