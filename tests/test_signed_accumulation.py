"""The measuring script of the signed accumulation computes what it times, and says what it measured."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench.studies import signed_accumulation as study
from numerics import assert_as_good_as_torch


def plain(pair, dtype):
    """Loss and gradients with all logits in memory."""
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (pair.hidden, pair.weight))
    wide = torch.promote_types(dtype, torch.float32)
    logps = F.log_softmax((hidden @ weight.t()).to(wide), -1).gather(1, pair.labels[:, None])[:, 0]
    ratios = logps - pair.ref_logps.to(wide)
    half = len(ratios) // 2
    loss = -F.logsigmoid(study.BETA * (ratios[:half].sum() - ratios[half:].sum()))
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("step", study.STEPS.values(), ids=study.STEPS)
@pytest.mark.parametrize("workspace", [1 << 13, 1 << 20], ids=["several chunks", "one chunk"])
@pytest.mark.parametrize("dtype", study.DTYPES)
def test_both_are_as_good_as_torch(dtype, workspace, step):
    pair = study.Pair.of(study.Case(48, 16, 257, dtype, workspace))
    truth, same, got = plain(pair, torch.float64), plain(pair, study.DTYPES[dtype]), step(pair, workspace)
    for a, b, c in zip(got[1:], same[1:], truth[1:]):
        assert_as_good_as_torch(a, b, c, 1e-6)
    torch.testing.assert_close(got[0], same[0], rtol=1e-5, atol=0)


def test_a_quick_run_writes_every_case(tmp_path, capsys):
    assert study.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "signed_accumulation.json").read_text())
    assert len(records) == len(study.cases(quick=True)) == 4
    for r in records:
        assert all(len(times) == 2 and min(times) > 0 for times in r["times_s"].values())
        assert r["difference"] <= study.AGREE[r["dtype"]] and r["commit"] and r["versions"]["torch"]
    assert len({r["rows_per_chunk"] for r in records}) > 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| V | dtype |") and len(lines) == 2 + len(records)


def test_the_full_run_is_of_long_groups():
    assert {(c.n, c.d) for c in study.cases(quick=False)} == {(2048, 1024)}
    assert {c.v for c in study.cases(quick=False)} == {32_064, 128_256}


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(study.STEPS, "signed", lambda pair, workspace: [2 * t for t in study.signed(pair, workspace)])
    with pytest.raises(ArithmeticError, match="differ"):
        study.measure(study.cases(quick=True)[0], 1)
