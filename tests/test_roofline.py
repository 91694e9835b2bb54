"""Occupancy, work and predicted times, against examples worked by hand."""

import math

import pytest
import torch

pytest.importorskip("triton")
from prefkern.kernels import aot, roofline
from prefkern.kernels.roofline import BOARDS, ROWS, Occupancy, Work, launch_sizes, occupancy, predict, work
from prefkern.kernels.tuning import ARCHS

# arch, registers, shared bytes, tensor columns, warps; programs on a processor, and what allows no more.
OCCUPANCIES = [
    # 16 warps of 32 threads in 4 partitions of 512 registers a lane: 32 registers fit the whole 64 warps.
    ("sm_80", 32, 0, 0, 8, 8, "warps"),
    # 40 registers: 12 warps a partition, 48 a processor, 6 programs of 8 warps; 33 take as many as 40.
    ("sm_90", 40, 0, 0, 8, 6, "registers"),
    ("sm_90", 33, 0, 0, 8, 6, "registers"),
    # 255 round up to 256, two warps a partition.
    ("sm_90", 255, 0, 0, 8, 1, "registers"),
    ("sm_90", 255, 0, 0, 4, 2, "registers"),
    # More than 64 warps of 1 would fit, but there are 32 slots.
    ("sm_90", 16, 0, 0, 1, 32, "block slots"),
    # 96 KiB and the system's 1 KiB: two in 228 KiB, one in 164 KiB.
    ("sm_90", 64, 96 * 1024, 0, 4, 2, "shared memory"),
    ("sm_80", 64, 96 * 1024, 0, 4, 1, "shared memory"),
    # 227 KiB is the most that one block may ask for: it fits exactly once.
    ("sm_100", 64, 227 * 1024, 0, 4, 1, "shared memory"),
    # 256 of 512 columns.
    ("sm_100", 64, 1024, 256, 8, 2, "tensor memory"),
    # LLVM's "Occupancy: 4" for 106 vector registers (112 of 512), that is 16 of 32 waves: two programs of 8.
    ("gfx942", 106, 16 * 1024, 0, 8, 2, "registers"),
    ("gfx942", 22, 0, 0, 8, 4, "warps"),
    # Two waves each: 16 programs would be 32 waves, which is also the number of barriers.
    ("gfx942", 22, 32 * 1024, 0, 2, 2, "shared memory"),
    # Waves that are alone need no barrier.
    ("gfx942", 22, 0, 0, 1, 32, "warps"),
]


@pytest.mark.parametrize("arch, registers, shared, columns, warps, blocks, limit", OCCUPANCIES)
def test_occupancy(arch, registers, shared, columns, warps, blocks, limit):
    held = occupancy(BOARDS[arch], registers=registers, shared=shared, tensor_memory=columns, warps=warps)
    assert held == Occupancy(blocks, blocks * warps / BOARDS[arch].warps, limit)


