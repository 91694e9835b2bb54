"""What a loss reads of a row: names of the columns, and the numbers that come with its responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from prefkern.losses import Given, Loss
from prefkern.training.errors import DataError, nearest
from prefkern.training.resolve import cuts_from_data

if TYPE_CHECKING:
    import datasets

Arity = Literal["pair", "single", "list"]
TargetKind = Literal["score", "label", "preference"]

RESPONSES: Mapping[Arity, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "single": ("completion",),
    "list": ("completions",),
}
_LARGEST = 3.4028234663852886e38  # of fp32
_ROUNDED = 1e-3  # probabilities that were written with a few digits
_TARGETS: Mapping[tuple[TargetKind, Arity], tuple[str, ...]] = {
    ("score", "pair"): ("chosen_score", "rejected_score"),
    ("score", "single"): ("score",),
    ("score", "list"): ("scores",),
    ("label", "single"): ("label",),
    ("preference", "pair"): ("preference",),
}


@dataclass(frozen=True)
class Needs:
    """What a loss reads of a row.

    Fields:
        arity: "pair" reads chosen and rejected; "single" completion; "list" completions, a list of any length.
        boundaries: `<response>_boundaries`, in characters, where segments begin.
        target_kind: "score" reads scores (of a pair chosen_score and rejected_score, of one response score), any
            real number a response; "label" reads label, true where the response is desirable; "preference" reads
            preference, the probability that chosen is preferred to rejected.
        token_weights: `<response>_token_weights`, a number for each of a response's tokens.
        probabilities: whether the scores of a row must be none below 0 and add up to 1.
    """

    arity: Arity = "pair"
    boundaries: bool = False
    target_kind: TargetKind | None = None
    token_weights: bool = False
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.target_kind and (self.target_kind, self.arity) not in _TARGETS:
            raise ValueError(
                f"no column holds the {self.target_kind} of a {self.arity}: the combinations are "
                + ", ".join(f"{kind} of a {arity}" for kind, arity in _TARGETS)
            )

    @classmethod
    def of(cls, loss: Loss, token_weights: bool = False) -> Needs:
        """What this loss needs; `token_weights` reads them though it does not."""
        return cls(
            loss.arity,
            cuts_from_data(loss),
            loss.target_kind,
            token_weights or loss.needs_token_weights,
            any(isinstance(getattr(term.loss, "targets", None), Given) for term in loss.addends()),
        )

    @property
    def responses(self) -> tuple[str, ...]:
        """Columns of the responses."""
        return RESPONSES[self.arity]

    @property
    def boundary_columns(self) -> tuple[str, ...]:
        return tuple(f"{r}_boundaries" for r in self.responses) if self.boundaries else ()

    @property
    def target_columns(self) -> tuple[str, ...]:
        return _TARGETS[self.target_kind, self.arity] if self.target_kind else ()

    @property
    def weight_columns(self) -> tuple[str, ...]:
        return tuple(f"{r}_token_weights" for r in self.responses) if self.token_weights else ()

    @property
    def known(self) -> tuple[str, ...]:
        """Every column that is read."""
        return ("prompt", *self.responses, *self.boundary_columns, *self.target_columns, *self.weight_columns)

    def missing(self, have: Sequence[str]) -> list[str]:
        """Columns that must be there and are not.

        The prompt of a pair of whole texts may be left out, and one of a pair's two columns of weights: its weights
        are 1.
        """
        optional = set(self.weight_columns) if any(c in have for c in self.weight_columns) else set()
        if self.arity == "pair" and not self.boundaries and not self.token_weights:
            optional.add("prompt")
        return [c for c in self.known if c not in have and c not in optional]


def gather(row: Mapping[str, Any], arity: Arity, column: str) -> list | None:
    """One value for each response of a row, from the columns that `column` ("{}_ids") names; None: there are none.

    Of a pair's two columns one may be missing; its value is None.
    """
    names = [column.format(r) for r in RESPONSES[arity]]
    if not any(name in row for name in names):
        return None
    return list(row[names[0]]) if arity == "list" else [row.get(name) for name in names]


def scatter(values: Sequence, arity: Arity, column: str) -> dict[str, Any]:
    """The columns that `gather` reads back, from one value for each response."""
    names = [column.format(r) for r in RESPONSES[arity]]
    return {names[0]: list(values)} if arity == "list" else dict(zip(names, values, strict=True))


def feature(arity: Arity, kind: str) -> Any:
    """Type of a column that holds a list of numbers for each response."""
    import datasets  # here, because `prefkern losses` reads the names above and should not wait for it

    numbers = datasets.Sequence(datasets.Value(kind))
    return datasets.Sequence(numbers) if arity == "list" else numbers


def cells(row: Mapping[str, Any], needs: Needs, suffix: str, what: str) -> list | None:
    """One cell a response from columns `<response><suffix>`, checked to be a list of as many where there are several.

    Raises:
        DataError: a list is empty, no list, or as long as another number of responses.
    """
    if needs.arity != "list":
        return gather(row, needs.arity, "{}" + suffix)
    name = needs.responses[0] + suffix
    if name not in row:
        return None
    value = row[name]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"its {name} should be a list with a {what} for each response, not {value!r}")
    if suffix == "" and not value:
        raise DataError("its list of completions is empty: remove the row or fill it in")
    if suffix and len(value) != len(row[needs.responses[0]]):
        raise DataError(
            f"it has {len(value)} {name} for {len(row[needs.responses[0]])} completions: give each completion a {what}"
        )
    return list(value)


def targets(row: Mapping[str, Any], needs: Needs) -> list[float]:
    """What the row says of each response: a real number, 1 or 0, or the probability of being preferred.

    Raises:
        DataError: a value is of another kind, or the scores are not as many as the responses.
    """
    found = [row[name] for name in needs.target_columns]
    if needs.target_kind == "preference":
        return _preference(found[0])
    if needs.target_kind == "label":
        return [_label(found[0])]
    names, scores = needs.target_columns, found
    if needs.arity == "list":
        [name] = needs.target_columns
        [scores] = found
        responses = row[needs.responses[0]]
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            raise DataError(f"its {name} should be a list of one number a completion, not {scores!r}")
        if len(scores) != len(responses):
            raise DataError(f"it has {len(scores)} {name} for {len(responses)} completions: give each completion one")
        names = [name] * len(scores)
    for name, score in zip(names, scores):
        if not is_finite(score):
            raise DataError(
                f"its {name} holds {score!r}, which is not a finite number in fp32: mend it or remove the row"
            )
    if needs.probabilities and (min(scores) < 0 or abs(sum(scores) - 1) > _ROUNDED):
        raise DataError(
            f"its scores {scores} add up to {sum(scores):.6g}, but the loss takes them for probabilities: give numbers"
            " from 0 on that add up to 1, or choose other targets than given"
        )
    return [float(score) for score in scores]


def _preference(value: Any) -> list[float]:
    if not is_finite(value) or not 0 <= value <= 1:
        raise DataError(f"its preference is {value!r}, but a probability lies in [0, 1]: that chosen is the better one")
    return [float(value), 1 - float(value)]


def _label(value: Any) -> float:
    if not isinstance(value, Real) or value not in (0, 1):
        raise DataError(f"its label is {value!r}, but it should be true (desirable) or false (undesirable)")
    return float(value)


def is_finite(value: Any) -> bool:
    """Whether a cell holds a real number that is finite in fp32, which data are kept in."""
    return isinstance(value, Real) and abs(value) <= _LARGEST


def token_weights(weights: Any, tokens: int) -> list[float]:
    """A response's token weights.

    Raises:
        DataError: there is not one finite number for each of its tokens.
    """
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise DataError(f"its token weights should be a list of one number a token, not {weights!r}")
    if len(weights) != tokens:
        raise DataError(
            f"it has {len(weights)} token weights, but the response has {tokens} tokens, with its end-of-sequence token"
            " and before truncation: make them with this tokenizer by `prefkern score-critical-tokens`"
        )
    for weight in weights:
        if not is_finite(weight):
            raise DataError(f"its token weights hold {weight!r}, which is not a finite number in fp32: make them again")
    return [float(weight) for weight in weights]


def standard_columns(rows: datasets.Dataset, needs: Needs, columns: Mapping[str, str], name: str) -> datasets.Dataset:
    """The dataset with its columns renamed to the standard names, and nothing but those.

    Args:
        columns: the dataset's own name of a standard column.
        name: what messages call the dataset.
    Raises:
        DataError: a column is missing, or `columns` names one that is not read or not there.
    """
    for standard, own in columns.items():
        if standard not in needs.known:
            raise DataError(
                f"data.columns.{standard} is not a column that this loss reads: {nearest(standard, needs.known)}"
            )
        if own not in rows.column_names:
            raise DataError(
                f"{name} has no column {own!r} (data.columns.{standard}): {nearest(own, rows.column_names)}"
            )
    wanted = {standard: columns.get(standard, standard) for standard in needs.known}
    kept = {own: standard for standard, own in wanted.items() if own in rows.column_names}
    missing = needs.missing(list(kept.values()))
    if missing:
        have = ", ".join(rows.column_names)
        raise DataError(
            f"{name} has no column {' and no column '.join(map(repr, missing))} (it has {have}): "
            f"rename yours or name it with data.columns.{missing[0]}"
        )
    return rows.select_columns(list(kept)).rename_columns({o: s for o, s in kept.items() if o != s})
