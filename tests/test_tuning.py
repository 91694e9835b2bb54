"""Launch configurations: the search behind PREFKERN_AUTOTUNE=1, and the cut of the vocabulary."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")
import triton

from prefkern.kernels import fused_logits, lm_head, row_softmax, tail, tuning
from prefkern.kernels.tuning import ARCHS, HeadConfig, RowConfig, choose, head_config, row_config, vocab_splits


def test_the_search_takes_the_fastest_neighbour_once(monkeypatch):
    timed = []

    def milliseconds(config, launch):
        timed.append(config)
        return abs(config.num_warps - 16) + config.block_v / 1e6

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    config = RowConfig(1, 4096, num_warps=8)
    assert choose(("kernel", 1), config, print) == config and not timed
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    for _ in range(2):
        assert choose(("kernel", 1), config, print) == RowConfig(1, 4096, num_warps=16)
    assert len(timed) == len(tuning.neighbours(config))


def test_the_search_starts_from_each_configuration_by_itself(monkeypatch):
    """What suits a bare forward pass spills where the same shape wants more."""
    monkeypatch.setattr(tuning, "_milliseconds", lambda config, launch: config.num_stages)
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    wide, narrow = (head_config(torch.bfloat16, ARCHS["sm_90"], bare=bare) for bare in (True, False))
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


@pytest.mark.parametrize("config", [RowConfig(64, 16, 1), HeadConfig(128, 256, 16, num_warps=16, num_stages=1)])
def test_neighbours_can_be_launched(config):
    found = tuning.neighbours(config)
    assert found[0] == config and len(set(found)) == len(found) > 1
    assert all(c.num_stages >= 1 and 1 <= c.num_warps <= 16 and c.block_v >= 16 for c in found)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("N", [1, 1024, 8192, 1 << 20])
def test_the_vocabulary_is_cut_until_the_chip_is_full(N, arch):
    config = head_config(torch.bfloat16, arch, bare=True)
    splits = vocab_splits(N, 128_256, config, arch)
    tiles = triton.cdiv(128_256, config.block_v)
    assert 1 <= splits <= tiles
    assert splits == tiles or splits * triton.cdiv(N, config.block_n) >= arch.num_sms


@pytest.mark.parametrize("V", [2, 507, 1031, 128_256])
def test_short_rows_share_a_program(V):
    config = row_config(V, torch.bfloat16, ARCHS["sm_90"])
    assert config.block_n * config.block_v >= 1024 and (config.block_n == 1 or config.block_v >= V)
