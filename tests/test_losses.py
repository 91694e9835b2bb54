"""Golden numbers of every loss, the common checks, and what the registry says to a wrong name or value."""

import dataclasses
import math

import pytest
import torch

import prefkern as pk
from conftest import DEVICE
from prefkern import checks


def named(loss) -> str:
    """The loss with the options that are not its defaults."""
    changed = [f"{f.name}={v!r}" for f in dataclasses.fields(loss) if (v := getattr(loss, f.name)) != f.default]
    return f"{loss.name}({', '.join(changed)})"


INSTANCES = [loss for name in pk.losses.names() for loss in checks.instances(name)]

# One pair: log-prob sums of policy and reference, response lengths 6 and 9; values from closed forms in float64.
PAIR = {"chosen": -12.0, "rejected": -15.0, "ref_chosen": -12.5, "ref_rejected": -14.0}
LENGTHS = (6, 9)
GOLDEN = [
    (pk.losses.DPO(beta=0.1), 0.6209570477895321),
    (pk.losses.DPO(beta=0.1, label_smoothing=0.1), 0.6359570477895321),
    (pk.losses.IPO(beta=0.1), 23.093364197530864),
    (pk.losses.SimPO(beta=2.0, gamma=0.5), 1.4377643938872642),
]

# Log-ratios of a pair of 7 and 4 tokens, beta 0.1.
CHOSEN = [-0.3, -0.16666666666666666, -0.033333333333333326, 0.1, 0.23333333333333334, 0.3666666666666667, 0.5]
REJECTED = [0.2, -0.06666666666666665, -0.3333333333333333, -0.6]
SEGMENTED = [
    (pk.Static(1), 4.778628669698406),
    (pk.Static(2), 2.700050534239139),
    (pk.Static(4), 1.313006085850457),
    (pk.Static(8), 0.6209570477895321),
    (pk.Adaptive(1), 0.6209570477895321),
    (pk.Adaptive(2), 1.3174737999226052),
    (pk.Adaptive(4), 2.7011653467543892),
    (None, 0.6209570477895321),
]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-9}
IMPLS = ["eager", "triton"]


@pytest.mark.parametrize("check", checks.ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("loss", INSTANCES, ids=named)
def test_common_checks(loss, check):
    check(loss)


@pytest.mark.parametrize("loss", INSTANCES, ids=named)
def test_link_matches_eager(loss):
    checks.link_matches_eager(loss, DEVICE)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("loss, value", GOLDEN, ids=lambda x: named(x) if dataclasses.is_dataclass(x) else "")
def test_golden_pair(loss, value, dtype):
    layout = pk.Layout.pairs(LENGTHS[:1], LENGTHS[1:])
    spread = lambda a, b: torch.cat([torch.full((n,), x / n, dtype=torch.float64) for x, n in zip((a, b), LENGTHS)])  # noqa: E731
    logps = spread(PAIR["chosen"], PAIR["rejected"]).to(dtype)
    ref = spread(PAIR["ref_chosen"], PAIR["ref_rejected"]).to(dtype) if loss.needs_reference else None
    out = pk.preference_loss(logps, layout, loss, ref_logps=ref)
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype], abs=EXACT[dtype])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("granularity, value", SEGMENTED, ids=repr)
def test_golden_autoregressive_dpo(granularity, value, dtype):
    loss = pk.losses.AutoregressiveDPO(beta=0.1, granularity=granularity)
    ratios = torch.tensor(CHOSEN + REJECTED, dtype=dtype)
    out = pk.preference_loss(ratios, pk.Layout.pairs([7], [4]), loss, ref_logps=torch.zeros_like(ratios))
    assert out.loss.item() == pytest.approx(value, rel=EXACT[dtype], abs=EXACT[dtype])


def test_golden_kernel_fp32():
    for granularity, value in SEGMENTED:
        loss = pk.losses.AutoregressiveDPO(beta=0.1, granularity=granularity)
        ratios = torch.tensor(CHOSEN + REJECTED, device=DEVICE)
        out = pk.preference_loss(
            ratios, pk.Layout.pairs([7], [4]), loss, ref_logps=torch.zeros_like(ratios), impl="triton"
        )
        assert out.loss.item() == pytest.approx(value, rel=1e-6), granularity


