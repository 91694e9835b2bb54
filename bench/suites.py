"""What is measured: the head (hidden states to token log-probabilities) and the tail (those to a loss).

A suite knows its inputs, its providers (who computes), its passes (what is computed), the FLOPs that a pass cannot
do without, and the truth in float64. A pass returns its results by name, so that every provider is checked alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BASELINE = "torch"
CEILING = "matmul"

Results = dict[str, Tensor]


class Shape(NamedTuple):
    """N response tokens, D hidden, V vocabulary."""

    n: int = 1024
    d: int = 1024
    v: int = 128_256


class HeadInputs(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    upstream_N: Tensor  # dL/dlogp


def _torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps_NV = F.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    return logps_NV.gather(1, labels[:, None])[:, 0]


def _cross_entropy_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain torch at its fastest; its log-probabilities are rounded to the dtype of the logits."""
    return -F.cross_entropy(hidden @ weight.T, labels, reduction="none").float()


def _matmul(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """One pass of the head alone: the rate that the machine allows at this shape."""
    return (hidden @ weight.T).gather(1, labels[:, None])[:, 0].float()


def _prefkern(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, weight, labels: pk.token_logps(hidden, weight, labels, impl=impl).logps


class Head:
    """Token log-probabilities, and their gradient where the head is frozen or trained."""

    name = "head"
    # Multiples of NDV that the result needs: what is recomputed to save memory is not counted.
    flops = {"forward": 2, "frozen": 4, "trained": 6}
    providers = {
        BASELINE: _torch_logps,
        "cross_entropy": _cross_entropy_logps,
        "eager": _prefkern("eager"),
        "chunked": _prefkern("chunked"),
        "cut": _prefkern("cut"),
        CEILING: _matmul,
    }
    iterations = 1

    def runs(self, provider: str, dtype: str, kind: str) -> bool:
        """Whether the case makes sense here."""
        if provider == CEILING:
            return kind == "forward"
        if provider in ("cross_entropy", "eager"):
            return dtype != "fp32"  # where they do the same as the baseline, and a CPU takes minutes for it
        return provider != "cut" or DEVICE.type == "cuda"

    def rounds(self, dtype: str) -> int:
        """So many that all of it takes minutes: fp32 is slow on a CPU."""
        return 10 if DEVICE.type == "cuda" else {"bf16": 3, "fp32": 2}[dtype]

    def inputs(self, shape: Shape, dtype: str) -> HeadInputs:
        """The same in every process: logits near N(0, 1), upstream gradients of both signs."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        options = {"generator": generator, "device": DEVICE}
        hidden = torch.randn(shape.n, shape.d, dtype=DTYPES[dtype], **options)
        weight = torch.randn(shape.v, shape.d, dtype=DTYPES[dtype], **options).mul_(shape.d**-0.5)
        labels = torch.randint(shape.v, (shape.n,), **options)
        return HeadInputs(hidden, weight, labels, torch.randn(shape.n, **options))

    def step(self, provider: str, kind: str, inputs: HeadInputs) -> Results:
        """Run one pass; gradients in the dtype of their inputs."""
        hidden = inputs.hidden_ND.detach().requires_grad_(kind != "forward")
        weight = inputs.weight_VD.detach().requires_grad_(kind == "trained")
        logps = self.providers[provider](hidden, weight, inputs.labels_N)
        leaves = {"dhidden": hidden, "dweight": weight}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(logps, list(leaves.values()), inputs.upstream_N) if leaves else ()
        return {"logps": logps.detach(), **dict(zip(leaves, grads, strict=True))}

    def sample(self, results: Results, inputs: HeadInputs) -> Results:
        """All log-probabilities, dhidden of 64 rows, dweight of the vocabulary entries of `_entries`."""
        rows = {"logps": slice(None), "dhidden": slice(64), "dweight": self._entries(inputs)}
        return {name: result[rows[name]] for name, result in results.items()}

    def truth(self, inputs: HeadInputs) -> Results:
        """`sample` of the results in float64, by blocks of rows; the whole gradients would take minutes on a CPU."""
        hidden, weight = inputs.hidden_ND.double(), inputs.weight_VD.double()
        upstream, labels, entries = inputs.upstream_N.double(), inputs.labels_N, self._entries(inputs)
        logps, dhidden, dweight = [], [], torch.zeros(len(entries), hidden.shape[1], dtype=torch.float64, device=DEVICE)
        for block in torch.arange(len(labels), device=DEVICE).split(64):
            dlogits = (hidden[block] @ weight.T).log_softmax(-1)
            logps.append(dlogits.gather(1, labels[block, None])[:, 0])
            dlogits = dlogits.exp_().mul_(-upstream[block, None])
            dlogits.scatter_add_(1, labels[block, None], upstream[block, None])
            if not dhidden:
                dhidden.append(dlogits @ weight)
            dweight += dlogits[:, entries].T @ hidden[block]
        return {"logps": torch.cat(logps), "dhidden": dhidden[0], "dweight": dweight}

    def _entries(self, inputs: HeadInputs) -> Tensor:
        """Some vocabulary entries that are labels, some spread over all."""
        vocab = inputs.weight_VD.shape[0]
        spread = torch.linspace(0, vocab - 1, 512, device=DEVICE).long()
        return torch.cat([inputs.labels_N[:512], spread])


@dataclass(frozen=True)
class TailInputs:
    """Log-probabilities of packed pairs, in nats."""

    logps_N: Tensor
    ref_logps_N: Tensor
    layout: pk.Layout
    response_of_token_N: Tensor
    loss: object = field(default_factory=lambda: pk.losses.get("dpo", beta=0.1))


def _torch_dpo(inputs: TailInputs, logps: Tensor) -> Tensor:
    ratio_N = logps - inputs.ref_logps_N
    ratio_R = logps.new_zeros(inputs.layout.num_responses).index_add(0, inputs.response_of_token_N, ratio_N)
    return -F.logsigmoid(0.1 * (ratio_R[0::2] - ratio_R[1::2])).mean()


def _prefkern_dpo(impl: str) -> Callable[[TailInputs, Tensor], Tensor]:
    def loss(inputs: TailInputs, logps: Tensor) -> Tensor:
        return pk.preference_loss(logps, inputs.layout, inputs.loss, inputs.ref_logps_N, impl=impl).loss

    return loss


class Tail:
    """DPO from log-probabilities; ours makes the metrics too, which plain torch here does not."""

    name = "tail"
    flops: dict[str, int] = {"forward": 0, "backward": 0}
    providers = {BASELINE: _torch_dpo, "eager": _prefkern_dpo("eager"), "triton": _prefkern_dpo("triton")}
    iterations = 20

    def runs(self, provider: str, dtype: str, kind: str) -> bool:
        """Log-probabilities are fp32 whatever the model's dtype."""
        return dtype == "fp32" and (provider != "triton" or DEVICE.type == "cuda")

    def rounds(self, dtype: str) -> int:
        return 5

    def inputs(self, shape: Shape, dtype: str) -> TailInputs:
        """Four pairs of responses, of unequal lengths that add up to N."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        logps, ref = -torch.rand(2, shape.n, generator=generator, device=DEVICE).mul_(4)
        longer, shorter = shape.n // 4 - shape.n // 10, shape.n // 10
        chosen, rejected = [longer, shorter] * 2, [shorter, longer] * 2
        chosen[0] += shape.n - 4 * (shape.n // 4)
        layout = pk.Layout.pairs(chosen, rejected)
        lengths = torch.tensor([n for pair in zip(chosen, rejected, strict=True) for n in pair], device=DEVICE)
        responses = torch.arange(len(lengths), device=DEVICE)
        return TailInputs(logps, ref, layout, responses.repeat_interleave(lengths))

    def step(self, provider: str, kind: str, inputs: TailInputs) -> Results:
        logps = inputs.logps_N.detach().requires_grad_(kind == "backward")
        loss = self.providers[provider](inputs, logps)
        grads = {"dlogps": torch.autograd.grad(loss, logps)[0]} if logps.requires_grad else {}
        return {"loss": loss.detach().reshape(1), **grads}

    def sample(self, results: Results, inputs: TailInputs) -> Results:
        return results

    def truth(self, inputs: TailInputs) -> Results:
        double = TailInputs(
            inputs.logps_N.double(), inputs.ref_logps_N.double(), inputs.layout, inputs.response_of_token_N
        )  # fmt: skip
        return self.step(BASELINE, "backward", double)


SUITES = {suite.name: suite for suite in (Head(), Tail())}
