"""Word problems with worked solutions: the preference data of the demo, made from a seed.

A problem is a short story with a few numbers and two or three arithmetic steps. Its right solution works every
step; a slipped solution makes one plausible mistake at one step and carries it on, correctly, to the answer:

    Mia buys 4 pens at 7 dollars each and a bag for 35 dollars. What does Mia pay?

    right                              slipped: the carry is dropped
    pens: 4 * 7 = 28                   pens: 4 * 7 = 28
    all: 28 + 35 = 50 + 13 = 63        all: 28 + 35 = 50 + 13 = 53
    answer: 63                         answer: 53

**Unseen numbers.** The two-digit numbers that problems give are dealt into three disjoint sets, `SPLIT_NUMBERS`: no
number that a test problem gives is given by any problem of training or validation. (It may occur there as a result:
a model that never met the digits 3 and 7 side by side could not write 37.) The one-digit numbers 2 to 9 are shared
by all splits. Digits are tokens, so an unseen 37 is read as a 3 and a 7 known from other numbers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Spread by hand over tens and units.
_TEST = (13, 19, 26, 34, 37, 43, 52, 58, 61, 67, 75, 86)
_VALIDATION = (17, 29, 31, 46, 68, 74)
SPLIT_NUMBERS: dict[str, tuple[int, ...]] = {
    "train": tuple(n for n in range(11, 100) if n not in _TEST + _VALIDATION),
    "validation": _VALIDATION,
    "test": _TEST,
}
LARGEST = 99  # no result is larger, none is below 1
NAMES = ("Mia", "Tom", "Ada", "Ben", "Eva", "Sam")

Operand = str | int  # the name of a given number, or the index of an earlier step whose result is meant


@dataclass(frozen=True)
class Step:
    """One line of a solution, `label: left op right = ... = result`; a product has one-digit factors."""

    label: str
    left: Operand
    op: str
    right: Operand


@dataclass(frozen=True)
class Family:
    """A kind of story.

    Fields:
        wording: a format with the given numbers by name, {name} and {thing}.
        things: what the story may be about.
        steps: in order; the result of the last is the answer.
        largest: the largest value of each given number; up to 9 means one digit (from 2), else two digits.
        pitfall: slip kind and step index of the mistake that solutions of this family typically make.
    """

    wording: str
    things: tuple[str, ...]
    steps: tuple[Step, ...]
    largest: dict[str, int]
    pitfall: tuple[str, int]


FAMILIES: dict[str, Family] = {
    "shopping": Family(
        "{name} buys {k} {thing} at {p} dollars each and a bag for {q} dollars. What does {name} pay?",
        ("pens", "books", "caps"),
        (Step("{thing}", "k", "*", "p"), Step("all", 0, "+", "q")),
        {"k": 9, "p": 9, "q": 99},
        ("carry", 1),
    ),
    "travel": Family(
        "{name} {thing} {a} km east, then {b} km more, then {c} km back. How far from home is {name}?",
        ("walks", "rides", "drives"),
        (Step("out", "a", "+", "b"), Step("back", 0, "-", "c")),
        {"a": 99, "b": 99, "c": 99},
        ("operation", 1),
    ),
    "sharing": Family(
        "{name} has {a} {thing}, gives {k} friends {j} each and then finds {b} more. How many has {name} now?",
        ("nuts", "cards", "shells"),
        (Step("given", "k", "*", "j"), Step("left", "a", "-", 0), Step("now", 1, "+", "b")),
        {"a": 99, "k": 9, "j": 9, "b": 99},
        ("off_by_one", 0),
    ),
    "work": Family(
        "{name} makes {r} {thing} an hour for {k} hours. Another {m} come from Max, {f} are faulty. How many are good?",
        ("bolts", "cups", "bowls"),
        (Step("made", "k", "*", "r"), Step("all", 0, "+", "m"), Step("good", 1, "-", "f")),
        {"r": 9, "k": 9, "m": 99, "f": 99},
        ("carry", 2),
    ),
    "savings": Family(
        "{name} has {a} dollars, saves {s} dollars a {thing} for {k} {thing}s and spends {c} dollars. What is left?",
        ("day", "week", "month"),
        (Step("saved", "k", "*", "s"), Step("has", 0, "+", "a"), Step("left", 1, "-", "c")),
        {"a": 99, "s": 9, "k": 9, "c": 99},
        ("swapped", 2),
    ),
    "harvest": Family(
        "{name} picks {n} apples from each of {k} {thing}, {x} are bad. How many are good?",
        ("trees", "rows", "farms"),
        (Step("apples", "k", "*", "n"), Step("good", 0, "-", "x")),
        {"k": 9, "n": 9, "x": 99},
        ("misread", 1),
    ),
}


@dataclass(frozen=True)
class Work:
    """The arithmetic of one step: two numbers, an operation, and whether the carry (or borrow) is forgotten."""

    left: int
    op: str
    right: int
    drops_carry: bool = False

    @property
    def tens(self) -> int:
        """Tens of both numbers, added or subtracted."""
        tens, other = self.left // 10 * 10, self.right // 10 * 10
        return tens - other if self.op == "-" else tens + other

    @property
    def units(self) -> int:
        """Units of both numbers, added or subtracted; ten or more is carried, below 0 is borrowed."""
        return self.left % 10 - self.right % 10 if self.op == "-" else self.left % 10 + self.right % 10

    @property
    def has_carry(self) -> bool:
        return self.op != "*" and not 0 <= self.units < 10

    @property
    def result(self) -> int:
        if self.op == "*":
            return self.left * self.right
        return self.tens + (self.units % 10 if self.drops_carry else self.units)

    def __str__(self) -> str:
        """The worked equation, tens and units apart: 38 + 27 = 50 + 15 = 65, 62 - 27 = 40 - 5 = 35."""
        parts = "" if self.op == "*" else f" = {self.tens} {'-' if self.units < 0 else '+'} {abs(self.units)}"
        return f"{self.left} {self.op} {self.right}{parts} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """A story with its numbers by name; `labels` are the words its solution begins its lines with."""

    family: str
    question: str
    given: dict[str, int]
    labels: tuple[str, ...]

    def solve(self, slip: tuple[str, int] | None = None) -> str | None:
        """The worked solution, right or with one slip.

        Args:
            slip: a kind of `SLIPS` and the index of the step where it happens; every other step is worked rightly
                on what was written before.
        Returns:
            The text; None where the slip cannot happen there, changes no answer, or leads out of 1 .. LARGEST.
        """
        results: list[int] = []
        lines = []
        for i, (label, step) in enumerate(zip(self.labels, FAMILIES[self.family].steps, strict=True)):
            left, right = (self.given[x] if isinstance(x, str) else results[x] for x in (step.left, step.right))
            work: Work | None = Work(left, step.op, right)
            if slip is not None and slip[1] == i:
                work = SLIPS[slip[0]](work, self.given)
            if work is None or not 1 <= work.result <= LARGEST:
                return None
            results.append(work.result)
            lines.append(f"{label}: {work}\n")
        if slip is not None and results[-1] == read_answer(self.solve() or ""):
            return None
        return "".join(lines) + f"answer: {results[-1]}"


@dataclass(frozen=True)
class Example:
    """A problem with its right solution and a slipped one; `slip` names the mistake and its step."""

    problem: Problem
    chosen: str
    rejected: str
    slip: tuple[str, int]

    @property
    def prompt(self) -> str:
        return self.problem.question + "\n"


# --- slips: each takes the right work of a step and returns a wrong one, or None where it cannot happen ------------


def _drop_carry(work: Work, given: dict[str, int]) -> Work | None:
    return replace(work, drops_carry=True) if work.has_carry else None


def _wrong_operation(work: Work, given: dict[str, int]) -> Work:
    return replace(work, op={"+": "-", "-": "+", "*": "+"}[work.op])


def _off_by_one(work: Work, given: dict[str, int]) -> Work | None:
    return replace(work, left=work.left + 1) if work.op == "*" and work.left < 9 else None


def _swapped_operand(work: Work, given: dict[str, int]) -> Work | None:
    others = [n for n in given.values() if n > 9 and n != work.right]
    return replace(work, right=others[0]) if work.right in given.values() and others else None


def _misread(work: Work, given: dict[str, int]) -> Work | None:
    tens, units = divmod(work.right, 10)
    turned = 10 * units + tens
    return replace(work, right=turned) if work.right in given.values() and tens and units and tens != units else None


SLIPS: dict[str, Callable[[Work, dict[str, int]], Work | None]] = {
    "carry": _drop_carry,  # 38 + 27 = 50 + 15 = 55
    "operation": _wrong_operation,  # adds what should be taken away
    "off_by_one": _off_by_one,  # counts one too many
    "swapped": _swapped_operand,  # takes another number of the story
    "misread": _misread,  # reads 27 as 72
}


# --- drawing -------------------------------------------------------------------------------------------------------


def read_answer(solution: str) -> int | None:
    """The number after `answer:`, None where a solution has none."""
    found = re.search(r"answer: (\d+)", solution)
    return int(found[1]) if found else None


def draw_examples(
    count: int, split: str, seed: int, pitfall_share: float, taken: set[str] | None = None
) -> list[Example]:
    """Different problems with a right and a slipped solution each, families in turn.

    Args:
        split: "train", "validation" or "test": where the given numbers come from; see the module's first lines.
        seed: the same seed gives the same examples, on any machine.
        pitfall_share: probability that the slip is the family's typical one (where it can happen); any other slip
            at any step otherwise.
        taken: questions not to ask again; those drawn are added.
    """
    rng = random.Random(f"{split} {seed}")
    taken = set() if taken is None else taken
    examples: list[Example] = []
    while len(examples) < count:
        family = list(FAMILIES)[len(examples) % len(FAMILIES)]
        example = _draw(family, SPLIT_NUMBERS[split], rng, pitfall_share)
        if example is None or example.problem.question in taken:
            continue
        taken.add(example.problem.question)
        examples.append(example)
    return examples


def _draw(name: str, numbers: Sequence[int], rng: random.Random, pitfall_share: float) -> Example | None:
    family = FAMILIES[name]
    given = {
        key: rng.randint(2, 9) if largest <= 9 else rng.choice([n for n in numbers if n <= largest])
        for key, largest in family.largest.items()
    }
    words = {"name": rng.choice(NAMES), "thing": rng.choice(family.things)}
    labels = tuple(step.label.format(**words) for step in family.steps)
    problem = Problem(name, family.wording.format(**given, **words), given, labels)
    chosen = problem.solve()
    others = [(kind, i) for kind in SLIPS for i in range(len(family.steps)) if (kind, i) != family.pitfall]
    rng.shuffle(others)
    slips = [family.pitfall, *others] if rng.random() < pitfall_share else others
    for slip in slips:
        rejected = problem.solve(slip) if chosen else None
        if chosen and rejected:
            return Example(problem, chosen, rejected, slip)
    return None


def mixed_solutions(examples: Sequence[Example], slipped_share: float, seed: int) -> list[dict[str, str]]:
    """Rows `prompt`, `completion` for `nll`: one solution a problem, slipped with probability `slipped_share`."""
    rng = random.Random(f"mix {seed}")
    return [
        {"prompt": e.prompt, "completion": e.rejected if rng.random() < slipped_share else e.chosen} for e in examples
    ]


def preference_pairs(examples: Sequence[Example]) -> list[dict[str, str]]:
    """Rows `prompt`, `chosen`, `rejected`."""
    return [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in examples]


def write_jsonl(rows: Iterable[dict], path: Path) -> Path:
    """Write one JSON object a line, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