@pytest.mark.parametrize("impl", IMPLS)
def test_one_segment_is_dpo_to_the_last_bit(impl):
    layout = pk.Layout.pairs([7, 300, 1], [4, 211, 9])
    torch.manual_seed(0)
    logps, ref = -torch.rand(layout.num_tokens, device=DEVICE) * 5, -torch.rand(layout.num_tokens, device=DEVICE) * 5

    def run(loss):
        x = logps.clone().requires_grad_()
        out = pk.preference_loss(x, layout, loss, ref_logps=ref, impl=impl)
        out.loss.backward()
        return out.loss.detach(), x.grad

    dpo = run(pk.losses.DPO(beta=0.3))
    for granularity in (None, pk.Adaptive(1), pk.Static(300), pk.Static(10_000), pk.Boundaries([[]] * 6)):
        other = run(pk.losses.AutoregressiveDPO(beta=0.3, granularity=granularity))
        assert all(torch.equal(a, b) for a, b in zip(dpo, other)), granularity


def test_swapping_a_pair_mirrors_the_logistic_loss():
    """-log sigma(x) + log sigma(-x) = -x, so the two orders differ by (1 - 2e) times the reward margin."""
    for smoothing in (0.0, 0.2):
        loss = pk.losses.DPO(beta=0.7, label_smoothing=smoothing)
        score = torch.randn(9, 2, dtype=torch.float64)
        gap = loss.eager(score) - loss.eager(score.flip(1))
        torch.testing.assert_close(gap, -(1 - 2 * smoothing) * 0.7 * (score[:, 0] - score[:, 1]))


@pytest.mark.parametrize("impl", IMPLS)
def test_nll_weight_adds_the_chosen_responses_cross_entropy(impl):
    layout, logps, ref = pk.Layout.pairs([5, 2], [3, 4]), -torch.rand(14), -torch.rand(14)
    chosen = torch.cat([logps[:5], logps[8:10]])
    dpo = pk.preference_loss(logps, layout, pk.losses.DPO(), ref_logps=ref).loss
    out = pk.preference_loss(logps, layout, pk.losses.DPO(nll_weight=0.3), ref_logps=ref, impl=impl)
    torch.testing.assert_close(out.loss, dpo - 0.3 * chosen.mean())
    torch.testing.assert_close(out.metrics["loss/nll"], -chosen.mean())


@pytest.mark.parametrize("impl", IMPLS)
def test_ld_alpha_desensitises_what_lies_beyond_the_shorter_response(impl):
    layout, logps, ref = pk.Layout.pairs([5, 2], [3, 4]), -torch.rand(14), -torch.rand(14)
    weights = torch.tensor([1.0, 1, 1, 0.25, 0.25, 1, 1, 1, 1, 1, 1, 1, 0.25, 0.25])
    want = pk.preference_loss(logps, layout, pk.losses.DPO(), ref_logps=ref, token_weights=weights).loss
    got = pk.preference_loss(logps, layout, pk.losses.DPO(ld_alpha=0.25), ref_logps=ref, impl=impl).loss
    torch.testing.assert_close(got, want)


def test_nll_is_the_token_mean():
    logps = -torch.rand(12)
    out = pk.preference_loss(logps, pk.Layout.sequences([5, 7]), pk.losses.NLL())
    torch.testing.assert_close(out.loss, -logps.mean())
    mask = torch.arange(12) % 3 > 0
    out = pk.preference_loss(logps, pk.Layout.sequences([5, 7]), pk.losses.NLL(), mask=mask)
    torch.testing.assert_close(out.loss, -logps[mask].mean())


def test_start_of_training():
    """At policy = reference each segment costs log 2 and every token pulls with beta / 2, however it is cut."""
    layout, logps = pk.Layout.pairs([6], [5]), -torch.rand(11)
    for granularity, segments in ((None, 1), (pk.Adaptive(5), 5), (pk.Static(1), 6)):
        x = logps.clone().requires_grad_()
        loss = pk.losses.AutoregressiveDPO(beta=0.4, granularity=granularity)
        out = pk.preference_loss(x, layout, loss, ref_logps=logps)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(segments * math.log(2), rel=1e-6)
        torch.testing.assert_close(x.grad, torch.tensor([-0.2] * 6 + [0.2] * 5))


