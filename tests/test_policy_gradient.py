"""Policy-gradient objectives against loops over responses and tokens in float64, their limits and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import prefkern as pk
from conftest import DEVICE

pg = pk.policy_gradient
EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}
LENGTHS, GROUPS = (4, 1, 6, 3, 5), (2, 3)

# Ratios 0.7, 1.1 and 1.5 by advantage, eps = 0.2; closed forms in float64.
RATIOS = (0.7, 1.1, 1.5)
CLIPPED = {1.0: (-0.7, -1.1, -1.2), -1.0: (0.8, 1.1, 1.5)}
SOFT = {
    1.0: (-1.702229932753364, -2.09991674991576, -2.4898373248074184),
    -1.0: (1.6072181604407267, 2.0046701309412143, 2.3935854792204427),
}

# Each objective by name: the call, its surrogate and its aggregation in plain Python.
OBJECTIVES = {
    "grpo": (pg.grpo, {}, "clip", "response"),
    "grpo-two-sided": (pg.grpo, {"eps": 0.1, "eps_high": 0.3, "delta": 1.5}, "clip", "response"),
    "grpo-sequence_token": (pg.grpo, {"level": "sequence_token"}, "clip", "response"),
    "bnpo": (pg.bnpo, {}, "clip", "token"),
    "dr_grpo": (pg.dr_grpo, {"max_length": 7}, "clip", "constant"),
    "dapo": (pg.dapo, {}, "clip", "token"),
    "dapo-sequence": (pg.dapo, {"level": "sequence", "eps": 0.05, "eps_high": None}, "clip", "token"),
    "gspo": (pg.gspo, {}, "clip", "response"),
    "gspo-wide": (pg.gspo, {"eps": 0.1, "eps_high": 0.2}, "clip", "response"),
    "gspo_token": (pg.gspo_token, {"eps": 0.1, "eps_high": 0.2}, "clip", "response"),
    "cispo": (pg.cispo, {"eps_high": 1.3}, "cispo", "token"),
    "sapo": (pg.sapo, {}, "sapo", "response"),
    "sapo-sequence": (pg.sapo, {"level": "sequence", "temperature_pos": 2.0}, "sapo", "response"),
}
DEFAULTS = {
    pg.grpo: {"eps": 0.2}, pg.bnpo: {"eps": 0.2}, pg.dr_grpo: {"eps": 0.2}, pg.dapo: {"eps": 0.2, "eps_high": 0.28},
    pg.gspo: {"eps": 3e-4, "eps_high": 4e-4, "level": "sequence"}, pg.gspo_token: {"level": "sequence"},
    pg.cispo: {}, pg.sapo: {"temperature_pos": 1.0, "temperature_neg": 1.05},
}  # fmt: skip
objectives = pytest.mark.parametrize("name", OBJECTIVES)
STOPPED = ("cispo", "grpo-sequence_token", "gspo_token")  # whose gradient is not the derivative of their value


def rows(dtype=torch.float64, seed=0, spread=0.3):
    """Log-probabilities of policy, old policy and reference, and an advantage for each response, none of them 0."""
    torch.manual_seed(seed)
    n = sum(LENGTHS)
    logps = -torch.rand(n, dtype=torch.float64) * 3 - 0.1
    old, ref = (logps + spread * torch.randn(n, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.5, 2.0], dtype=torch.float64)
    return [t.to(dtype).to(DEVICE) for t in (logps, old, ref, advantages)]


def by_hand(name, logps, old, ref, advantages, mask=None, beta=0.0, weight_kl=False, normalizer=None):
    """The objective from its definition, token by token."""
    call, options, surrogate, aggregation = OBJECTIVES[name]
    o = {**DEFAULTS[call], **options}
    kept = [True] * len(logps) if mask is None else mask.tolist()
    logps, old, ref = (t.tolist() for t in (logps, old, ref))
    means, total, counted, first = [], 0.0, 0, 0
    for r, length in enumerate(LENGTHS):
        at = [t for t in range(first, first + length) if kept[t]]
        first += length
        mean = sum(logps[t] - old[t] for t in at) / max(1, len(at))
        values = []
        for t in at:
            A = advantages[r].item() if len(advantages) == len(LENGTHS) else advantages[t].item()
            w = math.exp(mean if o.get("level", "token") != "token" else logps[t] - old[t])
            if surrogate == "clip":
                high = o["eps"] if o.get("eps_high") is None else o["eps_high"]
                near = min(max(w, 1 - o["eps"]), 1 + high)
                value = -min(min(w, o.get("delta") or math.inf) * A, near * A)
            elif surrogate == "cispo":
                value = -min(w, o["eps_high"]) * A * logps[t]
            else:
                tau = o["temperature_pos"] if A > 0 else o["temperature_neg"]
                value = -4 / tau / (1 + math.exp(-tau * (w - 1))) * A
            d = ref[t] - logps[t]
            values.append(value + beta * (math.exp(d) - d - 1) * (w if weight_kl else 1))
        total, counted = total + sum(values), counted + len(values)
        means.append(sum(values) / max(1, len(values)))
    if aggregation == "response":
        return sum(means) / (normalizer or len(LENGTHS))
    if aggregation == "constant":
        return total / (normalizer or len(LENGTHS)) / o["max_length"]
    return total / counted / (normalizer or 1) if call is pg.bnpo else total / (normalizer or counted)


def call(name, logps, old, advantages, layout=None, **options):
    function, own, _, _ = OBJECTIVES[name]
    return function(logps, old, advantages, layout or pk.Layout.groups(LENGTHS, GROUPS), **own, **options)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_golden_tokens(advantage, dtype):
    ratio, A = torch.tensor(RATIOS, dtype=dtype), torch.full((3,), advantage, dtype=dtype)
    for value, golden in ((pg.clipped_surrogate(ratio, A), CLIPPED), (pg.soft_surrogate(ratio, A), SOFT)):
        assert value.tolist() == pytest.approx(golden[advantage], rel=EXACT[dtype])
    layout = pk.Layout.sequences([3])
    for objective, golden in ((pg.grpo, CLIPPED), (pg.sapo, SOFT)):
        loss = objective(ratio.log(), torch.zeros_like(ratio), A[:1], layout).loss
        assert loss.item() == pytest.approx(sum(golden[advantage]) / 3, rel=EXACT[dtype])


@pytest.mark.parametrize(
    "penalty", [{}, {"beta": 0.3}, {"beta": 0.3, "weight_kl": True}], ids=["", "k3", "k3-weighted"]
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@objectives
def test_equals_the_definition(name, masked, penalty):
    logps, old, ref, advantages = rows()
    mask = torch.arange(len(logps), device=DEVICE) % 3 != 1 if masked else None
    out = call(name, logps, old, advantages, mask=mask, ref_logps=ref, **penalty)
    assert out.loss.item() == pytest.approx(by_hand(name, logps, old, ref, advantages, mask, **penalty), rel=1e-12)
    narrow = call(name, *(t.float() for t in (logps, old, advantages)), mask=mask, ref_logps=ref.float(), **penalty)
    assert narrow.loss.dtype == torch.float32
    assert narrow.loss.item() == pytest.approx(out.loss.item(), rel=2e-6, abs=2e-6)


@objectives
def test_token_advantages_and_normalizer(name):
    logps, old, ref, _ = rows()
    advantages = torch.linspace(-2, 1.5, len(logps), dtype=torch.float64, device=DEVICE)
    normalizer = torch.tensor(37.0, device=DEVICE)
    out = call(name, logps, old, advantages, normalizer=normalizer)
    assert out.loss.item() == pytest.approx(by_hand(name, logps, old, ref, advantages, normalizer=37.0), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in STOPPED])
def test_gradient_is_the_derivative_where_nothing_is_stopped(name):
    logps, old, ref, advantages = rows()
    logps.requires_grad_()
    run = lambda x: call(name, x, old, advantages, ref_logps=ref, beta=0.2, weight_kl=True).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, (logps,))


def test_gradient_of_cispo_is_that_of_a_weighted_log_likelihood():
    logps, old, _, advantages = rows()
    logps.requires_grad_()
    out = pg.cispo(logps, old, advantages, pk.Layout.groups(LENGTHS, GROUPS), eps_high=1.3)
    A = advantages.repeat_interleave(torch.tensor(LENGTHS, device=DEVICE))
    capped = (logps - old).exp().clamp(max=1.3).detach()
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0], -capped * A / len(logps))
    assert out.metrics["clip_ratio/high"].item() == pytest.approx(((logps - old).exp() > 1.3).double().mean().item())


def test_gspo_token_is_gspo_with_one_advantage_a_response():
    logps, old, _, advantages = rows()
    logps.requires_grad_()
    layout = pk.Layout.groups(LENGTHS, GROUPS)
    outs = [f(logps, old, advantages, layout, eps=0.1, eps_high=0.2) for f in (pg.gspo, pg.gspo_token)]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(*(torch.autograd.grad(out.loss, logps)[0] for out in outs))


def test_gspo_token_gives_each_token_its_own_advantage():
    """dL/dlogp_t = -s A_t / n inside the clip, where gspo spreads the mean advantage."""
    logps, old, _, _ = rows(spread=0.05)
    logps.requires_grad_()
    advantages = torch.linspace(-2, 1.5, len(logps), dtype=torch.float64, device=DEVICE)
    out = pg.gspo_token(logps, old, advantages, pk.Layout.sequences([len(logps)]), eps=0.9, eps_high=0.9)
    s = (logps - old).mean().exp().detach()
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0], -s * advantages / len(logps))


@pytest.mark.parametrize("old_given", [True, False], ids=["old", "none"])
@objectives
def test_on_policy_gradient_is_reinforce(name, old_given):
    logps, _, _, advantages = rows()
    logps.requires_grad_()
    out = call(name, logps, logps.detach() if old_given else None, advantages)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    A, n = advantages.repeat_interleave(lengths), lengths.repeat_interleave(lengths)
    weight = {"response": 1 / (n * len(LENGTHS)), "constant": 1 / (7.0 * len(LENGTHS)), "token": 1 / len(logps)}
    expected = (-A * weight[OBJECTIVES[name][3]]).to(logps)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0], expected)
    assert out.metrics["approx_kl"].item() == 0


@objectives
def test_masking_is_deleting(name):
    logps, old, ref, advantages = rows()
    kept = torch.tensor([t % 3 != 1 for t in range(len(logps))], device=DEVICE)
    kept[4] = False  # the only token of the second response
    shorter = [int(part.sum()) for part in kept.split(LENGTHS)]
    for t in (logps, old, ref):
        t[~kept] = torch.tensor([math.nan, math.inf, -math.inf], device=DEVICE, dtype=t.dtype).repeat(9)[
            : (~kept).sum()
        ]
    logps.requires_grad_()
    options = {"beta": 0.2, "weight_kl": True}
    out = call(name, logps, old, advantages, mask=kept, ref_logps=ref, **options)
    layout = pk.Layout.groups(shorter, GROUPS)
    few = logps.detach()[kept].requires_grad_()
    deleted = call(name, few, old[kept], advantages, layout, ref_logps=ref[kept], **options)
    torch.testing.assert_close(out.loss, deleted.loss)
    for key, value in deleted.metrics.items():
        torch.testing.assert_close(out.metrics[key], value)
    grad = torch.autograd.grad(out.loss, logps)[0]
    assert not grad[~kept].any()
    torch.testing.assert_close(grad[kept], torch.autograd.grad(deleted.loss, few)[0])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "bnpo"])  # its mean is local
def test_splitting_the_batch_changes_nothing_with_a_global_normalizer(name):
    logps, old, ref, advantages = rows()
    total = len(LENGTHS) if OBJECTIVES[name][3] != "token" else len(logps)
    whole = call(name, logps, old, advantages, ref_logps=ref, beta=0.1).loss
    parts, cut = [], sum(LENGTHS[:2])
    for tokens, responses in ((slice(0, cut), slice(0, 2)), (slice(cut, None), slice(2, None))):
        layout = pk.Layout.sequences(LENGTHS[responses])
        given = {"ref_logps": ref[tokens], "beta": 0.1, "normalizer": total}
        parts.append(call(name, logps[tokens], old[tokens], advantages[responses], layout, **given).loss)
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("gap", [1e4, -1e4, 100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@objectives
def test_extreme_log_ratios_stay_finite_and_push_the_right_way(name, advantage, gap):
    """fp32; the penalty's gradient must still pull the policy back to the reference."""
    options = {"ref_logps": torch.zeros(2, device=DEVICE)} if gap < 0 else {}
    advantages, layout = torch.tensor([advantage], device=DEVICE), pk.Layout.sequences([2])
    for beta in (0.0, 1.0) if options else (0.0,):
        logps = torch.tensor([gap, gap / 2], device=DEVICE, requires_grad=True)
        out = call(name, logps, torch.zeros(2, device=DEVICE), advantages, layout, beta=beta, **options)
        grad = torch.autograd.grad(out.loss, logps)[0]
        assert out.loss.isfinite() and grad.isfinite().all() and grad.square().sum().isfinite()
        assert all(value.isfinite() for value in out.metrics.values())
        assert (grad < 0).all() if beta else (grad * advantage <= 0).all()


