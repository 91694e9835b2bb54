"""What a suite is: inputs, providers (who computes), passes (what is computed), and the truth in float64.

A suite knows the FLOPs and bytes that a pass cannot do without. A pass returns its results by name, so that every
provider is checked alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.providers import Provider
from bench.shapes import DEVICE, DTYPES, Shape, too_large

Results = dict[str, Tensor]


class Work(NamedTuple):
    """What a pass needs, whatever a provider spends: FLOPs, and bytes of inputs read once and results written once."""

    flops: int
    bytes: int


class Suite:
    """What the suites share: providers and roofs by name."""

    name: str
    flops: dict[str, int]  # of each pass, in multiples of NDV: what is recomputed to save memory is not counted
    bound = "flops"  # which part of the work the roofs bound, "flops" or "bytes"
    iterations = 1
    # Rows that are compared with float64: those of the shape itself up to here, else of the same head with this many.
    checked_rows = 1024
    dtypes = tuple(DTYPES)
    # What runs unless more is asked for.
    usual_dtypes = tuple(DTYPES)
    usual_passes: tuple[str, ...] = ()

    def __init__(self, listed: tuple[Provider, ...], roofs: tuple[Provider, ...] = ()) -> None:
        self.providers = {p.name: p for p in listed}
        self.roofs = {p.name: p for p in roofs}
        self.usual_providers = tuple(p.name for p in listed if not p.optional)

    def passes(self, asked: Sequence[str]) -> list[str]:
        return [kind for kind in self.flops if kind in (asked or self.usual_passes or self.flops)]

    def find(self, name: str) -> Provider:
        return self.roofs.get(name) or self.providers[name]

    def rounds(self, dtype: str) -> int:
        """fp32 is slow on a CPU."""
        return 10 if DEVICE.type == "cuda" else {"bf16": 5, "fp32": 3}[dtype]

    def checked(self, shape: Shape) -> Shape:
        """The shape whose results are compared with float64."""
        return shape._replace(n=min(shape.n, self.checked_rows), model="")

    def shapes(self, given: Sequence[Shape], models: Sequence[str], tokens: Sequence[int]) -> Sequence[Shape]:
        """What the suite runs at, of the shapes, models and numbers of tokens that were asked for."""
        return given

    def obstacle(self, provider: Provider, kind: str, shape: Shape, dtype: str, rate: float) -> str | None:
        """Why a case is left out here, in words; None where it runs."""
        flops = max(2, self.flops[kind])
        held = provider.logits_bytes + provider.logits_items * DTYPES[dtype].itemsize
        return provider.obstacle(shape, dtype) or too_large(shape, dtype, flops, held, kind == "trained", rate)

    def work(self, kind: str, shape: Shape, dtype: str) -> Work:
        raise NotImplementedError

    def roof_work(self, shape: Shape, dtype: str) -> Work:
        """Of one run of a roof."""
        raise NotImplementedError

    def inputs(self, shape: Shape, dtype: str) -> Any:
        raise NotImplementedError

    def prepare(self, provider: str, kind: str, inputs: Any) -> Any:
        """What has to be there before a pass, and is no part of its time; handed to `step` in place of the inputs."""
        return inputs

    def step(self, provider: str, kind: str, prepared: Any) -> Results:
        """Run one pass; gradients in the dtype of their inputs."""
        raise NotImplementedError

    def sample(self, results: Results, inputs: Any) -> Results:
        """The part of the results that is compared."""
        raise NotImplementedError

    def truth(self, inputs: Any) -> Results:
        """`sample` of the results in float64."""
        raise NotImplementedError


def gradients(value: Tensor, leaves: Results, upstream: Tensor | None = None) -> Results:
    """Of those leaves that want one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), upstream) if wanted else ()
    return dict(zip(wanted, found, strict=True))
