"""A weighted sum of losses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from prefkern.layout import Layout
from prefkern.losses.base import Addend, Batch, Loss, Range, register
from prefkern.losses.dpo import DPO
from prefkern.losses.nll import NLL


def _any(name: str) -> property:
    return property(lambda self: any(getattr(part.loss, name) for part in self.addends()))


@register("combination")
@dataclass(frozen=True, kw_only=True)
class Combination(Loss):
    """Several losses of the same responses, each divided by its own normalizer.

        L = sum_i weight_i * L_i

    What a part adds of its own (`nll_weight`, or the parts of a combination) is multiplied too; equal addends are
    computed once. The parts must agree in how many responses a prompt has and in what targets say; `nll` goes with all
    others. The metrics are those of the first part that is not `nll`, and loss/NAME of each.

    Fields:
        parts: (weight, loss) of every part.
    Source:
        As TRL's lists of losses with loss_weights.
    """

    formula: ClassVar[str] = "sum_i weight_i L_i"
    source: ClassVar[str] = "TRL's lists of losses"
    confidence: ClassVar[str] = "third party"

    parts: tuple[tuple[float, Loss], ...] = ((1.0, DPO()), (1.0, NLL()))

    needs_reference = _any("needs_reference")
    needs_lengths = _any("needs_lengths")
    needs_first_pass = _any("needs_first_pass")
    couples_batch = _any("couples_batch")
    needs_token_weights = _any("needs_token_weights")
    needs_token_kl = _any("needs_token_kl")
    needs_mismatched = _any("needs_mismatched")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", tuple(_pairs(self.parts)))
        if not self.parts:
            raise ValueError(f"{self.name}: parts is empty; name at least one loss")
        others = [part.loss for part in self.addends() if part.loss.name != NLL.name]
        for what in ("arity", "target_kind"):
            known = {value: loss.name for loss in others if (value := getattr(loss, what)) is not None}
            if len(known) > 1:
                (a, first), (b, second), *_ = known.items()
                raise ValueError(f"{self.name}: {first} has {what} {a!r}, {second} has {b!r}; their parts must agree")

    def addends(self, state: nn.Module | None = None) -> tuple[Addend, ...]:
        """What the parts come to, `nll` last."""
        found: list[Addend] = []
        for i, (weight, loss) in enumerate(self.parts):
            for term in loss.addends(state[str(i)] if state is not None and str(i) in state else None):
                term = term._replace(weight=weight * term.weight)
                same = [k for k, other in enumerate(found) if other[1:] == term[1:]]
                if same and term.state is None:  # computed once, reported once
                    term = term._replace(weight=term.weight + found.pop(same[0]).weight)
                found.append(term)
        return tuple(sorted(found, key=lambda term: term.loss.name == NLL.name))

    @property
    def leading(self) -> Loss:
        """The first part that is not `nll`, or `nll`."""
        return self.addends()[0].loss

    @property
    def arity(self) -> Literal["pair", "single", "list"]:
        return self.leading.arity

    @property
    def target_kind(self) -> str | None:
        return next((kind for part in self.addends() if (kind := part.loss.target_kind)), None)

    @property
    def row_outputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.addends() for name in part.loss.row_outputs))

    @property
    def link(self) -> str:
        raise NotImplementedError(f"{self.name} has no link; its addends have")

    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        raise NotImplementedError(f"{self.name} has no value of scores; its addends have")

    def link_params(self) -> tuple[float, ...]:
        raise NotImplementedError(f"{self.name} has no link; its addends have")

    def segmented(self, layout: Layout) -> Layout:
        return self.leading.segmented(layout)

    def check_layout(self, layout: Layout) -> None:
        self.leading.check_layout(layout)

    def new_state(self) -> nn.Module | None:
        states = {str(i): loss.new_state() for i, (_, loss) in enumerate(self.parts)}
        states = {key: state for key, state in states.items() if state is not None}
        return nn.ModuleDict(states) if states else None

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        return self.leading.metrics(score_R, logp_R, batch)

    def metric_shares(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.leading.metric_shares(metrics)


def _pairs(parts: Any) -> Iterable[tuple[float, Loss]]:
    for part in parts:
        if not isinstance(part, Iterable) or len(part := tuple(part)) != 2 or not isinstance(part[1], Loss):
            raise ValueError(f"combination: {part!r} in parts must be a (weight, loss) tuple")
        if part[0] not in Range(0, 1000):
            raise ValueError(f"combination: weight={part[0]!r} of {part[1].name} must be a number in [0, 1000]")
        yield part