def test_impossible_tokens_weigh_nothing():
    """A sampled token that the policy now excludes has ratio 0."""
    logps = torch.tensor([-math.inf, -1.0], device=DEVICE, requires_grad=True)
    out = pg.grpo(
        logps, torch.tensor([-1.0, -1.0], device=DEVICE), torch.ones(1, device=DEVICE), pk.Layout.sequences([2])
    )
    assert out.loss.item() == -0.5
    assert torch.autograd.grad(out.loss, logps)[0].tolist() == [0.0, -0.5]


def test_the_exponential_is_exact_below_its_limit():
    x = torch.linspace(-50, 40, 19, dtype=torch.float64, requires_grad=True)
    ratio = pg.importance_ratio(x, x, pk.Layout.sequences([19]))
    assert torch.equal(ratio, x.exp())
    over = torch.tensor([41.0, 1e4], dtype=torch.float64, requires_grad=True)
    ratio = pg.importance_ratio(over, over, pk.Layout.sequences([2]))
    torch.testing.assert_close(ratio.detach(), math.exp(40) * (over.detach() - 39))
    torch.testing.assert_close(torch.autograd.grad(ratio.sum(), over)[0], torch.full_like(over, math.exp(40)))


def test_clip_metrics_count_tokens_whose_gradient_is_gone():
    logps, old, _, advantages = rows(spread=0.5)
    logps.requires_grad_()
    out = pg.dapo(logps, old, advantages, pk.Layout.groups(LENGTHS, GROUPS))
    gone = (torch.autograd.grad(out.loss, logps)[0] == 0).double().mean()
    assert 0 < gone.item() == pytest.approx((out.metrics["clip_ratio/low"] + out.metrics["clip_ratio/high"]).item())
    lr = (logps - old).detach()
    assert out.metrics["approx_kl"].item() == pytest.approx((lr.exp() - 1 - lr).mean().item())


