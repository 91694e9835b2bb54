"""The suites that start from log-probabilities or from logits: no matrix product in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern as pk
from bench.providers import BASELINE, BETA, Provider
from bench.shapes import DEVICE, DTYPES, Shape
from bench.suite import Results, Suite, Work, gradients
from prefkern.planner import interpreting


@dataclass(frozen=True)
class TailInputs:
    """Log-probabilities of packed pairs, in nats."""

    logps_N: Tensor
    ref_logps_N: Tensor
    layout: pk.Layout
    response_of_token_N: Tensor
    loss: object = field(default_factory=lambda: pk.losses.get("dpo", beta=BETA))


def _torch_dpo(inputs: TailInputs, logps: Tensor) -> Tensor:
    ratio_N = logps - inputs.ref_logps_N
    ratio_R = logps.new_zeros(inputs.layout.num_responses).index_add(0, inputs.response_of_token_N, ratio_N)
    return -torch.nn.functional.logsigmoid(BETA * (ratio_R[0::2] - ratio_R[1::2])).mean()


def _prefkern_tail(impl: str) -> Callable[[TailInputs, Tensor], Tensor]:
    def loss(inputs: TailInputs, logps: Tensor) -> Tensor:
        return pk.preference_loss(logps, inputs.layout, inputs.loss, inputs.ref_logps_N, impl=impl).loss

    return loss


class Tail(Suite):
    """DPO from log-probabilities; ours makes the metrics too, which plain torch here does not."""

    name = "tail"
    flops = {"forward": 0, "backward": 0}
    iterations = 20
    dtypes = usual_dtypes = ("fp32",)  # log-probabilities are, whatever the model's dtype

    def __init__(self) -> None:
        own = (
            Provider("prefkern", _prefkern_tail("auto"), ours=True),
            Provider("prefkern_eager", _prefkern_tail("eager"), devices=("cuda",), ours=True),  # elsewhere auto is
        )
        super().__init__((Provider(BASELINE, _torch_dpo), *own))

    def rounds(self, dtype: str) -> int:
        return 5

    def work(self, kind: str, shape: Shape, dtype: str) -> Work:
        return Work(0, shape.n * (8 if kind == "forward" else 12))

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
        loss = self.providers[provider].run(inputs, logps)
        return {"loss": loss.detach().reshape(1), **gradients(loss, {"dlogps": logps})}

    def sample(self, results: Results, inputs: TailInputs) -> Results:
        return results

    def truth(self, inputs: TailInputs) -> Results:
        double = TailInputs(
            inputs.logps_N.double(), inputs.ref_logps_N.double(), inputs.layout, inputs.response_of_token_N
        )  # fmt: skip
        return self.step(BASELINE, "backward", double)


class LogitsInputs(NamedTuple):
    logits_NV: Tensor
    labels_N: Tensor
    upstream_N: Tensor  # dL/dlogp
    copied: tuple[Tensor, Tensor]  # source and destination of the roof


class Forwarded(NamedTuple):
    """What a backward pass starts from."""

    inputs: LogitsInputs
    logits_NV: Tensor
    logps_N: Tensor


def _torch_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, labels[:, None])[:, 0]


def _cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels, reduction="none").float()


def _prefkern_rows(logits: Tensor, labels: Tensor) -> Tensor:
    impl = "triton" if interpreting() else "auto"
    return pk.logits_token_logps(logits, labels, impl=impl).logps


class Logits(Suite):
    """Stored logits to log-probabilities, and backward by itself; ours writes the gradient over the logits.

    The roof is a copy on the device, of a size that no cache holds.
    """

    name = "logits"
    bound = "bytes"
    flops = {"forward": 0, "backward": 0}
    usual_dtypes = ("bf16",)
    copied_bytes = (1 << 30) if DEVICE.type == "cuda" else (64 << 20)

    def __init__(self) -> None:
        listed = (
            Provider(BASELINE, _torch_rows, logits_bytes=16),
            Provider("cross_entropy", _cross_entropy_rows, logits_bytes=12),
            Provider("prefkern", _prefkern_rows, logits_bytes=6, ours=True),
        )
        super().__init__(listed, (Provider("copy", lambda source, to: to.copy_(source)),))

    def work(self, kind: str, shape: Shape, dtype: str) -> Work:
        """Logits are read once in forward, read and written once in backward."""
        stored = shape.n * shape.v * DTYPES[dtype].itemsize
        return Work(0, stored + 16 * shape.n if kind == "forward" else 2 * stored + 16 * shape.n)

    def roof_work(self, shape: Shape, dtype: str) -> Work:
        return Work(0, 2 * self.copied_bytes)

    def inputs(self, shape: Shape, dtype: str) -> LogitsInputs:
        generator = torch.Generator(DEVICE).manual_seed(0)
        options = {"generator": generator, "device": DEVICE}
        logits = torch.randn(shape.n, shape.v, dtype=DTYPES[dtype], **options).mul_(2)
        labels = torch.randint(shape.v, (shape.n,), **options)
        source = torch.ones(self.copied_bytes // 4, device=DEVICE)
        return LogitsInputs(logits, labels, torch.randn(shape.n, **options), (source, torch.empty_like(source)))

    def prepare(self, provider: str, kind: str, inputs: LogitsInputs) -> LogitsInputs | Forwarded:
        """Forward, on logits of its own that are no leaf, as a head's are."""
        if kind == "forward" or provider in self.roofs:
            return inputs
        logits = inputs.logits_NV.detach().requires_grad_().clone()
        return Forwarded(inputs, logits, self.providers[provider].run(logits, inputs.labels_N))

    def step(self, provider: str, kind: str, prepared: LogitsInputs | Forwarded) -> Results:
        if provider in self.roofs:
            self.roofs[provider].run(*prepared.copied)
            return {}
        if isinstance(prepared, Forwarded):
            return gradients(prepared.logps_N, {"dlogits": prepared.logits_NV}, prepared.inputs.upstream_N)
        with torch.no_grad():
            return {"logps": self.providers[provider].run(prepared.logits_NV, prepared.labels_N)}

    def sample(self, results: Results, inputs: LogitsInputs) -> Results:
        """All log-probabilities, the gradient of 64 rows."""
        rows = {"logps": slice(None), "dlogits": slice(64)}
        return {name: result[rows[name]] for name, result in results.items()}

    def truth(self, inputs: LogitsInputs) -> Results:
        logits, labels = inputs.logits_NV, inputs.labels_N
        parts = zip(logits.split(64), labels.split(64), strict=True)
        logps = torch.cat([_torch_rows_in_double(x, y) for x, y in parts])
        first = logits[:64].double().requires_grad_()
        value = _torch_rows_in_double(first, labels[:64])
        return {"logps": logps, **gradients(value, {"dlogits": first}, inputs.upstream_N[:64].double())}


def _torch_rows_in_double(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
