"""Every body of the head under random shapes, dtypes, strides and options: never more than twice torch's own error.

A red run prints the smallest case it found; cases come from a fixed seed, so the run can be repeated.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")
pytest.importorskip("triton")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import prefkern as pk
from conftest import DEVICE
from numerics import assert_as_good_as_torch
from prefkern import checks, reference
from prefkern import rows as torch_rows
from prefkern.head import Head
from prefkern.kernels import lm_head, row_softmax, row_softmax_cpu
from prefkern.kernels.tuning import HeadConfig
from prefkern.losses import names

# fp32 sums in another order than torch's; of float64, whose truth is torch itself, the same number of digits.
EPS = {torch.float64: 1e-13}
EPS_OF_FP32 = 1e-6
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KERNEL_DTYPES = (FP32, FP32, FP16)  # the interpreter's tl.dot returns garbage on bf16
DTYPES = {"chunked": (FP32, BF16, FP16, FP64), "compiled": (FP32, BF16)}
# Cases of a default run and of a full one, where a body is interpreted fewer.
SHARES = {"chunked": (100, 1000), "compiled": (200, 1000), "rows": (10, 150), "cut": (10, 150), "loss": (80, 500)}
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of token_logps and its backward."""

    n: int
    d: int
    v: int
    dtype: torch.dtype
    needs: frozenset  # of h(idden), w(eight), b(ias), a and l, the two sides of a LoRA
    entropy: bool  # whether the loss is of entropies too
    logps: bool  # whether it is of log-probabilities
    outputs: tuple[str, ...]
    softcap: float | None
    logit_scale: float
    temperature: float
    bias: torch.dtype | None
    ignored: str
    rank: int
    lora_hidden: bool
    ref_hidden: bool
    tiles: int | None  # about how many the workspace makes of the logits; None: the default workspace
    spread: float  # of the logits, about
    view: str
    seed: int

    @property
    def options(self) -> dict:
        names = ("softcap", "logit_scale", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.tiles is None else max(1, self.n * self.v * self.dtype.itemsize // self.tiles)


VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def cases(body: str) -> st.SearchStrategy[Case]:
    """Strategy of the calls that a body takes."""
    outputs = ["entropy", "is_top1", "mean_logit", "lse"] + ["log_collision"] * (body != "cut")
    interpreted = body in ("rows", "cut")
    most = (20, 40, 130) if interpreted else (80, 70, 600)
    every = st.builds(
        Case,
        n=st.integers(0, most[0]),
        d=st.integers(1, most[1]),
        v=st.integers(1, most[2]),
        dtype=st.sampled_from(DTYPES.get(body, KERNEL_DTYPES)),
        needs=st.frozensets(st.sampled_from("hwbal")),
        entropy=st.booleans(),
        logps=st.booleans(),
        outputs=st.lists(st.sampled_from(outputs), unique=True).map(tuple),
        softcap=st.sampled_from([None, None, 3.0, 30.0]),
        logit_scale=st.sampled_from([1.0, 1.0, 0.25, 2.0, -1.0]),
        temperature=st.sampled_from([1.0, 1.0, 0.5, 1.7]),
        bias=st.sampled_from([None, "same", FP32]),
        ignored=st.sampled_from(["none", "some", "all"]),
        rank=st.sampled_from([0, 0, 1, 5, 20]),
        lora_hidden=st.booleans(),
        ref_hidden=st.booleans(),
        tiles=st.sampled_from([None, 1, 3, 20]),
        spread=st.sampled_from([0.1, 1.0, 3.0]),
        view=st.sampled_from(sorted(VIEWS.keys() - {"expanded"} if interpreted else VIEWS)),
        seed=st.integers(0, 9999),
    )
    # The largest of a few roundings to 16 bits says little of how large one may be.
    return every.filter(lambda case: case.dtype in (FP32, FP64) or case.n == 0 or case.n * case.v >= 64)


def tensors(case: Case, seed: int) -> dict[str, Tensor | None]:
    """The call's operands, by the letters of `needs`, and labels (y), reference (r), upstream gradients (g, e)."""
    g = torch.Generator().manual_seed(seed)
    n, d, v, rank = case.n, case.d, case.v, case.rank

    def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=g) * size).to(DEVICE, dtype)

    view = VIEWS[case.view]
    weight = draw(v, d, size=case.spread / d**0.5)
    if case.view != "expanded":
        weight = view(weight)
    elif case.dtype in (FP32, FP64):  # D equal columns in 16 bits: one rounding D times over
        weight = weight[:, :1].expand_as(weight)  # of V equal rows every gradient of hidden is 0, but for rounding
    labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    if case.ignored != "none":
        labels[:: 3 if case.ignored == "some" else 1] = -100
    bias_dtype = case.dtype if case.bias == "same" or case.dtype == FP64 else case.bias
    return {
        "h": view(draw(n, d)), "w": weight,
        "b": draw(v, dtype=bias_dtype) if case.bias else None,
        "a": draw(rank, d, size=d**-0.5) if rank else None, "l": draw(v, rank, size=rank**-0.5) if rank else None,
        "x": draw(n, d) if rank and case.lora_hidden else None,
        "y": labels, "r": draw(n, d) if case.ref_hidden else None, "g": draw(n, dtype=FP32), "e": draw(n, dtype=FP32),
    }  # fmt: skip