def test_k3_is_the_divergence_in_expectation():
    """Summed over the vocabulary with the policy's probabilities it is KL(policy || reference)."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    assert (pg.k3_kl(p, q) >= 0).all()
    torch.testing.assert_close((p.exp() * pg.k3_kl(p, q)).sum(), F.kl_div(q, p, log_target=True, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale, dtype):
    sizes = [3, 1, 4]
    rewards = torch.tensor([1.0, 0.0, 2.5, 7.0, 3.0, 3.0, 3.0, 3.0], dtype=dtype, device=DEVICE, requires_grad=True)
    layout = pk.Layout.groups([2] * 8, sizes)
    out = pg.group_advantages(rewards, layout, scale=scale, eps=1e-3)
    assert out.dtype == dtype and not out.requires_grad
    expected = []
    for group in rewards.detach().double().split(sizes):
        std = {"group": group.std() if len(group) > 1 else torch.zeros(()), "batch": rewards.detach().double().std()}
        centred = group - group.mean()
        expected.append(centred if scale == "none" else centred / (std[scale].to(DEVICE) + 1e-3))
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-6, atol=1e-6)
    assert not out[3:].any()


@objectives
def test_end_to_end_from_hidden_states(name):
    """Through token_logps the gradient of hidden states and head is plain torch's."""
    torch.manual_seed(0)
    n, d, v = sum(LENGTHS), 8, 31
    hidden, weight = torch.randn(n, d, device=DEVICE), torch.randn(v, d, device=DEVICE) / 2
    labels = torch.randint(v, (n,), device=DEVICE)
    _, _, _, advantages = rows(torch.float32)
    noise = 0.2 * torch.randn(2, n, device=DEVICE)

    def gradients(logps_of):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = logps_of(*leaves)
        ref, old = logps.detach() + noise
        out = call(name, logps, old, advantages, ref_logps=ref, beta=0.1)
        return out.loss, *torch.autograd.grad(out.loss, leaves)

    ours = gradients(lambda h, w: pk.token_logps(h, w, labels).logps)
    plain = gradients(lambda h, w: (h @ w.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0])
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_log_probabilities_are_summed_in_fp32():
    logps, old, _, advantages = rows(torch.bfloat16)
    out = pg.grpo(logps, old, advantages, pk.Layout.groups(LENGTHS, GROUPS))
    wide = pg.grpo(logps.float(), old.float(), advantages.float(), pk.Layout.groups(LENGTHS, GROUPS))
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, wide.loss)


