"""What the demo found: shares with their confidence intervals, as a table, a JSON file and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NORMAL_975 = 1.959963984540054  # quantile of the standard normal: 95 % two-sided
MEASURES = {"exact": "exact answer", "preference": "preference accuracy"}
_COLOURS = ("#9aa5b1", "#2f6db3", "#d1603d", "#3c8d5a")


@dataclass(frozen=True)
class Share:
    """Successes out of a number of trials."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        return wilson(self.successes, self.trials)

    def above(self, other: Share) -> bool:
        """Whether this interval lies wholly above the other's."""
        return self.interval[0] > other.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:5.1f} %  [{100 * low:4.1f}, {100 * high:5.1f}]"


def wilson(successes: int, trials: int, quantile: float = NORMAL_975) -> tuple[float, float]:
    """Wilson's score interval of a binomial share.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),      p = successes / n, n = trials, z = quantile

    Raises:
        ValueError: no trials, or successes outside 0 .. trials.
    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes={successes} must lie in 0 .. trials={trials}, and trials be at least 1")
    p, z2 = successes / trials, quantile**2 / trials
    centre = p + z2 / 2
    spread = quantile * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    low, high = (centre - spread) / (1 + z2), (centre + spread) / (1 + z2)
    return max(0.0, low) if successes else 0.0, min(1.0, high) if successes < trials else 1.0


@dataclass(frozen=True)
class Outcome:
    """One model on the test problems: which it answered exactly, and whose right solution it finds likelier.

    Fields:
        name: "start", or the loss it was tuned with.
        families: (P,) the kind of each problem.
        exact: (P,) whether the greedily decoded solution ends in the right answer.
        preferred: (P,) whether log pi(right solution) > log pi(slipped solution), both summed over their tokens.
        texts: (P,) the decoded solutions.
    """

    name: str
    families: Sequence[str]
    exact: Sequence[bool]
    preferred: Sequence[bool]
    texts: Sequence[str]

    def share(self, measure: str, family: str | None = None) -> Share:
        """Share of problems, of one family or of all, for which a measure ("exact" or "preference") holds."""
        flags = self.exact if measure == "exact" else self.preferred
        kept = [flag for flag, name in zip(flags, self.families) if family in (None, name)]
        return Share(sum(kept), len(kept))

    def to_dict(self) -> dict:
        """Shares with intervals, for JSON: over all problems, and by family."""

        def entry(share: Share) -> dict:
            return {**dataclasses.asdict(share), "share": share.value, "wilson_95": list(share.interval)}

        families = dict.fromkeys(self.families)
        return {
            m: {**entry(self.share(m)), "by_family": {f: entry(self.share(m, f)) for f in families}} for m in MEASURES
        }


def table(outcomes: Sequence[Outcome]) -> str:
    """One row a model, one column a measure, and below a sentence for each tuned model and measure."""
    start, *tuned = outcomes
    head = f"{'model':<20}" + "".join(f"{title + ' [95 % interval]':<40}" for title in MEASURES.values())
    lines = [head.rstrip(), "-" * len(head.rstrip())]
    lines += [(f"{o.name:<20}" + "".join(f"{o.share(m)!s:<40}" for m in MEASURES)).rstrip() for o in outcomes]
    lines.append("")
    for outcome in tuned:
        for measure, title in MEASURES.items():
            lines.append(f"{outcome.name}, {title}: {verdict(start.share(measure), outcome.share(measure))}")
    return "\n".join(lines)


def verdict(before: Share, after: Share) -> str:
    """The change in percentage points, and whether the two 95 % intervals are apart."""
    change = f"{100 * (after.value - before.value):+.1f} points"
    if after.above(before):
        return f"{change}, better: the intervals do not overlap"
    if before.above(after):
        return f"{change}, worse: the intervals do not overlap"
    return f"{change}, undecided: the intervals overlap"


def write_json(path: Path, outcomes: Sequence[Outcome], about: Mapping) -> Path:
    """The numbers behind table and picture; `about` says what was run."""
    content = {**about, "models": {o.name: o.to_dict() for o in outcomes}}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def draw(path: Path, outcomes: Sequence[Outcome], title: str) -> Path:
    """Both measures over all problems, then exact answers by family, with error bars, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.75))
    families = dict.fromkeys(outcomes[0].families)
    _bars(left, outcomes, {m: (m, None) for m in MEASURES}, "All problems", values=True)
    labels = ["exact answer\n(greedy decoding)", "preference accuracy\n(right over slipped)"]
    left.set_xticks(range(len(MEASURES)), labels)
    _bars(right, outcomes, {f: ("exact", f) for f in families}, "Exact answers by kind of problem", values=False)
    right.set_xticks(range(len(families)), list(families))
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(outcomes), frameon=False)
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=140)
    return path


def _bars(axes, outcomes: Sequence[Outcome], groups: Mapping, title: str, values: bool) -> None:
    width = 0.8 / len(outcomes)
    for i, (outcome, colour) in enumerate(zip(outcomes, _COLOURS)):
        shares = [outcome.share(*group) for group in groups.values()]
        x = [j + (i - (len(outcomes) - 1) / 2) * width for j in range(len(shares))]
        heights = [100 * s.value for s in shares]
        ends = [[100 * abs(s.interval[side] - s.value) for s in shares] for side in (0, 1)]
        label = "start (nll on mixed solutions)" if i == 0 else outcome.name
        axes.bar(x, heights, width * 0.92, color=colour, label=label, zorder=2)
        axes.errorbar(x, heights, ends, fmt="none", ecolor="#333333", elinewidth=1.1, capsize=3, zorder=3)
        for at, share, height in zip(x, shares, heights):
            if values:
                axes.text(at, 100 * share.interval[1] + 1.5, f"{height:.0f} %", ha="center", fontsize=9)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel("share of held-out problems (%), 95 % Wilson interval", fontsize=9)
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
