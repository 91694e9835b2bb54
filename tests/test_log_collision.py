"""The output log sum_v p_v^2 of every body that has it, and the WPO weights that are made of it."""

import pytest
import torch

import prefkern as pk
from conftest import DEVICE
from numerics import DTYPES, assert_as_good_as_torch, row_stats
from prefkern import rows as torch_rows

pytest.importorskip("triton")
from prefkern.kernels import row_softmax, row_softmax_cpu

EPS = 1e-6  # fp32 sums in another order than torch's
PLAIN = pk.Head()
FULL = pk.Head(softcap=5.0, logit_scale=1.3, temperature=0.7)
BODIES = {"torch": torch_rows, "compiled": row_softmax_cpu, "triton": row_softmax}


def make(n, v, dtype=torch.float32, spread=3.0):
    g = torch.Generator().manual_seed(n + v)
    logits = (torch.randn(n, v, generator=g) * spread).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[1:3] = -100
    return logits.to(DEVICE), labels.to(DEVICE), torch.randn(v, generator=g).to(dtype).to(DEVICE)


def check(body, logits, labels, head=PLAIN, bias=None):
    truth, same = (row_stats(x, labels, head, bias).log_collision for x in (logits.double(), logits))
    got = BODIES[body].row_softmax_forward(logits, labels, head, bias_V=bias, want_collision=True).log_collision
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got, same, truth, EPS)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("n, v", [(5, 2), (33, 507), (9, 1031)])
@pytest.mark.parametrize("body", BODIES)
def test_rows(body, n, v, head, dtype):
    logits, labels, bias = make(n, v, dtype)
    check(body, logits, labels, head, bias if head is FULL else None)


@pytest.mark.parametrize("body", BODIES)
def test_edges(body):
    """Uniform rows (-log V), a certain row (0), masked first tiles, and logits of 1e4."""
    logits, labels, _ = make(9, 3000)
    logits[3], logits[4, 17], logits[5, :2500] = 2.0, 1e4, -torch.inf
    logits[6] += 1e4
    got = check(body, logits, labels)
    torch.testing.assert_close(got[3:5].cpu(), torch.tensor([-8.006367567650246, 0.0]))
    assert (got[labels == -100] == 0).all() and (got <= 1e-6).all()


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_token_logps_gives_it_without_gradient(impl):
    hidden, weight, labels = torch.randn(7, 4, device=DEVICE), torch.randn(11, 4, device=DEVICE), torch.arange(7)
    labels = labels.to(DEVICE)
    out = pk.token_logps(
        hidden.requires_grad_(), weight, labels, outputs="log_collision", impl=impl, workspace_bytes=100
    )
    want = (hidden @ weight.t()).softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(out.log_collision, want.detach())
    assert not out.log_collision.requires_grad and out._fields[-2:] == ("log_collision", "ref_logps")
    logits = (hidden @ weight.t()).detach()
    for how in ("eager", "triton"):
        got = pk.logits_token_logps(logits, labels, outputs=("log_collision",), impl=how).log_collision
        torch.testing.assert_close(got, want.detach())


def test_the_cut_body_says_that_it_has_none():
    with pytest.raises(ValueError, match="impl='cut' has no output 'log_collision': use impl='auto' or 'chunked'"):
        pk.token_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64),
                       outputs="log_collision", impl="cut")  # fmt: skip


def wpo_by_hand(hidden, weight, labels, ref, lengths, beta):
    """Weighted DPO of full logits: exp of both responses' mean of logp - log sum_v p^2, times -log sigma."""
    log_p = (hidden @ weight.t()).log_softmax(-1)
    logps = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    aligned = (logps - log_p.exp().square().sum(-1).log()).detach()
    rows = [r[labels[r] != -100] for r in torch.arange(len(labels)).split(list(lengths))]
    losses, weights = [], []
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        x = beta * ((logps - ref)[chosen].sum() - (logps - ref)[rejected].sum())
        weights.append((aligned[chosen].mean() + aligned[rejected].mean()).exp())
        losses.append(-weights[-1] * torch.nn.functional.logsigmoid(x))
    return torch.stack(losses).mean(), torch.stack(weights)


@pytest.mark.parametrize("path", ["chunked", "eager", "triton logits", "eager logits"])
def test_wpo_from_hidden_states_and_logits(path):
    """No limit from above on the weights: at peaked rows they pass 1."""
    g = torch.Generator().manual_seed(3)
    lengths = (5, 2, 1, 6)
    hidden = (2 * torch.randn(14, 6, generator=g, dtype=torch.float64)).requires_grad_()
    weight, ref = torch.randn(23, 6, generator=g, dtype=torch.float64), -torch.rand(14, generator=g).double()
    labels = (hidden @ weight.t()).argmax(-1)
    labels[7:] = torch.randint(0, 23, (7,), generator=g)
    labels[1] = -100
    layout, loss = pk.Layout.pairs(lengths[::2], lengths[1::2]), pk.losses.DPO(beta=0.3, wpo=True)
    want, weights = wpo_by_hand(hidden, weight, labels, ref, lengths, 0.3)
    assert weights.max() > 1 > weights.min()
    (grad,) = torch.autograd.grad(want, hidden)

    x = hidden.detach().to(DEVICE) if path.startswith("eager") else hidden.detach().float().to(DEVICE)
    x.requires_grad_()
    w, y, r = weight.to(x), labels.to(DEVICE), ref.to(x)
    if "logits" in path:
        out = pk.logits_preference_loss(x @ w.t(), y, layout, loss, ref_logps=r, impl=path.split()[0])
    else:
        out = pk.linear_preference_loss(x, w, y, layout, loss, ref_logps=r, impl=path, workspace_bytes=200)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach().cpu().double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.cpu().double(), grad, rtol=1e-4, atol=1e-6)