def test_no_response_and_no_counted_token_lose_nothing():
    empty = torch.zeros(0, device=DEVICE, requires_grad=True)
    for name in OBJECTIVES:
        assert call(name, empty, None, empty, pk.Layout.groups([], [])).loss.item() == 0
        logps, old, _, advantages = rows(torch.float32)
        none = torch.zeros(len(logps), dtype=torch.bool, device=DEVICE)
        out = call(name, logps.requires_grad_(), old, advantages, mask=none)
        assert out.loss.item() == 0 and not torch.autograd.grad(out.loss, logps)[0].any()


WRONG = {
    "eps": (dict(eps=1.5), "eps=1.5 must be a number in"),
    "eps_high": (dict(eps_high=-0.1), "eps_high=-0.1"),
    "level": (dict(level="response"), "level='response' must be one of token, sequence, sequence_token"),
    "beta": (dict(beta=0.1), "pass ref_logps"),
    "mask": (dict(mask=torch.ones(3)), r"mask has shape \(3,\), but the layout holds 19 tokens in 5 responses"),
    "ref_logps": (dict(ref_logps=torch.ones(3)), "ref_logps has shape"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_errors(options, message):
    logps, old, _, advantages = rows()
    with pytest.raises(ValueError, match=message):
        pg.grpo(logps, old, advantages, pk.Layout.groups(LENGTHS, GROUPS), **options)


def test_more_errors():
    logps, old, _, advantages = rows()
    layout = pk.Layout.groups(LENGTHS, GROUPS)
    with pytest.raises(ValueError, match="advantages has shape"):
        pg.grpo(logps, old, advantages[:-1], layout)
    with pytest.raises(ValueError, match="max_length=0"):
        pg.dr_grpo(logps, old, advantages, layout, max_length=0)
    with pytest.raises(ValueError, match="temperature_neg=0"):
        pg.sapo(logps, old, advantages, layout, temperature_neg=0)
    with pytest.raises(ValueError, match="scale='all' must be one of"):
        pg.group_advantages(advantages, layout, scale="all")
    with pytest.raises(ValueError, match="pass the uncut layout"):
        pg.group_advantages(advantages, layout.static(2))
