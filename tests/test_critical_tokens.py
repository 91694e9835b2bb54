"""Scores of critical tokens against the formula, the loss that weights with them, and the command that makes them."""

import math

import pytest
import torch
import torch.nn.functional as F

import prefkern as pk
from conftest import DEVICE
from numerics import LargestTensor, assert_as_good_as_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"plain": {}, "everything": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6}}


def make(n, d, v, dtype=torch.float32, seed=0):
    """Hidden states, head and bias of the positive model, then of the negative one, and labels."""
    g = torch.Generator().manual_seed(seed)
    sides = [(torch.randn(n, w, generator=g), torch.randn(v, w, generator=g) * 3 / w**0.5, torch.randn(v, generator=g))
             for w in (d, d + 3)]  # fmt: skip
    labels = torch.randint(0, v, (n,), generator=g)
    labels[::5] = -100
    return [t.to(dtype).to(DEVICE) for side in sides for t in side], labels.to(DEVICE)


def scores(tensors, labels, gamma=1.0, **options):
    pos, w_pos, b_pos, neg, w_neg, b_neg = tensors
    return pk.critical_token_scores(pos, w_pos, neg, w_neg, labels, gamma, b_pos, b_neg, **options)


def by_hand(tensors, labels, gamma, softcap=None, logit_scale=1.0, temperature=1.0):
    """The formula on full logits, in fp32 for all but float64."""
    z = []
    for head in (tensors[:3], tensors[3:]):
        raw = logit_scale * F.linear(*head)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        z.append((raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature)
    p = ((1 + gamma) * z[0] - gamma * z[1]).softmax(-1)
    return torch.where(labels == -100, 0.0, 1 - p.gather(-1, labels.clamp(min=0)[:, None])[:, 0])


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_as_good_as_torch(dtype, options, gamma):
    tensors, labels = make(66, 23, 531, dtype)
    truth = by_hand([t.double() for t in tensors], labels, gamma, **options)
    got = scores(tensors, labels, gamma, workspace_bytes=20_000, **options)
    assert got.dtype == torch.float32 and not got[labels == -100].any() and ((got >= 0) & (got <= 1)).all()
    assert_as_good_as_torch(got, by_hand(tensors, labels, gamma, **options), truth, 1e-6)
    assert torch.equal(got, scores(tensors, labels, gamma, workspace_bytes=20_000, **options))


def test_a_score_near_0_keeps_its_digits():
    """p is 1 - 1e-11: subtracted from 1 in fp32 nothing would be left of it."""
    eye = torch.eye(3, device=DEVICE)
    logits = torch.tensor([[26.0, 0.0, 0.5]], device=DEVICE)
    got = pk.critical_token_scores(logits, eye, logits, eye, torch.tensor([0], device=DEVICE), gamma=0.0)
    want = (math.exp(-26) + math.exp(-25.5)) / (1 + math.exp(-26) + math.exp(-25.5))
    assert got.item() == pytest.approx(want, rel=1e-5) and 0 < want < 1e-10


def test_masked_vocabulary_is_never_likely():
    tensors, labels = make(9, 16, 40)
    tensors[2][7] = tensors[5][7] = -torch.inf
    tensors[2][8], labels[3:5] = -torch.inf, torch.tensor([7, 8])
    got = scores(tensors, labels)
    assert got.isfinite().all() and (got[3:5] == 1).all()


def test_batches_and_no_rows_and_no_gradient():
    tensors, labels = make(12, 8, 30)
    want = scores([t.requires_grad_() for t in tensors], labels)
    assert not want.requires_grad
    folded = [t.view(3, 4, -1) if i % 3 == 0 else t for i, t in enumerate(tensors)]
    assert torch.equal(scores(folded, labels.view(3, 4)), want.view(3, 4))
    assert scores([t[:0] if i % 3 == 0 else t for i, t in enumerate(tensors)], labels[:0]).shape == (0,)


def test_no_tensor_is_larger_than_the_workspace():
    tensors, labels = make(4096, 16, 50_000)
    with LargestTensor([*tensors, labels]) as largest:
        scores(tensors, labels, workspace_bytes=4 << 20)
    assert 0 < largest.bytes <= 4 << 20


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gamma": -1.0}, "gamma=-1.0 must be a number of at least 0"),
        ({"weight_neg": torch.zeros(8, 5)}, "weight_pos has 9 vocabulary entries and weight_neg 8"),
        ({"hidden_neg": torch.zeros(2, 5)}, "negative hidden less its last axis (2, 5)"),
        ({"labels": torch.tensor([0, 9, 1])}, "label 9 is outside the vocabulary of 9"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, words):
    shapes = {"hidden_pos": (3, 4), "weight_pos": (9, 4), "hidden_neg": (3, 5), "weight_neg": (9, 5)}
    given = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"labels": torch.zeros(3).long()}
    with pytest.raises(ValueError) as error:
        pk.critical_token_scores(**(given | change))
    assert words in str(error.value)


