"""What every loss is: a frozen dataclass of run-time values, an eager definition, and the name of its link."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from prefkern.layout import Layout, TailIndex

_REGISTRY: dict[str, type[Loss]] = {}
L = TypeVar("L", bound="type[Loss]")


@dataclass(frozen=True)
class Range:
    """The values a field may take, and what its source recommends."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    recommended: str = ""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def ranged(
    default: float, low: float, high: float, recommended: str, *, open_low: bool = False, open_high: bool = False
) -> Any:
    """A dataclass field whose value must lie in a range; the range and the recommendation go into the error."""
    return field(default=default, metadata={"range": Range(low, high, open_low, open_high, recommended)})


def choice(default: str, *values: str) -> Any:
    """A dataclass field that takes one of a few strings."""
    return field(default=default, metadata={"choices": values})


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss over groups of segment scores.

        score_s = scale * sum over segment s of token_weight * (logp - ref_logp)
        loss    = sum_g weight_g * value(scores of group g, margin) / normalizer

    A subclass states the class variables, `eager` (the definition of `value`) and `link_params`; `scale`, `margin` and
    `group_weight` have defaults. Whatever these return is data: no gradient flows through it.
    """

    name: ClassVar[str] = ""
    link: ClassVar[str]  # function of prefkern.kernels.links that computes value and derivative
    arity: ClassVar[Literal["pair", "single"]]
    needs_reference: ClassVar[bool]
    formula: ClassVar[str]  # one line, for tables
    source: ClassVar[str]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, allowed, choices = getattr(self, f.name), f.metadata.get("range"), f.metadata.get("choices")
            if allowed is not None and value not in allowed:
                hint = f" ({allowed.recommended})" if allowed.recommended else ""
                raise ValueError(f"{self.name}: {f.name}={value!r} must be a number in {allowed}{hint}")
            if choices is not None and value not in choices:
                raise ValueError(f"{self.name}: {f.name}={value!r} must be one of {', '.join(map(repr, choices))}")

    @abstractmethod
    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """The definition: (G,) values of (G, K) scores, differentiable."""

    @abstractmethod
    def link_params(self) -> tuple[float, ...]:
        """The link's run-time scalars, at most four."""

    def segmented(self, layout: Layout) -> Layout:
        """The layout as this loss compares it; losses with the sum inside take an uncut one."""
        if layout.is_cut:
            raise ValueError(
                f"{self.name} compares whole responses, but the layout is cut into segments; pass the uncut layout,"
                " or use autoregressive_dpo"
            )
        return layout

    def scale(self, count_R: Tensor) -> Tensor | None:
        """(R,) factor of each response's scores, from its number of counted tokens; None for 1."""
        return None

    def margin(self, score_S: Tensor | None, layout: Layout) -> float | Tensor:
        """A number, or (G,), that the link subtracts."""
        return 0.0

    needs_scores: ClassVar[bool] = False  # whether `margin` wants the scores of a first pass

    def group_weight(self, index: TailIndex) -> Tensor | None:
        """(G,) weights of the groups' values, on the index's device; None for 1."""
        return None

    def normalizer(self, layout: Layout, count: Tensor) -> float | Tensor:
        """What the sum over groups is divided by if the caller names nothing: prompts."""
        return float(max(1, layout.num_prompts))

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError where the layout's groups do not have this loss's arity."""
        want = {"pair": 2, "single": 1}[self.arity]
        wrong = next((k for k in layout.group_sizes if k != want), None)
        if wrong is not None:
            build = "Layout.pairs" if want == 2 else "Layout.sequences"
            raise ValueError(
                f"{self.name} takes {want} response(s) a prompt, but the layout has one with {wrong}; use {build}"
            )

    @abstractmethod
    def metrics(self, ratio_R: Tensor, logp_R: Tensor) -> dict[str, Tensor]:
        """Means over the batch, 0-dim on the device, from each response's scaled log-ratio sum and its log-prob sum."""


@dataclass(frozen=True, kw_only=True)
class PairLoss(Loss):
    """A loss of one chosen and one rejected response; needs a field `beta`."""

    arity: ClassVar[Literal["pair", "single"]] = "pair"

    def metrics(self, ratio_R: Tensor, logp_R: Tensor) -> dict[str, Tensor]:
        """rewards/* with reward = beta * scaled log-ratio sum; logps/* in nats a response; accuracies in [0, 1]."""
        chosen, rejected = (self.beta * ratio_R).view(-1, 2).unbind(1)
        logp_chosen, logp_rejected = logp_R.view(-1, 2).unbind(1)
        return {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
            "logps/chosen": logp_chosen.mean(),
            "logps/rejected": logp_rejected.mean(),
        }


def smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(x) - e log sigma(-x)."""
    sigmoid = torch.nn.functional.logsigmoid
    if label_smoothing == 0:
        return -sigmoid(x)
    return -(1 - label_smoothing) * sigmoid(x) - label_smoothing * sigmoid(-x)


def register(name: str) -> Callable[[L], L]:
    """Class decorator: under this name `get`, the trainer, the command line and the common checks find the loss."""

    def add(cls: L) -> L:
        if name in _REGISTRY:
            raise ValueError(f"a loss named {name!r} is registered already: {_REGISTRY[name].__name__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> tuple[str, ...]:
    """Names of all registered losses, sorted."""
    return tuple(sorted(_REGISTRY))


def loss_class(name: str) -> type[Loss]:
    """The class registered under a name.

    Raises:
        ValueError: unknown name; the nearest one is suggested.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, names())}; known are {', '.join(names())}")
    return _REGISTRY[name]


def options(name: str) -> tuple[str, ...]:
    """Names of a loss's fields."""
    return tuple(f.name for f in dataclasses.fields(loss_class(name)))


def get(name: str, **fields: Any) -> Loss:
    """The loss of this name with these field values.

    Raises:
        ValueError: unknown name or field (the nearest is suggested), or a value out of range.
    """
    cls, known = loss_class(name), options(name)
    for key in fields:
        if key not in known:
            raise ValueError(
                f"{name} has no option {key!r}{_nearest(key, known)}; its options are {', '.join(known) or 'none'}"
            )
    return cls(**fields)


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