def test_segment_mean_divides_by_the_pairs_own_segments():
    layout = pk.Layout.pairs([6, 2], [5, 2])
    logps, ref = -torch.rand(15), -torch.rand(15)

    def alone(rows, lengths, segments):
        loss = pk.losses.AutoregressiveDPO(granularity=pk.Static(1))
        out = pk.preference_loss(logps[rows], pk.Layout.groups(lengths, [2]), loss, ref_logps=ref[rows])
        return out.loss / segments

    want = (alone(slice(0, 11), [6, 5], 6) + alone(slice(11, 15), [2, 2], 2)) / 2
    loss = pk.losses.AutoregressiveDPO(granularity=pk.Static(1), segment_reduction="mean")
    torch.testing.assert_close(pk.preference_loss(logps, layout, loss, ref_logps=ref).loss, want)


def test_segment_mean_is_exact_in_float64():
    ratios = torch.tensor(CHOSEN[:3] + REJECTED[:3], dtype=torch.float64)
    run = {
        how: pk.preference_loss(
            ratios, pk.Layout.pairs([3], [3]), pk.losses.AutoregressiveDPO(segment_reduction=how),
            ref_logps=torch.zeros_like(ratios),
        ).loss.item()
        for how in ("sum", "mean")
    }  # fmt: skip
    assert run["mean"] == pytest.approx(run["sum"] / 3, rel=1e-14)


def test_prefix_scores_are_running_sums():
    ratios = torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0])
    layout = pk.Layout.pairs([3], [2]).static(1, accumulate="prefix")
    loss = pk.losses.AutoregressiveDPO(granularity=None)
    out = pk.preference_loss(ratios, layout, loss, ref_logps=torch.zeros(5))
    assert out.scores.view(3, 2).tolist() == [[1.0, 10.0], [3.0, 30.0], [7.0, 30.0]]


def test_metrics_of_a_pair():
    layout = pk.Layout.pairs([2, 1], [1, 2])
    logps, ref = torch.tensor([-1.0, -2, -3, -4, -5, -6]), torch.tensor([-2.0, -2, -2, -2, -7, -7])
    out = pk.preference_loss(logps, layout, pk.losses.DPO(beta=0.5), ref_logps=ref)
    got = {k: v.item() for k, v in out.metrics.items()}
    assert got == pytest.approx({
        "rewards/chosen": 0.5 * (1 - 2) / 2, "rewards/rejected": 0.5 * (-1 + 3) / 2,
        "rewards/margins": 0.5 * (2 - 5) / 2,
        "rewards/accuracies": 0.5, "logps/chosen": (-3 - 4) / 2, "logps/rejected": (-3 - 11) / 2,
    })  # fmt: skip


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: pk.losses.get("dpoo"), "unknown loss 'dpoo' (did you mean 'dpo'?)"),
        (lambda: pk.losses.get("dpo", betta=0.1), "did you mean 'beta'?"),
        (lambda: pk.losses.get("dpo", beta=0), "beta=0 must be a number in (0, 100]"),
        (lambda: pk.losses.get("dpo", beta="0.1"), "beta='0.1' must be a number"),
        (lambda: pk.losses.get("dpo", beta=float("nan")), "beta=nan"),
        (lambda: pk.losses.get("dpo", label_smoothing=0.5), "[0, 0.5)"),
        (lambda: pk.losses.get("ipo", normalize="median"), "'mean', 'sum'"),
        (
            lambda: pk.losses.get("autoregressive_dpo", granularity=7),
            "granularity=7 must be one of Static, Adaptive, Boundaries, None",
        ),
        (lambda: pk.losses.get("autoregressive_dpo", accumulate="both"), "'segment', 'prefix'"),
        (lambda: pk.Static(0), "k=0"),
        (lambda: pk.Adaptive(2, rule="C"), "rule='C'"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.DPO()), "pass ref_logps"),
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.SimPO(), ref_logps=x), "uses no reference"),
        (lambda x, lay: pk.preference_loss(x[:-1], lay, pk.losses.SimPO()), "layout holds 8 tokens"),
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.DPO(), ref_logps=x[1:]), "ref_logps has shape (7,)"),
        (
            lambda x, lay: pk.preference_loss(x, pk.Layout.groups([8], [1]), pk.losses.DPO(), ref_logps=x),
            "use Layout.pairs",
        ),
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.SimPO(), targets=x[:2]), "reads no targets"),
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.SimPO(nll_weight=1.0), normalizer=[1.0]), "2 addends"),
        (lambda x, lay: pk.preference_loss(x, lay.static(1), pk.losses.SimPO()), "pass the uncut layout"),
        (
            lambda x, lay: pk.preference_loss(x, lay.static(1), pk.losses.AutoregressiveDPO(), ref_logps=x),
            "cut already",
        ),
        (
            lambda x, lay: pk.preference_loss(
                x, lay.static(1), pk.losses.AutoregressiveDPO(granularity=None, accumulate="prefix"), ref_logps=x
            ),
            "accumulate='prefix', but the layout was cut with accumulate='segment'",
        ),
        (lambda x, lay: pk.preference_loss(x, lay, pk.losses.SimPO(), impl="fast"), "impl='fast'"),
    ],
)
def test_bad_calls_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call(torch.zeros(8), pk.Layout.pairs([3], [5]))
    assert words in str(error.value)


