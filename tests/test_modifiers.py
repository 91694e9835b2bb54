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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
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


def everything_by_hand(loss, logps, ref, collision, weights, mask):
    """Autoregressive DPO with every option at once, pair by pair and segment by segment."""
    score = {"reverse_kl": lambda a: a, "forward_kl": lambda a: 1 - torch.exp(-a)}[loss.f_divergence]
    total, start = torch.zeros((), dtype=torch.float64), 0
    for n, m in zip(LAYOUT.lengths[::2], LAYOUT.lengths[1::2]):
        spans = [range(start, start + n), range(start + n, start + n + m)]
        start += n + m
        kept = [[t for t in span if mask[t]] for span in spans]
        shorter = min(map(len, kept))
        factor = {t: weights[t] * (1 if i < shorter else loss.ld_alpha) for rows in kept for i, t in enumerate(rows)}
        certainty = [sum(logps[t].detach() - collision[t] for t in rows) / max(1, len(rows)) for rows in kept]
        segments = -(-max(n, m) // loss.granularity.k)
        values = []
        for i in range(segments):
            from_row = 0 if loss.accumulate == "prefix" else i * loss.granularity.k
            parts = [span[from_row : (i + 1) * loss.granularity.k] for span in spans]
            a, b = (sum((factor[t] * (logps[t] - ref[t]) for t in part if mask[t]), 0 * logps[0]) for part in parts)
            alive = any(mask[t] for span in spans for t in span[i * loss.granularity.k : (i + 1) * loss.granularity.k])
            x, e = loss.beta * (score(a) - score(b)), loss.label_smoothing
            values.append(alive * (-(1 - e) * logsigmoid(x) - e * logsigmoid(-x)))
        pair = sum(values) / (segments if loss.segment_reduction == "mean" else 1)
        total = total + math.exp(sum(certainty)) * pair / len(LAYOUT.group_sizes)
    chosen = [t for t in [*range(5), *range(7, 10)] if mask[t]]
    return total - loss.nll_weight * sum(weights[t] * logps[t] for t in chosen) / len(chosen)


@IMPLS
@pytest.mark.parametrize("accumulate", ["segment", "prefix"])
@pytest.mark.parametrize("segment_reduction, f_divergence", [("sum", "forward_kl"), ("mean", "reverse_kl")])
def test_everything_at_once(segment_reduction, accumulate, f_divergence, impl):
    loss = L.AutoregressiveDPO(
        beta=0.4, label_smoothing=0.1, granularity=pk.Static(2), accumulate=accumulate, f_divergence=f_divergence,
        segment_reduction=segment_reduction, ld_alpha=0.3, wpo=True, nll_weight=0.5,
    )  # fmt: skip
    logps, ref, collision = draw(seed=4)
    mask = torch.ones(LAYOUT.num_tokens, dtype=torch.bool)
    mask[[0, 4, 8, 11, 12, 13]] = False  # of the last response the second segment, which the chosen one has no part of
    weights = torch.rand(LAYOUT.num_tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    x = logps.clone().requires_grad_()
    want = everything_by_hand(loss, x, ref, collision, weights, mask)
    (want_grad,) = torch.autograd.grad(want, x)
    y = logps.clone().requires_grad_()
    stats = {"log_collision": collision.to(DEVICE if impl == "triton" else "cpu")}
    out = run(loss, y, ref, impl=impl, mask=mask, token_weights=weights, stats=stats, diagnostics=True)
    (grad,) = torch.autograd.grad(out.loss, y)
    exact = dict(rtol=2e-5, atol=2e-6) if impl == "triton" else dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.loss.detach().cpu().double(), want.detach(), **exact)
    torch.testing.assert_close(grad, want_grad, **exact)
