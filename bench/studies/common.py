"""What every study shares: its command line, seeds, intervals, result files and the look of its pictures.

A study is a module with

    NAME, TITLE, ABOUT   file name of its results, heading, and what was done, in Markdown
    rows(quick)          the measurements: one flat record a line of the table
    claims(rows)         statements that were put to the test, each judged from the table alone
    summary(rows)        the table as Markdown, means over seeds or repeats
    draw(rows, path)     the picture
    READING              what the committed table shows, in words and without numbers

and `main(module)` does the rest.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "studies"
WORKERS = 2  # processes of one thread each: what is added up in which order does not depend on the machine

# 97.5 % quantiles of Student's t for 1 .. 30 degrees of freedom.
_STUDENT_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# Okabe and Ito's colours, which people with colour-blindness tell apart; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement, whether the table bears it out (None: the table cannot tell), and the numbers that decide."""

    statement: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "undecided"}[self.holds]


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, Student's t over independent values."""

    value: float
    half: float

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    def __str__(self) -> str:
        value = 0.0 if abs(self.value) < 1e-4 * self.half else self.value  # what rounding leaves of 0
        return f"{value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def above(self, threshold: float = 0.0) -> bool | None:
        """True where the interval lies above the threshold, False where below, None where it holds it."""
        return True if self.low > threshold else False if self.high < threshold else None


def mean(values: Iterable[float]) -> Mean:
    """Mean and 95 % interval of independent values, at least two."""
    values = [float(v) for v in values]
    freedom = len(values) - 1
    quantile = _STUDENT_975[freedom - 1] if freedom <= len(_STUDENT_975) else 1.96
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def seed_all(seed: int) -> None:
    """Seed Python's and torch's global generators."""
    random.seed(seed)
    torch.manual_seed(seed)


def in_parallel(function: Callable[..., list], calls: Sequence[tuple], quick: bool) -> list:
    """The lists that a function returns for each tuple of arguments, joined in order; made by `WORKERS` processes.

    Args:
        quick: stay in this process, which is faster for what takes no time.
    """
    if quick:
        return [row for arguments in calls for row in function(*arguments)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn, initializer=_one_thread) as pool:
        return [row for rows in pool.map(function, *zip(*calls)) for row in rows]


def generator(*key: Any) -> torch.Generator:
    """A generator of its own for each key: what one part draws does not move what another draws."""
    return torch.Generator().manual_seed(random.Random(" ".join(map(str, key))).getrandbits(63))


def pick(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows that hold these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """One line a row; floats with six significant digits, which is more than they are worth."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return path


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows as `write_csv` wrote them; what reads as a number becomes one."""
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def markdown(rows: Sequence[Row], columns: Mapping[str, str] | None = None, digits: int = 3) -> str:
    """A Markdown table.

    Args:
        columns: the columns to show, and their headings; None: all.
    """
    columns = columns or {name: name for name in rows[0]}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[name], digits) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.7) -> tuple[Any, list[Any]]:
    """A figure and its axes, in reading order."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    made = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def style(axes: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axis labels with units, grid, legend."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9.5)
    axes.set_ylabel(y, fontsize=9.5)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)


def save(made: Any, path: Path, title: str) -> Path:
    made.suptitle(title, fontsize=12.5)
    made.savefig(path, dpi=130, metadata={"Software": None})
    return path


def main(study: ModuleType) -> int:
    """Run a study from the command line: table, picture and text, in the folder of committed results or another."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{study.NAME}", description=study.TITLE)
    parser.add_argument("--quick", action="store_true", help="seconds: too small to show anything; another folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where table, picture and text are written")
    parser.add_argument("--redraw", action="store_true", help="only picture and text, of the table that is there")
    args = parser.parse_args()
    started = time.perf_counter()
    out = args.out or (SCRATCH / "quick" if args.quick else RESULTS)
    path = report(study, out / f"{study.NAME}.csv") if args.redraw else run(study, out, args.quick)
    print(path.read_text())
    print(f"{path} in {time.perf_counter() - started:.0f} s")
    return 0


def run(study: ModuleType, out: Path, quick: bool) -> Path:
    """Measure, then write NAME.csv, NAME.png and NAME.md; the text says only what the written table says."""
    out.mkdir(parents=True, exist_ok=True)
    _one_thread()
    table = write_csv(out / f"{study.NAME}.csv", study.rows(quick))
    return report(study, table)


def report(study: ModuleType, table: Path) -> Path:
    """Picture and text of a table."""
    rows = read_csv(table)
    study.draw(rows, table.with_suffix(".png"))
    judged = [
        {"claim": claim.statement, "verdict": f"**{claim.verdict}**", "numbers": claim.evidence}
        for claim in study.claims(rows)
    ]
    parts = [
        f"# {study.TITLE}",
        f"`python -m bench.studies.{study.NAME}` made all of this page from [{table.name}]({table.name}).",
        study.ABOUT.strip(),
        f"![{study.TITLE}]({study.NAME}.png)",
        "## What it shows",
        study.READING.strip(),
        "## Claims, judged from the table",
        markdown(judged),
        "## Table",
        study.summary(rows),
    ]
    text = table.with_suffix(".md")
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return text


def _one_thread() -> None:
    torch.set_num_threads(1)
    seed_all(0)


def _cell(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