def test_boards_are_the_architectures():
    assert BOARDS.keys() == ARCHS.keys()
    # CUDA's and AMD's tables: shared memory of a processor; one program may have 1 KiB less of NVIDIA's.
    assert [board.shared_memory // 1024 for board in BOARDS.values()] == [164, 228, 228, 64]
    assert BOARDS["sm_90"].special_rate == pytest.approx(132 * 16 * 1.98e9, rel=0.01)  # 16 a clock at 1.98 GHz
    assert BOARDS["sm_80"].special_rate == pytest.approx(108 * 16 * 1.41e9, rel=0.01)
    assert BOARDS["gfx942"].special_rate == pytest.approx(304 * 16 * 2.1e9, rel=0.01)


def spec(name: str, arch: str, dtype: torch.dtype):
    return next(s for s in aot.specializations(ARCHS[arch], dtype) if s.name == name)


def test_work_of_the_row_kernels():
    N, V = 8192, 128_256
    forward = work(spec("row_softmax_forward plain", "sm_90", torch.bfloat16), ARCHS["sm_90"], N)
    # logits in bf16, a label in int64, logp and lse in fp32
    assert forward.bytes == 2 * N * V + (8 + 4 + 4) * N
    assert forward.matmul_flops == 0 and forward.special == N * V
    backward = work(spec("row_softmax_backward plain", "sm_90", torch.float32), ARCHS["sm_90"], N)
    assert backward.bytes == 8 * N * V + (8 + 4 + 4) * N
    short = work(spec("row_softmax_backward plain short", "sm_90", torch.float32), ARCHS["sm_90"], N)
    assert short.bytes == 8 * N * 507 + 16 * N


def test_work_of_the_cut_body():
    arch, N, D, V = ARCHS["sm_80"], 1024, 4096, 128_256
    plain = spec("lm_head_forward plain", "sm_80", torch.bfloat16)
    sizes, forward = launch_sizes(plain, arch, N), work(plain, arch, N)
    assert (sizes["N"], sizes["D"], sizes["V"]) == (N, D, V)
    assert forward.matmul_flops == 2 * N * D * V
    # hidden, weight, labels; maximum, sum and the label's logit of every part
    assert forward.bytes == 2 * (N * D + V * D) + 8 * N + 12 * sizes["P"] * N
    assert forward.programs == N // plain.constexprs["BLOCK_N"] * sizes["P"]
    gradient = spec("lm_head_dlogits plain", "sm_80", torch.bfloat16)
    slice_of_8192 = launch_sizes(gradient, arch, 8192)["V"]
    # 512 MiB hold 32,768 columns of 8,192 rows; four slices of the vocabulary, evenly, are 251 tiles of 128 each.
    assert slice_of_8192 == 251 * 128
    assert work(gradient, arch, 8192).matmul_flops == 2 * 8192 * D * slice_of_8192
    assert work(gradient, arch, 8192).programs == 64 * 251


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", aot.DTYPES.values(), ids=aot.DTYPES)
def test_every_specialization_has_work(arch, dtype):
    for each in aot.specializations(ARCHS[arch], dtype):
        load = work(each, ARCHS[arch], ROWS[0])
        assert min(load.programs, load.bytes, load.flops) > 0, each.name
        assert (load.matmul_flops > 0) == each.tensor_cores or dtype == torch.float32, each.name


def test_unknown_kernels_and_pointers_are_named(monkeypatch):
    plain = spec("row_softmax_forward plain", "sm_90", torch.float32)
    monkeypatch.delitem(roofline.EXTENT_OF, "labels")
    with pytest.raises(ValueError, match="row_softmax_forward_kernel: labels_ptr is not in roofline.EXTENTS"):
        work(plain, ARCHS["sm_90"], 8)
    monkeypatch.setattr(roofline, "kernel_name", lambda _: "new_kernel")
    with pytest.raises(ValueError, match="new_kernel is unknown to roofline.work"):
        work(plain, ARCHS["sm_90"], 8)


def test_prediction():
    board, held = BOARDS["sm_90"], Occupancy(2, 0.25, "registers")
    # 264 programs at once; 300 make 1.14 waves, which cost two.
    memory = predict(board, Work(300, bytes=48 * 10**9, matmul_flops=0, fp32_ops=10**9, special=10**9), held, 16)
    assert memory.bound == "memory" and memory.roof == pytest.approx(0.01)
    assert memory.waves == 300 / 264 and memory.predicted == pytest.approx(0.01 * 2 * 264 / 300)
    product = Work(264, bytes=10**6, matmul_flops=989 * 10**9, fp32_ops=0, special=0)
    assert predict(board, product, held, 16).roof == pytest.approx(1e-3)
    assert predict(board, product, held, 16).predicted == predict(board, product, held, 16).roof
    assert predict(board, product, held, 32).roof == pytest.approx(989e9 / 67e12)  # IEEE fp32 outside the matrix units
    exponentials = predict(board, Work(264, bytes=1, matmul_flops=0, fp32_ops=1, special=10**9), held, 16)
    assert exponentials.bound == "special functions"
    assert exponentials.roof == pytest.approx(1e9 / (67e12 / 256 * 16))
    # A quarter of the places taken: a quarter of the machine.
    few = predict(board, Work(66, bytes=48 * 10**9, matmul_flops=0, fp32_ops=0, special=0), held, 16)
    assert few.predicted == pytest.approx(4 * few.roof) and math.ceil(few.waves) == 1
