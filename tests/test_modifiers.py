"""What every pair loss takes on top of its own options, together with masks, token weights and segments."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import prefkern as pk
from conftest import DEVICE

L = pk.losses
LAYOUT = pk.Layout.pairs([5, 3], [2, 6])
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])


def draw(n=LAYOUT.num_tokens, seed=0):
    """Log-probabilities of policy and reference, and log sum p^2 of the policy, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return -2 * torch.rand(3, n, generator=generator, dtype=torch.float64)


def run(loss, logps, ref, layout=LAYOUT, impl="eager", **options):
    dtype = torch.float32 if impl == "triton" else torch.float64
    logps, ref = (t.to(DEVICE if impl == "triton" else "cpu", dtype) for t in (logps, ref))
    options = {k: v.to(logps.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return pk.preference_loss(logps, layout, loss, ref if loss.needs_reference else None, impl=impl, **options)


@IMPLS
def test_ld_alpha_counts_without_masked_tokens(impl):
    """Tokens masked at the start, in the middle and at the end move no token across the shorter response's length."""
    logps, ref, _ = draw(12)
    kept = torch.tensor([0, 1, 1, 0, 1, 1, 0] + [1, 0, 1, 0, 0], dtype=torch.bool)  # 4 tokens, and 2
    weights = torch.tensor([1, 1, 0.25, 0.25, 1, 1], dtype=torch.float64)
    d = (logps - ref)[kept] * weights
    want = -logsigmoid(0.1 * (d[:4].sum() - d[4:].sum()))
    logps[~kept] = -torch.inf
    out = run(L.DPO(ld_alpha=0.25), logps, ref, pk.Layout.pairs([7], [5]), impl, mask=kept)
    torch.testing.assert_close(out.loss.cpu().double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5])
def test_wpo_and_reported_log_probabilities_are_those_of_all_tokens(ld_alpha):
    """Tokens that ld_alpha or a weight of 0 takes out of the scores are still what the policy wrote."""
    logps, ref, collision = draw()
    weights = torch.ones_like(logps)
    weights[[0, 6, 12]] = 0.0
    loss = L.DPO(ld_alpha=ld_alpha, wpo=True)
    out = run(loss, logps, ref, stats={"log_collision": collision}, token_weights=weights)

    def pairs(values_N, reduce):
        return torch.stack([reduce(x) for x in values_N.split(list(LAYOUT.lengths))]).view(-1, 2).unbind(1)

    beyond = torch.tensor([1, 1] + [ld_alpha] * 3 + [1, 1] + [1] * 3 + [1] * 3 + [ld_alpha] * 3)
    a, b = pairs((logps - ref) * weights * beyond, torch.sum)
    sure, unsure = pairs(logps - collision, torch.mean)
    torch.testing.assert_close(out.loss, (-(sure + unsure).exp() * logsigmoid(0.1 * (a - b))).mean())
    for metric, want in zip(("logps/chosen", "logps/rejected"), pairs(logps, torch.sum)):
        torch.testing.assert_close(out.metrics[metric], want.mean())


@pytest.mark.parametrize("loss", [
    L.DPO(ld_alpha=0.3), L.DPO(ld_alpha=0.0, wpo=True), L.SimPO(ld_alpha=0.3, nll_weight=0.5), L.CPO(wpo=True),
    L.AdaDPO(ld_alpha=0.0, wpo=True, nll_weight=0.5), L.AlphaDPO(ld_alpha=0.3), L.AOT(ld_alpha=0.0),
    L.AOTUnpaired(ld_alpha=0.3, wpo=True), L.DPO(ld_alpha=0.3, f_divergence="js"),
], ids=repr)  # fmt: skip
def test_masking_is_deleting_whatever_is_combined(loss):
    logps, ref, collision = draw()
    mask = torch.ones(LAYOUT.num_tokens, dtype=torch.bool)
    mask[[0, 3, 8, 11, 15]] = False
    lengths = [int(part.sum()) for part in mask.split(list(LAYOUT.lengths))]
    results = []
    for rows, layout, given in ((slice(None), LAYOUT, mask), (mask, pk.Layout.groups(lengths, [2, 2]), None)):
        x = logps[rows].clone().requires_grad_()
        stats = {"log_collision": collision[rows]}
        out = run(loss, x, ref[rows], layout, mask=given, stats=stats, diagnostics=True)
        results.append((out.loss, torch.autograd.grad(out.loss, x)[0], out.metrics))
    (value, grad, metrics), (want, want_grad, want_metrics) = results
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad[mask], want_grad)
    assert not grad[~mask].any()
    torch.testing.assert_close(metrics, want_metrics)
    assert all(math.isfinite(m) for m in metrics.values())


@IMPLS
@pytest.mark.parametrize("accumulate", ["segment", "prefix"])
def test_likelihood_of_whole_responses_beside_a_loss_of_segments(accumulate, impl):
    """However the caller has cut the layout."""
    logps, ref, _ = draw()
    cut = LAYOUT.split_at([[2, 4], [1], [1], [3]], accumulate=accumulate)
    segments = L.AutoregressiveDPO(granularity=pk.Boundaries(), accumulate=accumulate)
    both = L.AutoregressiveDPO(granularity=pk.Boundaries(), accumulate=accumulate, nll_weight=0.3)
    chosen = torch.cat([logps[:5], logps[7:10]])
    normalizer = both.normalizers(cut, torch.tensor(cut.lengths, dtype=torch.float64))
    assert [float(n) for n in normalizer] == [2, 8]
    for given in (None, normalizer):
        out = run(both, logps, ref, cut, impl, normalizer=given)
        want = run(segments, logps, ref, cut).loss - 0.3 * chosen.mean()
        torch.testing.assert_close(out.loss.cpu().double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss, normalizer, words", [
    (L.CPO(), 4.0, "cpo has 2 addends (cpo, nll), but 1 normalizer(s) were given"),
    (L.CPO(), torch.tensor(4.0), "but 1 normalizer(s) were given; pass one for each"),
    (L.CPO(), [1.0, 2.0, 3.0], "but 3 normalizer(s) were given"),
    (L.SimPO(), [1.0, 2.0], "simpo has one addend, but 2 normalizers were given"),
    (L.SimPO(), torch.ones(2), "simpo has one addend, but 2 normalizers were given"),
])  # fmt: skip
def test_a_wrong_number_of_normalizers_is_named(loss, normalizer, words):
    logps, ref, _ = draw()
    with pytest.raises(ValueError) as error:
        run(loss, logps, ref, normalizer=normalizer)
    assert words in str(error.value)
