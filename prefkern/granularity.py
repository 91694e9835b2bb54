"""How finely a loss compares two responses: descriptions that cut an uncut layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefkern.layout import Accumulate, Layout, check_count


@dataclass(frozen=True)
class Static:
    """Windows of k tokens; see `Layout.static`."""

    k: int

    def __post_init__(self) -> None:
        check_count("Static: k", self.k)

    def cut(self, layout: Layout, accumulate: Accumulate = "segment") -> Layout:
        """The layout in windows of k tokens."""
        return layout.static(self.k, accumulate=accumulate)


@dataclass(frozen=True)
class Adaptive:
    """m nearly equal parts of each response; see `Layout.adaptive`."""

    m: int
    rule: Literal["A", "B"] = "A"

    def __post_init__(self) -> None:
        check_count("Adaptive: m", self.m)
        if self.rule not in ("A", "B"):
            raise ValueError(f"Adaptive: rule={self.rule!r} must be 'A' or 'B'")

    def cut(self, layout: Layout, accumulate: Accumulate = "segment") -> Layout:
        """The layout in m parts a response."""
        return layout.adaptive(self.m, rule=self.rule, accumulate=accumulate)


@dataclass(frozen=True)
class Boundaries:
    """Given cut positions, one sequence a response; see `Layout.split_at`.

    With `cuts=None` the loss takes the layout as it comes: the caller has cut it, or the trainer by a dataset column.
    """

    cuts: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.cuts is not None:
            object.__setattr__(self, "cuts", tuple(tuple(int(c) for c in row) for row in self.cuts))

    def cut(self, layout: Layout, accumulate: Accumulate = "segment") -> Layout:
        """The layout cut at the positions."""
        if self.cuts is not None:
            return layout.split_at(self.cuts, accumulate=accumulate)
        if not layout.is_cut:
            raise ValueError(
                "granularity=Boundaries() needs a layout that is cut already: call layout.split_at(boundaries)"
            )
        return layout


Granularity = Static | Adaptive | Boundaries
