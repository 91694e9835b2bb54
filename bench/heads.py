"""The suites that multiply by the head: log-probabilities, against sizes and models, and a whole DPO loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import prefkern as pk
from bench import providers
from bench.providers import BETA, Provider
from bench.shapes import DEVICE, DTYPES, Shape, model_shapes, scaling_shapes
from bench.suite import Results, Suite, Work, gradients


class HeadInputs(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    upstream_N: Tensor  # dL/dlogp
    softcap: float | None


class Head(Suite):
    """Hidden states to log-probabilities, and the gradient for an upstream that has nothing to do with them.

    The passes with a gradient run when asked for: the `dpo` suite times the same work, with everybody in it.
    """

    name = "head"
    usual_passes = ("forward",)
    flops = {"forward": 2, "frozen": 4, "trained": 6}

    def __init__(self) -> None:
        super().__init__(providers.HEAD, providers.ROOFS)

    def work(self, kind: str, shape: Shape, dtype: str) -> Work:
        item, n, d, v = DTYPES[dtype].itemsize, shape.n, shape.d, shape.v
        grads = {"forward": 0, "frozen": n * d, "trained": n * d + v * d}[kind]
        return Work(self.flops[kind] * shape.ndv, (n * d + v * d + grads) * item + n * (8 + 4 + 4))

    def roof_work(self, shape: Shape, dtype: str) -> Work:
        read_and_written = shape.n * shape.d + shape.v * shape.d + shape.n * shape.v
        return Work(2 * shape.ndv, DTYPES[dtype].itemsize * read_and_written)

    def inputs(self, shape: Shape, dtype: str) -> HeadInputs:
        """The same in every process: logits near N(0, 1), upstream gradients of both signs."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        options = {"generator": generator, "device": DEVICE}
        hidden = torch.randn(shape.n, shape.d, dtype=DTYPES[dtype], **options)
        weight = torch.randn(shape.v, shape.d, dtype=DTYPES[dtype], **options).mul_(shape.d**-0.5)
        labels = torch.randint(shape.v, (shape.n,), **options)
        return HeadInputs(hidden, weight, labels, torch.randn(shape.n, **options), shape.softcap)

    def step(self, provider: str, kind: str, inputs: HeadInputs) -> Results:
        if provider in self.roofs:
            return multiply(self.roofs[provider], inputs.hidden_ND, inputs.weight_VD)
        run = self.providers[provider].run
        leaves = head_leaves(inputs.hidden_ND, inputs.weight_VD, kind)
        with torch.set_grad_enabled(kind != "forward"):
            logps = run(leaves["dhidden"], leaves["dweight"], inputs.labels_N, inputs.softcap)
        return {"logps": logps.detach(), **gradients(logps, leaves, inputs.upstream_N)}

    def sample(self, results: Results, inputs: HeadInputs) -> Results:
        """All log-probabilities, dhidden of 64 rows, dweight of some vocabulary entries."""
        entries = some_entries(inputs.labels_N, inputs.weight_VD.shape[0])
        rows = {"logps": slice(None), "dhidden": slice(64), "dweight": entries}
        return {name: result[rows[name]] for name, result in results.items()}

    def truth(self, inputs: HeadInputs) -> Results:
        """`sample` of the results in float64; the whole gradients would take minutes on a CPU."""
        return head_truth(inputs, lambda logps: inputs.upstream_N.double())


def multiply(roof: Provider, hidden: Tensor, weight: Tensor) -> Results:
    with torch.no_grad():
        roof.run(hidden, weight)
    return {}


def head_leaves(hidden: Tensor, weight: Tensor, kind: str) -> Results:
    """The parameters by the name of their gradient."""
    return {
        "dhidden": hidden.detach().requires_grad_(kind != "forward"),
        "dweight": weight.detach().requires_grad_(kind == "trained"),
    }


def some_entries(labels: Tensor, vocab: int) -> Tensor:
    """Some vocabulary entries that are labels, some spread over all."""
    return torch.cat([labels[:512], torch.linspace(0, vocab - 1, 512, device=labels.device).long()])


def head_truth(inputs, upstream_of: Callable[[Tensor], Tensor]) -> Results:
    """Log-probabilities and a sample of the gradients in float64, by blocks of the rows and of the vocabulary."""
    hidden, weight, labels = inputs.hidden_ND.double(), inputs.weight_VD, inputs.labels_N
    rows, entries = len(labels), some_entries(labels, len(weight))
    cap = inputs.softcap

    def logits(block: Tensor) -> Tensor:
        z = torch.cat([hidden[block] @ part.double().T for part in weight.split(16_384)], 1)
        return z if cap is None else z.div_(cap).tanh_().mul_(cap)

    blocks = torch.arange(rows, device=hidden.device).split(256)
    logps_NV = [logits(block).log_softmax(-1) for block in blocks]
    logps = torch.cat([x.gather(1, labels[block, None])[:, 0] for x, block in zip(logps_NV, blocks, strict=True)])
    g = upstream_of(logps)
    results = {"logps": logps, "dweight": torch.zeros_like(hidden[:1]).expand(len(entries), -1).clone()}
    for x, block in zip(logps_NV, blocks, strict=True):
        slope = 1.0 if cap is None else 1 - (logits(block) / cap).square_()
        dlogits = x.exp_().mul_(-g[block, None])
        dlogits.scatter_add_(1, labels[block, None], g[block, None]).mul_(slope)
        if "dhidden" not in results:
            first = dlogits[:64]
            parts = zip(first.split(16_384, 1), weight.split(16_384), strict=True)
            results["dhidden"] = sum(dz @ part.double() for dz, part in parts)
        results["dweight"] += dlogits[:, entries].T @ hidden[block]
    return results


