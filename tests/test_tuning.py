"""Launch configurations: the search behind PREFKERN_AUTOTUNE=1, and the cut of the vocabulary."""

import contextlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import triton

from prefkern.kernels import fused_logits, lm_head, row_softmax, tail, tuning
from prefkern.kernels.tuning import (
    ARCHS,
    HeadConfig,
    RowConfig,
    can_bulk_copy,
    choose,
    head_config,
    row_config,
    row_splits,
    slice_width,
    tiles_per_program,
)

ARCH = pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)


def test_the_search_takes_the_fastest_neighbour_once(monkeypatch):
    timed = []

    def milliseconds(config, launch):
        timed.append(config)
        return abs(config.num_warps - 16) + config.block_v / 1e6

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    config = RowConfig(1, 4096, lanes=256, num_warps=8)
    assert choose(("kernel", 1), config, print) == config and not timed
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    for _ in range(2):
        assert choose(("kernel", 1), config, print) == RowConfig(1, 4096, lanes=256, num_warps=16)
    assert len(timed) == len(tuning.neighbours(config))


def test_the_search_starts_from_each_configuration_by_itself(monkeypatch):
    """What suits a bare pass spills where the same shape wants more."""
    monkeypatch.setattr(tuning, "_milliseconds", lambda config, launch: config.num_stages)
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    options = dict(N=8192, dtype=torch.bfloat16, arch=ARCHS["sm_90"], bulk_copies=True)
    wide, narrow = (head_config(bare=bare, **options) for bare in (True, False))
    found = [choose(("lm_head_forward", 1), config, print) for config in (wide, narrow)]
    assert [c.block_v for c in found] == [wide.block_v, narrow.block_v]


def test_launchers_make_the_device_of_their_tensor_the_current_one(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext(entered.append(tensor)))
    tensor = torch.zeros(1)
    assert tuning.on_its_device(lambda x, *, n: (x, n, len(entered)))(tensor, n=2) == (tensor, 2, 1)
    assert entered[0] is tensor
    for launcher in (
        row_softmax.row_softmax_forward, row_softmax.row_softmax_backward, lm_head.lm_head_forward,
        lm_head.lm_head_backward, tail.tail, fused_logits.fused_logits_forward,
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):  # entered before it finds that there is nothing to launch
            launcher(tensor)
    assert len(entered) == 7


@pytest.mark.parametrize("config", [RowConfig(64, 16, 1, 1), HeadConfig(128, 256, 16, num_warps=16, num_stages=1)])
def test_neighbours_can_be_launched(config):
    found = tuning.neighbours(config)
    assert found[0] == config and len(set(found)) == len(found) > 1
    assert all(c.num_stages >= 1 and 1 <= c.num_warps <= 16 and c.block_v >= 16 for c in found)


def test_the_search_also_tries_to_do_without_the_copy_engine():
    found = tuning.neighbours(HeadConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True))
    assert [replace(c, tma=True) == found[0] for c in found if not c.tma] == [True]


def bare_config(N, arch):
    return head_config(N, torch.bfloat16, arch, bare=True, bulk_copies=True)


def parts(N, D, V, arch):
    """Row blocks, tiles of the vocabulary, tiles that a program folds, parts of the vocabulary."""
    config = bare_config(N, arch)
    each = tiles_per_program(N, D, V, config, arch)
    tiles = triton.cdiv(V, config.block_v)
    assert 1 <= each <= tiles
    return triton.cdiv(N, config.block_n), tiles, each, triton.cdiv(tiles, each)


@ARCH
@pytest.mark.parametrize("D, V", [(1024, 151_936), (4096, 128_256), (2304, 256_000), (2880, 201_088)])
@pytest.mark.parametrize("N", [1, 64, 65, 1000, 1024, 2000, 4096, 8192, 8200, 32_768, 1 << 20])
def test_programs_fill_the_chip_a_whole_number_of_times(N, D, V, arch):
    """Of the time that its programs take in waves, a chip works at least 9 tenths; 8 where the rows are few."""
    row_blocks, tiles, each, splits = parts(N, D, V, arch)
    slots = arch.num_sms * bare_config(N, arch).per_sm
    waves = triton.cdiv(row_blocks * splits, slots)
    assert row_blocks * tiles / (waves * each * slots) >= (0.94 if N >= 1000 else 0.8)


@ARCH
@pytest.mark.parametrize("N", [1000, 8200, 32_768, 1 << 20])
def test_the_hidden_states_of_the_programs_that_run_at_once_fit_the_cache(N, arch):
    row_blocks, _, _, splits = parts(N, 4096, 128_256, arch)
    config = bare_config(N, arch)
    slots = arch.num_sms * config.per_sm
    assert min(row_blocks, triton.cdiv(slots, splits)) <= 1.25 * config.group_n
    assert splits * N * 20 <= max(8 << 20, 20 * N * slots)  # and the parts stay small