def call(case: Case, given: dict[str, Tensor | None], impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, and gradients of what the case needs; in another dtype if one is given."""
    t = {
        k: x if x is None or dtype is None or not x.is_floating_point() or k in "ge" else x.to(dtype)
        for k, x in given.items()
    }
    leaves = {k: t[k].detach().requires_grad_() for k in sorted(case.needs) if t[k] is not None}
    t |= leaves
    lora = None if t["a"] is None else pk.LoRA(t["a"], t["l"], 0.7, t["x"])
    differentiates = leaves and (case.logps or case.entropy)
    outputs = {*case.outputs, "lse"} | ({"entropy"} if case.entropy and differentiates else set())
    out = pk.token_logps(
        t["h"], t["w"], t["y"], t["b"], outputs=outputs, impl=impl, workspace_bytes=case.workspace_bytes,
        lora=lora, ref_hidden=t["r"], **case.options,
    )  # fmt: skip
    found = {name: x.detach() for name, x in zip(out._fields, out) if x is not None}
    if differentiates:
        loss = (out.logps * t["g"]).sum() * case.logps
        if case.entropy:
            loss = loss + (out.entropy * t["e"]).sum()
        found |= {f"d{k}": x for k, x in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}
    return found


# One rounding to 16 bits may happen to miss few numbers, or those that count, and so may any rounding of a few rows, or
# of one expanded to many: a mean of logits that cancel, say. So torch is asked for nearly the same hidden states again,
# which round otherwise: its error is the largest of these.
NEARBY = (1.0, 0.9, 0.93, 0.96, 1.03, 1.06, 1.09, 1.12)


def nearby(case: Case, given: dict[str, Tensor | None]) -> list[dict[str, Tensor | None]]:
    many = case.dtype in (FP32, FP64) and case.n >= 8 and case.view != "expanded"
    factors = NEARBY[:1] if many else NEARBY
    return [given | {k: None if given[k] is None else given[k] * f for k in "hrx"} for f in factors]


def check(case: Case, impl: str) -> None:
    """Values and gradients of one call."""
    given = tensors(case, case.seed)
    truths, sames = ([call(case, g, "eager", dtype) for g in nearby(case, given)] for dtype in (FP64, None))
    truth, got = truths[0], call(case, given, impl)
    assert got.keys() == truth.keys()
    seam = half_an_ulp_of_lse(case, given)
    for name, value in got.items():
        assert value.dtype == sames[0][name].dtype
        if name == "is_top1":
            clear = is_clear(case, given)
            assert torch.equal(value[clear], truth[name][clear]), name
            continue
        errors = [(same[name].double() - true[name]).abs() for same, true in zip(sames, truths)]
        torchs = truth[name] + torch.stack(errors).amax(0)
        if value.numel() == 0:
            assert value.shape == truth[name].shape
            continue
        eps, size = EPS.get(case.dtype, EPS_OF_FP32), truth[name].abs().max().item()
        if name in seam:
            if size == 0:  # as with a vocabulary of one
                assert value.abs().max() <= 2 * torchs.abs().max() + seam[name], name
                continue
            eps += seam[name] / size
        try:
            assert_as_good_as_torch(value, torchs, truth[name], eps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def logits_of(case: Case, given: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> Tensor:
    t = {k: None if x is None else x.to(dtype or x.dtype) for k, x in given.items() if k in "hwbalx"}
    raw = torch.nn.functional.linear(t["h"], t["w"], None if t["b"] is None else t["b"].to(t["h"].dtype))
    if t["a"] is not None:
        raw = raw + 0.7 * (t["h"] if t["x"] is None else t["x"]) @ t["a"].t() @ t["l"].t()
    return reference.transform(raw, Head(**case.options))


def is_clear(case: Case, given: dict[str, Tensor | None]) -> Tensor:
    """(N,) whether rounding the logits to the case's dtype cannot change which is the largest."""
    if case.n == 0:
        return given["y"] >= 0
    label = given["y"].clamp(min=0)[:, None]

    def lead(z: Tensor) -> Tensor:
        return z.gather(1, label)[:, 0] - z.scatter(1, label, -1e30).amax(1)

    exact, rounded = lead(logits_of(case, given, FP64)), lead(logits_of(case, given))
    return (given["y"] < 0) | (exact.abs() > 4 * (exact - rounded).abs().max() + 1e-6)


def half_an_ulp_of_lse(case: Case, given: dict[str, Tensor | None]) -> dict[str, float]:
    """Most that gradients may lose because backward knows the log-sum-exp in fp32 only: token_logps states it.

    Of a vocabulary of one, torch's softmax is 1 whatever the logit: its error covers none. There, what the logit may
    be off in backward is added, a product of fewer rows, whose sums a library may round otherwise.
    """
    z, kept = logits_of(case, given, FP64), given["y"] >= 0
    lse = z.logsumexp(1)
    log_p = z - lse[:, None]
    entropy = -(log_p.exp() * log_p).sum(1)
    digits = 53 if case.dtype == FP64 else 24
    ulp = torch.ldexp(torch.ones_like(lse), torch.frexp(lse.abs()).exponent - digits)
    slope = abs(case.logit_scale / case.temperature)
    if case.v == 1:
        t = {k: x.double().abs() for k, x in given.items() if k in "hwbalx" and x is not None}
        terms = t["h"] @ t["w"].t() + t.get("b", 0.0)
        if "a" in t:
            terms = terms + 0.7 * t.get("x", t["h"]) @ t["a"].t() @ t["l"].t()
        ulp = ulp + terms[:, 0] * 2.0**-digits * slope
    if case.softcap is not None:
        slope = slope * (1 - (z * case.temperature / case.softcap).square())
    g, e = given["g"].double().abs() * case.logps, given["e"].double().abs() * case.entropy
    upstream = g[:, None] + e[:, None] * ((log_p + entropy[:, None]).abs() + 1)
    dz = torch.where(kept[:, None], ulp[:, None] * log_p.exp() * upstream * slope, 0.0)
    h, w = given["h"].double().abs(), given["w"].double().abs()
    found = {"dh": dz @ w, "dw": dz.t() @ h, "db": dz.sum(0)}
    if given["a"] is not None:
        a, b = given["a"].double().abs(), given["l"].double().abs()
        x = h if given["x"] is None else given["x"].double().abs()
        found |= {"da": (dz @ b).t() @ x * 0.7, "dl": dz.t() @ (x @ a.t()) * 0.7}
        found["dh"] = found["dh"] + (dz @ b @ a * 0.7 if given["x"] is None else 0)
    return {name: x.max().item() if x.numel() else 0.0 for name, x in found.items()}


def run_cases(strategy: st.SearchStrategy, check_one, count: int) -> None:
    """Check `count` cases, and that so many ran."""
    passed = 0

    @settings(SETTINGS, max_examples=count)
    @given(strategy)
    def every(case):
        nonlocal passed
        check_one(case)
        passed += 1

    every()
    assert passed >= count, f"{passed} of {count} cases ran"
    print(f"{passed} cases")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a case fills: the interpreter takes its time over the default ones, mostly empty here."""
    if DEVICE == "cpu":
        tile = HeadConfig(32, 64, 32, num_warps=1, num_stages=1)
        monkeypatch.setattr(lm_head, "head_config", lambda *_, **__: tile)


FULL = pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])


@FULL
def test_the_chunked_body(full, monkeypatch):
    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: torch_rows)
    run_cases(cases("chunked"), lambda case: check(case, "chunked"), SHARES["chunked"][full])


@FULL
@pytest.mark.skipif(row_softmax_cpu.library() is None, reason="the row functions for a CPU are not built")
def test_the_chunked_body_with_compiled_rows(full, monkeypatch):
    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax_cpu)
    run_cases(cases("compiled"), lambda case: check(case, "chunked"), SHARES["compiled"][full])


@FULL
def test_the_chunked_body_with_triton_rows(full, monkeypatch):
    monkeypatch.setattr(torch_rows, "implementation", lambda device, dtype: row_softmax)
    run_cases(cases("rows"), lambda case: check(case, "chunked"), SHARES["rows"][full])


@FULL
def test_the_cut_body(full, small_tiles):
    run_cases(cases("cut"), lambda case: check(case, "cut"), SHARES["cut"][full])


@dataclass(frozen=True)
class LossCase:
    """One call of linear_preference_loss and its backward."""

    loss: object
    layout: pk.Layout
    impl: str
    dtype: torch.dtype
    d: int
    v: int
    needs: frozenset
    bias: bool
    softcap: float | None
    ignored: bool
    tiles: int | None
    seed: int


@st.composite
def loss_cases(draw) -> LossCase:
    """Any registered loss with any of its choices, on any layout it takes, empty responses among them."""
    loss = draw(st.sampled_from([loss for name in names() for loss in checks.instances(name)]))
    lengths = st.integers(0, 9)
    if loss.arity == "pair":
        pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
        layout = pk.Layout.pairs(*zip(*pairs))
    elif loss.arity == "single":
        layout = pk.Layout.sequences(draw(st.lists(lengths, min_size=1, max_size=8)))
    else:
        groups = draw(st.lists(st.lists(lengths, min_size=1, max_size=4), min_size=1, max_size=3))
        layout = pk.Layout.groups([n for group in groups for n in group], [len(group) for group in groups])
    collision = any("log_collision" in term.loss.row_outputs for term in loss.addends())
    impl = "auto" if collision else draw(st.sampled_from(["auto", "auto", "auto", "auto", "cut"]))
    return LossCase(
        loss, layout, impl, FP32 if impl == "cut" else draw(st.sampled_from([FP32, FP64])),
        draw(st.integers(1, 40)), draw(st.integers(2, 200)), draw(st.frozensets(st.sampled_from("hwb"))),
        draw(st.booleans()), draw(st.sampled_from([None, 5.0])), draw(st.booleans()),
        draw(st.sampled_from([None, 1, 3, 12])), draw(st.integers(0, 9999)),
    )  # fmt: skip


def loss_call(case: LossCase, impl: str, dtype: torch.dtype, moved: int = 0, factor: float = 1.0) -> dict[str, Tensor]:
    """The loss, its gradients and metrics.

    Args:
        moved: seed of a change of the operands by half an ulp, 0 for none.
        factor: of the hidden states.
    """
    g = torch.Generator().manual_seed(case.seed)
    n, layout = case.layout.num_tokens, case.layout
    operands = {
        "h": torch.randn(n, case.d, generator=g) * factor, "w": torch.randn(case.v, case.d, generator=g) / case.d**0.5,
        "b": torch.randn(case.v, generator=g) if case.bias else None,
    }  # fmt: skip
    leaves = {
        k: None if x is None else x.to(DEVICE, dtype).requires_grad_(k in case.needs) for k, x in operands.items()
    }
    if moved:
        coin = torch.Generator().manual_seed(moved)
        for k in "hw":
            signs = torch.randint(0, 2, leaves[k].shape, generator=coin).to(DEVICE) * 2 - 1
            leaves[k] = (leaves[k].detach() * (1 + 2.0**-24 * signs)).requires_grad_(k in case.needs)
    labels = torch.randint(0, case.v, (n,), generator=g).to(DEVICE)
    if case.ignored:
        labels[::3] = -100
    batch = checks.example(case.loss, layout, dtype=FP32, device=DEVICE, seed=case.seed)
    given = {k: x for k, x in batch.options.items() if k not in ("stats", "vocab_size")}
    workspace = None if case.tiles is None else max(1, n * case.v * 4 // case.tiles)
    out = pk.linear_preference_loss(
        leaves["h"], leaves["w"], labels, layout, case.loss, bias=leaves["b"], softcap=case.softcap, impl=impl,
        workspace_bytes=workspace, **given,
    )  # fmt: skip
    found = {"loss": out.loss.detach()}
    inputs = {k: x for k, x in leaves.items() if x is not None and x.requires_grad}
    if inputs and out.loss.requires_grad:
        found |= {f"d{k}": x for k, x in zip(inputs, torch.autograd.grad(out.loss, list(inputs.values())))}
    return found | {name: out.metrics[name].detach() for name in ("entropy", "mean_token_accuracy")}


def check_loss(case: LossCase) -> None:
    """Torch's error is at least what half an ulp of the operands does to the truth: a link may be an exponential.

    And what it is of nearly the same hidden states, for a loss is one number, which one rounding may happen to hit.
    """
    truth, same, got = (
        loss_call(case, impl, dtype)
        for impl, dtype in (("eager", FP64), ("eager", case.dtype), (case.impl, case.dtype))
    )
    assert got.keys() == truth.keys()
    moved = [loss_call(case, "eager", FP64, seed) for seed in range(1, 7)] if case.dtype == FP32 else []
    nearly = [
        [loss_call(case, "eager", dtype, factor=factor) for dtype in (FP32, FP64)]
        for factor in ((0.998, 0.999, 1.001, 1.002) if case.dtype == FP32 else ())
    ]
    for name, value in got.items():
        errors = [(other[name].double() - truth[name]).abs() for other in (same, *moved)]
        errors += [(other[name].double() - exact[name]).abs() for other, exact in nearly]
        torchs = truth[name] + torch.stack(errors).amax(0)
        try:
            assert_as_good_as_torch(value, torchs, truth[name], EPS.get(case.dtype, EPS_OF_FP32))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@FULL
def test_every_loss_from_hidden_states(full, small_tiles):
    run_cases(loss_cases(), check_loss, SHARES["loss"][full])
