"""What every loss is: a frozen dataclass of run-time values, an eager definition, and the name of its link."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from prefkern.layout import Layout, TailIndex

_REGISTRY: dict[str, type[Loss]] = {}
_numbers = itertools.count()
_LIVE: weakref.WeakValueDictionary[str, Loss] = weakref.WeakValueDictionary()
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


def variant(default: Any, *, optional: bool = False, number: type | None = None, **kinds: type) -> Any:
    """A dataclass field that holds one of a few small objects, written by kind in YAML: {kind: {field: value}}.

    Args:
        default: an object of one of the kinds, or None.
        optional: whether None is allowed.
        number: the kind that a bare number stands for, its only field; None: a number is an error.
        kinds: the class behind each name.
    """
    return field(default=default, metadata={"kinds": kinds, "optional": optional, "number": number})


def check_fields(given: Any, name: str) -> None:
    """Raise ValueError where a field's value is not what `ranged`, `choice` or `variant` allow; `name` starts it."""
    for f in dataclasses.fields(given):
        value, allowed, choices = getattr(given, f.name), f.metadata.get("range"), f.metadata.get("choices")
        if allowed is not None and value not in allowed:
            hint = f" ({allowed.recommended})" if allowed.recommended else ""
            raise ValueError(f"{name}: {f.name}={value!r} must be a number in {allowed}{hint}")
        if choices is not None and value not in choices:
            raise ValueError(f"{name}: {f.name}={value!r} must be one of {', '.join(map(repr, choices))}")
        kinds, number = f.metadata.get("kinds"), f.metadata.get("number")
        if number is not None and isinstance(value, int | float) and not isinstance(value, bool):
            value = number(value)
            object.__setattr__(given, f.name, value)
        if kinds is not None and not isinstance(value, tuple(kinds.values())):
            if not (value is None and f.metadata["optional"]):
                known = ["a number"] * (number is not None) + [cls.__name__ for cls in kinds.values()]
                known = ", ".join(known + ["None"] * f.metadata["optional"])
                raise ValueError(f"{name}: {f.name}={value!r} must be one of {known}")


@dataclass(frozen=True)
class Batch:
    """What a loss may look at to make its constants; nothing in it carries a gradient.

    "Counted" tokens are those that mask and ignore_index leave. Suffixes: N packed rows, R responses.
    """

    layout: Layout  # as the loss compares it
    index: TailIndex
    count_R: Tensor  # counted tokens
    mask_N: Tensor | None = None  # bool, whether a row counts; None: all do
    weights_N: Tensor | None = None  # of the log-ratios, 0 where a row does not count; None: 1 everywhere
    target_R: Tensor | None = None  # what the data says of each response, see Loss.target_kind
    mismatched_R: Tensor | None = None  # log-ratio sums of other prompts' responses, where Loss.needs_mismatched
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) outputs of token_logps, see Loss.row_outputs
    state: nn.Module | None = None  # see Loss.new_state
    vocab_size: int | None = None  # V, where the caller said
    # The first pass, None unless Loss.needs_first_pass:
    logps_N: Tensor | None = None
    logp_R: Tensor | None = None  # weighted sums of log-probabilities
    ref_R: Tensor | None = None  # the reference's, 0 where the loss has none
    ratio_R: Tensor | None = None  # logp_R - ref_R, added up token by token: the two may be large and nearly equal

    def pairs(self, values_R: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) values of the chosen and of the rejected responses."""
        chosen, rejected = values_R.view(-1, 2).unbind(1)
        return chosen, rejected

    def token_means(self, values_N: Tensor) -> Tensor:
        """(R,) means over each response's counted tokens, whatever their weights; 0 where none counts."""
        from prefkern import reference

        kept = values_N if self.mask_N is None else torch.where(self.mask_N, values_N, 0.0)
        return reference.span_sums(kept, self.index.response_offsets) / self.count_R.clamp(min=1)