def test_option_names_are_frozen():
    """Renaming an option breaks users' configurations: do it knowingly, here too."""
    shared = {"nll_weight", "ld_alpha", "wpo"}
    fields = {}
    for name in pk.losses.names():
        found = {*pk.losses.options(name)}
        if issubclass(pk.losses.loss_class(name), pk.losses.PairLoss):
            assert shared <= found, name
            found -= shared
        fields[name] = sorted(found)
    assert fields == {
        "adadpo": ["base", "beta", "clip", "k", "length_normalized", "space"],
        "alpha_divergence": ["alpha", "normalize", "smallest_target", "targets", "tau"],
        "alphadpo": [
            "alpha",
            "beta",
            "convention",
            "decay",
            "eps",
            "gamma",
            "label_smoothing",
            "mean",
            "normalize",
            "stats",
            "std",
        ],
        "anchored_listwise": ["normalize", "targets", "tau"],
        "anchored_pairwise": ["beta"],
        "aot": ["beta", "label_smoothing"],
        "aot_unpaired": ["beta", "label_smoothing"],
        "apo_down": ["beta"],
        "apo_zero": ["beta"],
        "autoregressive_dpo": [
            "accumulate",
            "beta",
            "f_alpha",
            "f_divergence",
            "granularity",
            "label_smoothing",
            "segment_reduction",
        ],
        "bco": ["beta", "shift"],
        "combination": ["parts"],
        "cpo": ["beta", "label_smoothing"],
        "critical_token_dpo": [
            "accumulate",
            "aggregate",
            "beta",
            "f_alpha",
            "f_divergence",
            "granularity",
            "label_smoothing",
            "segment_reduction",
            "width",
        ],
        "discopop": ["beta", "f_alpha", "f_divergence", "tau"],
        "dpo": ["beta", "f_alpha", "f_divergence", "label_smoothing"],
        "exo": ["beta", "f_alpha", "f_divergence", "label_smoothing"],
        "hinge": ["beta", "f_alpha", "f_divergence"],
        "ipo": ["beta", "f_alpha", "f_divergence", "normalize"],
        "kto": ["baseline", "beta", "desirable_weight", "undesirable_weight"],
        "nca": ["beta"],
        "nll": [],
        "orpo": ["beta"],
        "rdpo": ["alpha", "beta", "f_alpha", "f_divergence", "label_smoothing", "sign"],
        "robust": ["beta", "f_alpha", "f_divergence", "label_smoothing"],
        "sigmoid_norm": ["beta", "f_alpha", "f_divergence"],
        "simpo": ["beta", "gamma"],
        "sppo": ["beta"],
        "tdpo1": ["beta"],
        "tdpo2": ["alpha", "beta"],
    }