@ARCH
@pytest.mark.parametrize("V", [1, 17, 32_000])
def test_a_small_vocabulary_is_one_tile_a_program_at_most(V, arch):
    row_blocks, tiles, each, splits = parts(64, 4096, V, arch)
    assert row_blocks == 1 and splits * each >= tiles > (splits - 1) * each
    assert each == 1 or tiles > arch.num_sms


def test_few_rows_take_a_low_tile_and_small_programs():
    for name, arch in ARCHS.items():
        few, many = bare_config(64, arch), bare_config(65, arch)
        assert (few.block_n, many.block_n) == ((128, 128) if name == "sm_100" else (64, 128))
        assert bare_config(1, arch) == few and bare_config(1 << 20, arch) == many


def test_hopper_folds_wide_tiles_whatever_is_asked_of_them_but_a_bias():
    def width(arch, **options):
        return head_config(8192, torch.bfloat16, ARCHS[arch], bulk_copies=True, **options).block_v

    assert width("sm_90", bare=True) == width("sm_90", bare=False, bias=False) == 256
    assert width("sm_90", bare=False) == width("sm_90", bare=False, gradient=True, bias=False) == 128
    assert [width("sm_100", bare=True, gradient=gradient) for gradient in (True, False)] == [256, 128]
    assert width("sm_80", bare=True) == 128


@ARCH
def test_the_copy_engine_is_used_where_there_is_one(arch):
    for dtype, bare in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        with_copies, without = (head_config(512, dtype, arch, bare=bare, bulk_copies=b) for b in (True, False))
        assert with_copies.tma == (arch.name in ("sm_90", "sm_100") and dtype != torch.float32)
        assert not without.tma


def test_what_the_copy_engine_takes():
    matrix = torch.zeros(6, 16, dtype=torch.bfloat16)
    assert can_bulk_copy(matrix) and can_bulk_copy(matrix[1:]) and can_bulk_copy(matrix[:, :3])
    for other in (
        matrix.t(), matrix[:, ::2], matrix[:, 1:], matrix[:1].expand(6, 16), matrix[:0], matrix[:, :0],
        torch.zeros(6, 15, dtype=torch.bfloat16), torch.zeros(6, 16).t(),
    ):  # fmt: skip
        assert not can_bulk_copy(other)


@pytest.mark.parametrize("workspace_bytes", [0, 1 << 20, 512 << 20])
def test_slices_are_whole_tiles_evenly_shared(workspace_bytes):
    config = bare_config(1000, ARCHS["sm_90"])
    width = slice_width(1000, 151_936, config, 2, workspace_bytes)
    slices = triton.cdiv(151_936, width)
    assert width % config.block_v == 0 and (slices - 1) * width < 151_936
    assert 1000 * width * 2 <= max(workspace_bytes, 1000 * config.block_v * 2)
    assert 151_936 - (slices - 1) * width > width - slices * config.block_v


@ARCH
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [1, 2, 507, 1031, 5000, 128_256])
def test_short_rows_share_a_program(V, dtype, writes, arch):
    config = row_config(V, dtype, arch, writes=writes)
    assert config.block_n * config.block_v >= min(1024, 32 * config.block_v)
    assert config.block_n <= 32 and (config.block_n == 1 or config.block_v >= V)
    threads = config.num_warps * arch.warp_size
    assert threads in (128, 256) and config.lanes in (1, threads)
    assert config.lanes == 1 or config.block_v * dtype.itemsize == threads * (32 if writes else 64)


@ARCH
@pytest.mark.parametrize("V", [32_000, 128_256, 129_920, 151_936, 262_144])
@pytest.mark.parametrize("N", [1, 8, 64, 500, 1024, 8192, 65_536, 1 << 20])
def test_row_programs_fill_the_chip(N, V, arch):
    """Few rows make as many programs as there are processors, where their tiles allow; many rows one each."""
    config = row_config(V, torch.bfloat16, arch, writes=False)
    splits, tiles = row_splits(N, V, config, arch), triton.cdiv(V, config.block_v)
    each = triton.cdiv(tiles, splits)
    assert 1 <= splits <= tuning.MAX_ROW_SPLITS and (splits - 1) * each < tiles  # the last one is not empty
    assert N * splits >= arch.num_sms or splits > min(tiles, tuning.MAX_ROW_SPLITS) // 2
    assert splits == 1 if N >= 1 << 14 else each >= 4 or N * splits <= 6 * arch.num_sms


def test_64_rows_of_128k_fill_132_processors_three_times():
    arch = ARCHS["sm_90"]
    for writes in (False, True):
        config = row_config(128_256, torch.bfloat16, arch, writes=writes)
        assert 64 * row_splits(64, 128_256, config, arch) >= 3 * 132


def test_the_number_of_rows_gives_few_numbers_of_splits():
    config = row_config(128_256, torch.bfloat16, ARCHS["sm_90"], writes=False)
    assert {row_splits(N, 128_256, config, ARCHS["sm_90"]) for N in range(1, 20_000)} <= {1, 2, 4, 8, 16}