class Addend(NamedTuple):
    """One term of a loss: weight * loss."""

    weight: float
    loss: Loss
    state: nn.Module | None


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss over groups of segment scores.

        score_s = scale * sum over segment s of token_weight * (logp - ref_logp)
        loss    = sum_g weight_g * value(scores of group g, targets of group g, margin_g) / normalizer

    A subclass states the class variables, `eager` (the definition of `value`) and `link_params`; all the rest has
    defaults. What `scale`, `margin`, `target`, `group_weight` and `token_factor` return is data: no gradient flows
    through it. Class variables may be properties where an option decides.
    """

    name: ClassVar[str] = ""
    link: ClassVar[str]  # function of prefkern.kernels.links that computes value and derivative, or the function
    arity: ClassVar[Literal["pair", "single", "list"]]  # responses a prompt: 2, 1, any number
    needs_reference: ClassVar[bool]
    formula: ClassVar[str]  # one line, for tables
    source: ClassVar[str]
    confidence: ClassVar[str] = "paper"  # where the formula was read: paper, authors' code, third party, derived

    needs_lengths: ClassVar[bool] = False  # whether the number of counted tokens enters the formula
    needs_first_pass: ClassVar[bool] = False  # whether constants depend on the batch's log-probabilities
    couples_batch: ClassVar[bool] = False  # whether one prompt's value depends on the other prompts
    needs_token_weights: ClassVar[bool] = False
    needs_token_kl: ClassVar[bool] = False  # see `with_token_kl`
    needs_mismatched: ClassVar[bool] = False  # log-ratio sums of mismatched prompts and responses
    row_outputs: ClassVar[tuple[str, ...]] = ()  # outputs of token_logps that `Batch.stats` shall hold
    # What the data says of each response: "score" (any real number), "label" (1 desirable, 0 not), or "preference"
    # (probability that it is preferred to the other of its pair); None: nothing.
    target_kind: ClassVar[Literal["score", "label", "preference"] | None] = None
    link_targets: ClassVar[bool] = False  # whether `eager` and the link read a target per member

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        self._take_key()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_key()  # a copy's own: the original's may be another loss's in this process

    def _take_key(self) -> None:
        """The string that stands for this object where only a constant may, in a traced graph."""
        key = f"{self.name}#{next(_numbers)}"
        object.__setattr__(self, "key", key)
        _LIVE[key] = self

    @staticmethod
    def of_key(key: str) -> Loss:
        """The loss whose `key` this is; KeyError where nothing refers to it any more."""
        return _LIVE[key]

    @abstractmethod
    def eager(self, score_GK: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """The definition: (G,) values of (G, K) scores, differentiable.

        Where `link_targets` is set it takes two more: target_GK, and valid_GK (bool, False at padding).
        """

    @abstractmethod
    def link_params(self) -> tuple[float, ...]:
        """The link's run-time scalars, at most six."""

    def segmented(self, layout: Layout) -> Layout:
        """The layout as this loss compares it; losses with the sum inside take an uncut one."""
        if layout.is_cut:
            raise ValueError(
                f"{self.name} compares whole responses, but the layout is cut into segments; pass the uncut layout,"
                " or use autoregressive_dpo"
            )
        return layout

    def scale(self, batch: Batch) -> Tensor | None:
        """(R,) factor of each response's scores; None for 1."""
        return None

    def margin(self, batch: Batch) -> float | Tensor:
        """A number, or (G,), handed to the link; most links subtract it."""
        return 0.0

    def target(self, batch: Batch) -> Tensor | None:
        """(R,) targets handed to the link, made of `Batch.target_R`."""
        return batch.target_R

    def group_weight(self, batch: Batch) -> Tensor | None:
        """(G,) weights of the groups' values; None for 1."""
        return None

    def token_factor(self, batch: Batch) -> Tensor | None:
        """(N,) factor of the token weights, made before there is a first pass; None for 1."""
        return None

    def regroup(self, batch: Batch) -> TailIndex:
        """The index that the tail runs on, for losses that compare responses across prompts."""
        return batch.index

    def with_token_kl(self, logps_N: Tensor, kl_N: Tensor, index: TailIndex) -> Tensor:
        """(N,) log-probabilities plus this loss's share of the per-token KL divergence, differentiable in both."""
        raise NotImplementedError(f"{self.name} has no KL term")

    def normalizer(self, layout: Layout, count_R: Tensor) -> float | Tensor:
        """What the sum over groups is divided by if the caller names nothing: prompts. `layout` is cut already."""
        return float(max(1, layout.num_prompts))

    def normalizers(self, layout: Layout, count_R: Tensor) -> tuple[float | Tensor, ...]:
        """The normalizer of every addend, from an uncut layout."""
        return tuple(p.loss.normalizer(p.loss.segmented(layout), count_R) for p in self.addends())

    def addends(self, state: nn.Module | None = None) -> tuple[Addend, ...]:
        """The terms whose weighted sum this loss is; itself unless it is a sum."""
        return (Addend(1.0, self, state),)

    @property
    def is_one(self) -> bool:
        """Whether this loss is no sum, so that it goes through one tail."""
        addends = self.addends()
        return len(addends) == 1 and addends[0].weight == 1 and addends[0].loss is self

    def new_state(self) -> nn.Module | None:
        """Running statistics as buffers of a new module, updated by calls in training mode; None: it has none."""
        return None

    def uncorrected(self) -> Loss | None:
        """The loss whose scale and target this one corrects by a coefficient, for diagnostics; None: there is none."""
        return None

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError where the layout's groups do not have this loss's arity."""
        want = {"pair": 2, "single": 1}.get(self.arity)
        wrong = next((k for k in layout.group_sizes if k != want), None)
        if want is not None and wrong is not None:
            build = "Layout.pairs" if want == 2 else "Layout.sequences"
            raise ValueError(
                f"{self.name} takes {want} response(s) a prompt, but the layout has one with {wrong}; use {build}"
            )

    @abstractmethod
    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch, 0-dim on the device.

        Args:
            score_R: scaled, weighted log-ratio sum of each response.
            logp_R: log-probability of each response, in nats, unscaled and unweighted.
            batch: what the constants were made of.
        """

    def metric_shares(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The share of the call's prompts that a metric is a mean over, for those of `metrics` that leave some out."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PairLoss(Loss):
    """A loss of one chosen and one rejected response; needs a field `beta`.

    Fields of every pair loss:
        nll_weight: adds nll_weight times `nll` of the chosen response (mean over the batch's chosen tokens).
        ld_alpha: multiplies the log-ratios of tokens beyond the shorter response of the pair, both counted without
            masked tokens; None: 1. LD-DPO's length desensitising, arXiv:2409.06411; lengths stay what they are.
        wpo: weights each pair by exp of both responses' mean of logp - log sum_v p^2, without gradient. WPO,
            arXiv:2406.11827, eq. 2, as in TRL's code: no limit from above (its earlier releases cut the weight at 1).
    """

    arity: ClassVar[Literal["pair", "single", "list"]] = "pair"

    nll_weight: float = ranged(0.0, 0, 1000, "0, or 0.2 to 1 to keep the chosen likely")
    ld_alpha: float | None = None
    wpo: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ld_alpha is not None and self.ld_alpha not in Range(0, 1):
            raise ValueError(f"{self.name}: ld_alpha={self.ld_alpha!r} must be a number in [0, 1], or None for 1")

    @property
    def needs_first_pass(self) -> bool:
        return self.wpo

    @property
    def row_outputs(self) -> tuple[str, ...]:
        return ("log_collision",) if self.wpo else ()

    def addends(self, state: nn.Module | None = None) -> tuple[Addend, ...]:
        mine = Addend(1.0, self, state)
        return (mine, Addend(self.nll_weight, loss_class("nll")(), None)) if self.nll_weight else (mine,)

    def token_factor(self, batch: Batch) -> Tensor | None:
        if self.ld_alpha is None:
            return None
        offsets, num_tokens = batch.index.response_offsets, batch.layout.num_tokens
        lengths = offsets.diff()

        def rows(values_R: Tensor) -> Tensor:
            return values_R.repeat_interleave(lengths, output_size=num_tokens)

        ones_N = batch.count_R.new_ones(num_tokens)
        counted_N = (ones_N.bool() if batch.mask_N is None else batch.mask_N).cumsum(0)
        place_N = counted_N - rows(torch.nn.functional.pad(counted_N, (1, 0))[offsets[:-1]])  # from 1, in its response
        shorter_N = rows(batch.count_R.view(-1, 2).amin(1).repeat_interleave(2))
        return torch.where(place_N <= shorter_N, ones_N, self.ld_alpha)

    def group_weight(self, batch: Batch) -> Tensor | None:
        if not self.wpo:
            return None
        chosen, rejected = batch.pairs(batch.token_means(batch.logps_N - batch.stats["log_collision"]))
        return (chosen + rejected).exp()[batch.index.prompt_of_group_G]

    def metrics(self, score_R: Tensor, logp_R: Tensor, batch: Batch) -> dict[str, Tensor]:
        """rewards/* with reward = beta * score; logps/* in nats a response; accuracies in [0, 1]."""
        chosen, rejected = batch.pairs(self.beta * score_R)
        logp_chosen, logp_rejected = batch.pairs(logp_R)
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
