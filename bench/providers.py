"""Who computes: plain torch, ours, and the peers that are installed, each brought to the same task.

A head provider maps (hidden (N, D), weight (V, D), labels (N,), softcap) to fp32 log-probabilities (N,). A DPO
provider maps (DpoInputs, hidden, weight) to a loss; every head provider is one too, with a tail in plain torch.
Peers run as their own trainers run them, with nothing but log-probabilities asked for; nobody's defaults are changed.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from bench.shapes import DEVICE, Shape
from prefkern.planner import interpreting

if TYPE_CHECKING:
    from bench.heads import DpoInputs

BASELINE = "torch"
BETA = 0.1

Logps = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]
DpoLoss = Callable[["DpoInputs", Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """Who computes, and where it can."""

    name: str
    run: Callable
    package: str | None = None  # what has to be installed
    compiles: bool = False  # by torch.compile: needs a C++ compiler on a CPU, and a run at the shape to warm up
    softcaps: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    # Bytes held at the peak for each element of the logits, roughly: only to leave out what cannot fit.
    logits_bytes: float = 0.0
    logits_items: float = 0.0  # the same in the dtype of the head, beside
    ours: bool = False
    optional: bool = False  # runs only when asked for by name

    def obstacle(self, shape: Shape, dtype: str) -> str | None:
        """Why it cannot compute this here, in words; None where it can."""
        interpreted = self.package == "triton" and interpreting() and dtype == "fp32"  # it multiplies no bf16
        if DEVICE.type not in self.devices and not interpreted:
            return f"does not run on {DEVICE.type}"
        if dtype not in self.dtypes:
            return f"is not run in {dtype}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.name.startswith("linear_ce") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        if self.compiles and not has_compiler():
            return "torch.compile needs a C++ compiler, and there is none"
        if shape.softcap and not self.softcaps:
            return "has no softcap"
        return None


def has_compiler() -> bool:
    """Whether torch.compile can build code for this device."""
    return DEVICE.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


# --- From hidden states to log-probabilities -----------------------------------------------------------------------


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Logits in the model's dtype, softmax in fp32: what trainers do without a kernel."""
    logps_NV = F.log_softmax(_logits(hidden, weight, softcap), dim=-1, dtype=torch.float32)
    return logps_NV.gather(1, labels[:, None])[:, 0]


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Plain torch at its fastest; its log-probabilities are rounded to the dtype of the logits."""
    return -F.cross_entropy(_logits(hidden, weight, softcap), labels, reduction="none").float()


def _linear_cross_entropy(chunked: bool) -> Logps:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()

    return logps


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """As TRL's own forward calls it: no bias, temperature 1, its vocabulary chunk, no extra outputs."""
    from trl.kernels import chunked_logprob

    return chunked_logprob.ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _TRL_CHUNK, softcap, 1.0, ()
    )[0]  # fmt: skip


_TRL_CHUNK = 32_768  # trl.trainer.utils sets it; importing that needs more than the kernel does


def _cce(impl: str, **options) -> Logps:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(
            hidden, weight, labels, softcap=softcap, reduction="none", impl=impl, **options
        ).float()  # fmt: skip

    return logps


def _prefkern(impl: str) -> Logps:
    return lambda hidden, weight, labels, softcap: (
        pk.token_logps(hidden, weight, labels, softcap=softcap, impl=impl).logps
    )


HEAD = (
    Provider(BASELINE, torch_logps, logits_bytes=14),
    # linear_ce without options is the same code, where torch has it.
    Provider("cross_entropy", _cross_entropy, logits_bytes=8, optional=hasattr(torch.nn, "LinearCrossEntropyOptions")),
    Provider("linear_ce", _linear_cross_entropy(False), softcaps=False, logits_bytes=8),
    # A minute a run in bf16 on a CPU.
    Provider("linear_ce_chunked", _linear_cross_entropy(True), softcaps=False, logits_bytes=1, optional=True),
    Provider("trl", _trl, "trl", logits_bytes=4),
    Provider("cce_compile", _cce("torch_compile"), "cut_cross_entropy", compiles=True, logits_bytes=8),
    # As it is installed: tiles whose gradient is small are left out. And with all of them.
    Provider("cce", _cce("cce"), "cut_cross_entropy", devices=("cuda",), dtypes=("bf16",)),
    Provider("cce_exact", _cce("cce", filter_eps=None), "cut_cross_entropy", devices=("cuda",), dtypes=("bf16",)),
    Provider("prefkern", _prefkern("auto"), ours=True),
    Provider("prefkern_cut", _prefkern("cut"), "triton", devices=("cuda",), ours=True),
    Provider("prefkern_eager", _prefkern("eager"), logits_bytes=14, ours=True, optional=True),
)


# --- From hidden states to a DPO loss ------------------------------------------------------------------------------


def dpo_tail(inputs: DpoInputs, logps: Tensor) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)), chosen and rejected sums of log-ratios; mean over the pairs."""
    ratio_PRT = (logps - inputs.ref_logps_N).view(-1, 2, inputs.length)
    chosen_P, rejected_P = ratio_PRT.sum(2).unbind(1)
    return -F.logsigmoid(BETA * (chosen_P - rejected_P)).mean()


def _with_tail(logps: Logps) -> DpoLoss:
    return lambda inputs, hidden, weight: dpo_tail(inputs, logps(hidden, weight, inputs.labels_N, inputs.softcap))


def _prefkern_dpo(impl: str) -> DpoLoss:
    def loss(inputs: DpoInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        return pk.linear_preference_loss(
            hidden, weight, inputs.labels_N, inputs.layout, inputs.loss, inputs.ref_logps_N, softcap=inputs.softcap,
            outputs=(), impl=impl,
        ).loss  # fmt: skip

    return loss


def _liger(compiled: bool) -> DpoLoss:
    """Liger's loss takes the chosen sequences, then the rejected ones. It reads no given reference log-probabilities:
    the suite's cancel within each pair, so it is run without a reference, which spares it a second head."""

    def loss(inputs: DpoInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        module = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, use_ref_model=False)
        return module(weight, inputs.stacked(hidden), inputs.stacked(inputs.labels_N))[0]

    return loss


DPO = (
    *(replace(p, run=_prefkern_dpo(p.name.partition("_")[2] or "auto") if p.ours else _with_tail(p.run)) for p in HEAD),
    Provider("prefkern_logps", _with_tail(_prefkern("auto")), ours=True),  # any loss: token_logps, then a tail
    Provider("liger", _liger(False), "liger_kernel", softcaps=False, logits_bytes=8),
    Provider("liger_compiled", _liger(True), "liger_kernel", softcaps=False, compiles=True, logits_bytes=8),
)


# --- What a machine allows -----------------------------------------------------------------------------------------


def _mm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def _onednn(hidden: Tensor, weight: Tensor) -> Tensor:
    """On a CPU torch multiplies fp32 matrices by MKL, which is not the fastest library on every processor."""
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")


def _has_onednn() -> bool:
    return DEVICE.type == "cpu" and torch.backends.mkldnn.is_available()


# One pass of the head alone, by every library at hand: the fastest is the roof.
ROOFS = (
    Provider("matmul", _mm, logits_items=1),
    *([Provider("onednn", _onednn, devices=("cpu",), dtypes=("fp32",), logits_items=1)] if _has_onednn() else []),
)