# Two pairs of 7 and 4, and of 2 and 3 tokens.
LAYOUT, SPANS = pk.Layout.pairs([7, 2], [4, 3]), ((slice(0, 7), slice(7, 11)), (slice(11, 13), slice(13, 16)))
PARTS = {  # the segments' ends of each response: first pair, second pair
    "none": (None, [([7], [4]), ([2], [3])]),
    "static": (pk.Static(3), [([3, 6, 7], [3, 4, 4]), ([2], [3])]),
    "adaptive": (pk.Adaptive(2), [([3, 7], [2, 4]), ([1, 2], [1, 3])]),
    "tokens": (pk.Static(1), [(range(1, 8), [1, 2, 3, 4, 4, 4, 4]), ([1, 2, 2], [1, 2, 3])]),
}


def weighted(seed=0):
    g = torch.Generator().manual_seed(seed)
    logps, ref, weights = (torch.rand(16, generator=g, dtype=torch.float64) for _ in range(3))
    weights[:7] = 1.0
    weights[8] = 0.0
    return -3 * logps, -3 * ref, weights


def segment_losses(ratio, weights, ends, beta):
    """-log sigma of every segment's weighted difference, pair by pair."""
    d, losses = ratio * weights, []
    for (w, r), (ends_w, ends_r) in zip(SPANS, ends):
        sums = []
        for part, cuts in ((d[w], ends_w), (d[r], ends_r)):
            starts = [0, *list(cuts)[:-1]]
            sums.append([part[a:b].sum() for a, b in zip(starts, cuts)])
        losses.append(torch.stack([-F.logsigmoid(beta * (a - b)) for a, b in zip(*sums)]))
    return losses


def run(loss, logps, ref, weights, impl="eager", **options):
    x = logps.clone().requires_grad_()
    out = pk.preference_loss(x, LAYOUT, loss, ref_logps=ref, token_weights=weights, impl=impl, **options)
    return out.loss.detach(), *torch.autograd.grad(out.loss, x)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("granularity, ends", PARTS.values(), ids=PARTS)
def test_sequence_forms_against_the_formula(granularity, ends, impl):
    logps, ref, weights = weighted()
    x = logps.clone().requires_grad_()
    want = torch.stack([pair.sum() for pair in segment_losses(x - ref, weights, ends, 0.4)]).mean()
    (grad,) = torch.autograd.grad(want, x)
    loss = pk.losses.CriticalTokenDPO(beta=0.4, granularity=granularity)
    if impl == "eager":
        got = run(loss, logps, ref, weights)
        torch.testing.assert_close(got, (want.detach(), grad), rtol=1e-12, atol=1e-14)
    else:
        got = run(loss, *(t.float().to(DEVICE) for t in (logps, ref, weights)), impl=impl)
        torch.testing.assert_close([t.cpu().double() for t in got], [want.detach(), grad], rtol=1e-5, atol=1e-6)
    assert got[1][8] == 0


def test_token_form_is_the_mean_over_compared_positions():
    logps, ref, weights = weighted()
    by_position = torch.cat(segment_losses(logps - ref, weights, PARTS["tokens"][1], 0.4))
    assert len(by_position) == 10
    value, _ = run(pk.losses.CriticalTokenDPO(beta=0.4, aggregate="token"), logps, ref, weights)
    torch.testing.assert_close(value, by_position.mean())


def test_token_form_with_width_is_the_released_average_less_its_constant():
    """Padded to B x L with prompts of 3 tokens, as the released code lays responses out."""
    logps, ref, weights = weighted()
    prompt, width = 3, 12
    x = logps.clone().requires_grad_()
    d = (x - ref) * weights
    table = [torch.stack([F.pad(d[side], (prompt, width - prompt - len(d[side]))) for side in pair]) for pair in SPANS]
    padded = torch.stack([-F.logsigmoid(0.4 * (w - r)) for w, r in table])
    assert padded.shape == (2, width)
    (grad,) = torch.autograd.grad(padded.mean(), x)
    got = run(pk.losses.CriticalTokenDPO(beta=0.4, aggregate="token", width=width), logps, ref, weights)
    torch.testing.assert_close(got[1], grad)
    torch.testing.assert_close(got[0], padded.mean().detach() - math.log(2) * (2 * width - 10) / (2 * width))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("granularity", [None, pk.Static(3), pk.Adaptive(2)], ids=repr)
def test_weights_of_1_are_autoregressive_dpo(granularity, impl):
    logps, ref, _ = (t.float().to(DEVICE) for t in weighted())
    got = run(pk.losses.CriticalTokenDPO(granularity=granularity), logps, ref, torch.ones_like(ref), impl)
    want = run(pk.losses.AutoregressiveDPO(granularity=granularity), logps, ref, None, impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: pk.losses.CriticalTokenDPO(width=8), "width=8 belongs to aggregate='token'"),
        (lambda: pk.losses.CriticalTokenDPO(aggregate="token", width=0), "width=0 must be a positive whole number"),
        (
            lambda: pk.losses.CriticalTokenDPO(aggregate="token", granularity=pk.Static(2)),
            "granularity=Static(k=2) belongs to aggregate='sequence'",
        ),
        (lambda: pk.losses.CriticalTokenDPO(aggregate="mean"), "'sequence', 'token'"),
        (lambda: run(pk.losses.CriticalTokenDPO(), *weighted()[:2], None), "weights tokens: pass token_weights"),
        (
            lambda: pk.losses.CriticalTokenDPO(aggregate="token").segmented(LAYOUT.static(2)),
            "aggregate='token' compares tokens, but the layout is cut",
        ),
    ],
)
def test_wrong_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