@dataclass(frozen=True)
class DpoInputs:
    """Pairs of responses of one length, packed chosen, rejected, chosen, ..., so that a padded peer pads nothing."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    ref_logps_N: Tensor  # of a uniform reference
    layout: pk.Layout
    length: int
    softcap: float | None
    loss: object = field(default_factory=lambda: pk.losses.get("dpo", beta=BETA))

    def stacked(self, packed: Tensor) -> Tensor:
        """(2 pairs, length, ...): all chosen responses, then all rejected ones."""
        return packed.unflatten(0, (-1, 2, self.length)).transpose(0, 1).flatten(0, 1)


class Scaling(Head):
    """The head against N and against V: ours, and for comparison one peer that holds the logits."""

    name = "scaling"
    usual_dtypes = ("bf16",)
    usual_passes = ("forward", "frozen", "trained")
    checked_rows = 256

    def __init__(self) -> None:
        super().__init__()
        self.usual_providers = ("prefkern", "cross_entropy")

    def obstacle(self, provider: Provider, kind: str, shape: Shape, dtype: str, rate: float) -> str | None:
        is_peer = not provider.ours and provider.name not in self.roofs
        if is_peer and (kind != "frozen" or shape.n > 4096):
            return "compared where the head is frozen, up to N 4096"
        return super().obstacle(provider, kind, shape, dtype, rate)

    def rounds(self, dtype: str) -> int:
        return 3

    def shapes(self, given: Sequence[Shape], models: Sequence[str], tokens: Sequence[int]) -> Sequence[Shape]:
        return scaling_shapes()


class Models(Head):
    """The heads of real models at several numbers of tokens."""

    name = "models"
    usual_dtypes = ("bf16",)
    checked_rows = 256
    usual_passes = ("frozen", "trained")

    def __init__(self) -> None:
        super().__init__()
        self.usual_providers = ("prefkern", "torch", "cross_entropy", "cce_compile", "cce")

    def rounds(self, dtype: str) -> int:
        return 3 if DEVICE.type == "cpu" else 10

    def shapes(self, given: Sequence[Shape], models: Sequence[str], tokens: Sequence[int]) -> Sequence[Shape]:
        return model_shapes(models, tokens)


class Dpo(Suite):
    """Hidden states to the DPO loss of given reference log-probabilities, and its gradient."""

    name = "dpo"
    flops = {"frozen": 4, "trained": 6}
    length = 256  # tokens of a response, where N allows

    def __init__(self) -> None:
        super().__init__(providers.DPO, providers.ROOFS)
        self.head = Head()

    def work(self, kind: str, shape: Shape, dtype: str) -> Work:
        return self.head.work(kind, shape, dtype)

    def roof_work(self, shape: Shape, dtype: str) -> Work:
        return self.head.roof_work(shape, dtype)

    def inputs(self, shape: Shape, dtype: str) -> DpoInputs:
        hidden, weight, labels, _, softcap = self.head.inputs(shape, dtype)
        length = max(t for t in range(1, self.length + 1) if shape.n % (2 * t) == 0)
        pairs = shape.n // (2 * length)
        ref = torch.full((shape.n,), -(torch.tensor(float(shape.v)).log().item()), device=DEVICE)
        layout = pk.Layout.pairs([length] * pairs, [length] * pairs)
        return DpoInputs(hidden, weight, labels, ref, layout, length, softcap)

    def step(self, provider: str, kind: str, inputs: DpoInputs) -> Results:
        if provider in self.roofs:
            return multiply(self.roofs[provider], inputs.hidden_ND, inputs.weight_VD)
        leaves = head_leaves(inputs.hidden_ND, inputs.weight_VD, kind)
        loss = self.providers[provider].run(inputs, leaves["dhidden"], leaves["dweight"])
        return {"loss": loss.detach().reshape(1), **gradients(loss, leaves)}

    def sample(self, results: Results, inputs: DpoInputs) -> Results:
        entries = some_entries(inputs.labels_N, inputs.weight_VD.shape[0])
        rows = {"loss": slice(None), "dhidden": slice(64), "dweight": entries}
        return {name: result[rows[name]] for name, result in results.items()}

    def truth(self, inputs: DpoInputs) -> Results:
        kept = {}

        def upstream(logps: Tensor) -> Tensor:
            logps = logps.requires_grad_()
            kept["loss"] = providers.dpo_tail(inputs, logps)
            return torch.autograd.grad(kept["loss"], logps)[0]

        results = head_truth(inputs, upstream)
        # A loss is as exact as the sums that it compares: their size, not its own, is what its error is relative to.
        ratio_PT = (results.pop("logps").detach() - inputs.ref_logps_N).view(-1, 2 * inputs.length)
        scale = BETA * ratio_PT.abs().sum(1).mean().reshape(1)
        return {"loss": kept["loss"].detach().reshape(1), "loss_scale": scale, **results}
