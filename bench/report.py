"""JSON lines as tables and pictures.

python -m bench.report [FILE.jsonl ...] [--markdown] [--readme README.md] [--tables FILE.md] [--plots FOLDER]

Without files, of all measurements in bench/results. --readme replaces what stands between `<!-- bench -->` and
`<!-- /bench -->` by ours against the fastest peer, case by case, and the tables of one shape; --tables writes every
table, with what was left out and why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import record
from bench.record import Record
from bench.suites import SUITES

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
TITLES = {
    "dpo": "From hidden states to a DPO loss and its gradient",
    "head": "From hidden states to token log-probabilities",
    "tail": "From log-probabilities to a DPO loss",
    "scaling": "Against N and against V",
    "models": "Heads of real models",
    "logits": "From logits to log-probabilities, and back",
    "trainer": "A whole training step",
}
SIZES = {"tail": "N {0}", "logits": "N {0}, V {2}", "trainer": "{0} pairs a step, D {1}, V {2}"}
ROOF_NAMES = frozenset(name for suite in SUITES.values() for name in suite.roofs) | {"onednn"}
IN_README = ("dpo", "trainer")
LEGEND = (
    "x torch: p50 divided by plain torch's (logits in the model's dtype, softmax in fp32); of roof: time of the "
    "pass's 2, 4 or 6 NDV at the rate of the fastest matrix product of the same shape in the same rounds (from logits: "
    "of its bytes at the rate of a copy), divided by p50; MiB: peak memory beyond inputs and results, "
    "on a CPU of a fresh process, on a GPU of torch's allocator (of a trainer: beyond model, reference and data); "
    "error: largest of all results against float64, relative to the largest value; contract: whether it is within "
    "twice plain torch's error."
)

Row = tuple[str, ...]


def text(records: Sequence[Record]) -> str:
    """All records as aligned text, a table for each machine and suite."""
    tables = [_table(title, rows, _aligned, notes) for title, rows, notes in _tables(records)]
    return "\n\n".join([*tables, LEGEND])


def markdown(records: Sequence[Record], suites: Sequence[str] = tuple(TITLES)) -> str:
    """For each machine ours against the fastest peer, then the tables of some suites, in Markdown."""
    machines: dict[str, list[Record]] = {}
    for r in records:
        machines.setdefault(machine(r), []).append(r)
    best = {name: summaries(own) for name, own in machines.items()}
    first = [
        _table(f"**Ours against the fastest peer**: {name}", [SUMMARY_COLUMNS, *rows], _markdown)
        for name, rows in best.items()
        if rows
    ]
    tables = _tables([r for r in records if r["suite"] in suites])
    rest = [_table(f"**{title}**", rows, _markdown, [f"- {note}" for note in notes]) for title, rows, notes in tables]
    return "\n\n".join([*first, *rest, LEGEND])


def _tables(records: Sequence[Record]) -> Iterable[tuple[str, list[Row], list[str]]]:
    """Title, rows and notes on what was left out, of each machine and suite."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((r["device"], r["threads"], r["suite"]), []).append(r)
    for (_, _, suite), group in groups.items():
        sizes = list(dict.fromkeys(map(size, group)))
        one = f"{sizes[0]}; " if len(sizes) == 1 else ""
        title = f"{TITLES[suite]}: {one}{machine(group[0])}; {_versions(group[0])}"
        yield title, _rows(group, sized=len(sizes) > 1), left_out(group)


def size(r: Record) -> str:
    """What a record is of, in words."""
    model = f"{r['model']}, " if r["model"] else ""
    numbers = SIZES.get(r["suite"], "N {0}" if model else "N {0}, D {1}, V {2}")
    return model + numbers.format(*r["shape"])


def machine(r: Record) -> str:
    """Device and threads."""
    return f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}"


def left_out(records: Sequence[Record]) -> list[str]:
    """A line for each reason why something was not timed: who, and where it was timed elsewhere, at what."""
    cases: dict[tuple[str, str], list[str]] = {}
    every: dict[str, set[str]] = {}
    for r in records:
        case = f"{size(r)} {r['dtype']} {r['pass']}"
        every.setdefault(r["provider"], set()).add(case)
        if "left_out" in r:
            cases.setdefault((r["provider"], r["left_out"]), []).append(case)
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, why), of in cases.items():
        at = "" if name and set(of) == every[name] else f", at {'; '.join(of)}"
        alike.setdefault((why, at), []).append(name or "all others")
    return [f"left out: {', '.join(names)} ({why}){at}" for (why, at), names in alike.items()]


def _versions(r: Record) -> str:
    known = {name: found for name, found in r["versions"].items() if found and name not in ("python", "numpy")}
    return ", ".join(f"{name} {found}" for name, found in known.items())


NAMES = ("shape", "dtype", "pass", "provider", "suite", "fastest peer", "contract")  # columns that are no figures
COLUMNS: dict[str, Callable[[Record], str]] = {
    "dtype": lambda r: r["dtype"],
    "pass": lambda r: r["pass"],
    "provider": lambda r: r["provider"],
    "p50 ms": lambda r: milliseconds(r["p50_s"]),
    "p20-p80 ms": lambda r: f"{milliseconds(r['p20_s'])}-{milliseconds(r['p80_s'])}",
    "x torch": lambda r: _number(r.get("ratio"), ".2f"),
    "of roof": lambda r: _number(r.get("of_roof"), ".2f"),
    "MiB": lambda r: _number(record.beyond_results(r), ".0f"),
    "error": lambda r: _number(max((r.get("error") or {}).values(), default=None), ".1e"),
    "contract": lambda r: (r.get("contract") or "").partition(":")[0],
    "tokens/s": lambda r: _number(r.get("tokens_per_s"), ".0f"),
    "loss off TRL's": lambda r: _number(r.get("loss_difference"), ".1e"),
}


def _rows(records: Sequence[Record], sized: bool) -> list[Row]:
    """Names of the columns, then a row for each timed record; columns without a figure are left out."""
    timed = [r for r in records if "p50_s" in r]
    columns = {"shape": size, **COLUMNS} if sized else dict(COLUMNS)
    if all(r["suite"] == "trainer" for r in records):
        columns = {"x TRL" if name == "x torch" else name: cell for name, cell in columns.items()}
    rows = [tuple(columns), *(tuple(cell(r) for cell in columns.values()) for r in timed)]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows] if timed else []


SUMMARY_COLUMNS = (
    "suite", "shape", "dtype", "pass", "fastest peer", "ours ms", "its ms", "ours / its", "of roof", "ours MiB",
    "its MiB",
)  # fmt: skip


def summaries(records: Sequence[Record]) -> list[Row]:
    """Ours against the fastest peer of each case of a machine, whatever came out.

    Ours is what impl="auto" runs. A peer that does not meet the contract counts. The scaling suite, which has one peer
    for comparison and not the fastest, is left to its own table and picture.
    """
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        if "p50_s" in r and r["provider"] not in ROOF_NAMES and r["suite"] != "scaling":
            key = (r["suite"], r["model"], *r["shape"], r["dtype"], r["pass"])
            groups.setdefault(key, []).append(r)
    rows = []
    for group in groups.values():
        ours = next((r for r in group if r["provider"] == "prefkern"), None)
        peers = [r for r in group if not r["ours"]]
        if ours is None or not peers:
            continue
        best = min(peers, key=lambda r: r["p50_s"])
        rows.append((
            ours["suite"], size(ours), ours["dtype"], ours["pass"], best["provider"], milliseconds(ours["p50_s"]),
            milliseconds(best["p50_s"]), f"{ours['p50_s'] / best['p50_s']:.2f}", _number(ours.get("of_roof"), ".2f"),
            _number(record.beyond_results(ours), ".0f"), _number(record.beyond_results(best), ".0f"),
        ))  # fmt: skip
    return rows


def milliseconds(seconds: float) -> str:
    """As many digits as say something."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(title: str, rows: Sequence[Row], form: Callable[[Sequence[Row]], str], notes: Sequence[str] = ()) -> str:
    return "\n\n".join([title, *([form(rows)] if rows else []), *(["\n".join(notes)] if notes else [])])


def _aligned(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        "  ".join(
            cell.ljust(width) if name in NAMES else cell.rjust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([cells[0], "-" * max(map(len, cells)), *cells[1:]])


def _markdown(rows: Sequence[Row]) -> str:
    rule = ["---" if name in NAMES else "---:" for name in rows[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def write_readme(path: Path, records: Sequence[Record]) -> None:
    """Replace what stands between the markers; ValueError where they are missing."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} lacks the markers {BEGIN} and {END}")
    path.write_text(f"{before}{begin}\n{markdown(records, IN_README)}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="JSON lines; of two runs of a case the later one counts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--readme", type=Path, help="write the tables between the markers of this file")
    parser.add_argument("--tables", type=Path, help="Markdown file to write every table to")
    parser.add_argument("--plots", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    try:
        records = record.read(args.files or record.measurements())
        if not records:
            raise ValueError(f"no measurements in {record.RESULTS}: make some by `python -m bench`")
        if args.readme:
            write_readme(args.readme, records)
    except ValueError as error:
        parser.error(str(error))
    print(markdown(records) if args.markdown else text(records))
    if args.tables:
        args.tables.write_text(f"# Measured\n\n{markdown(records)}\n")
    if args.plots:
        from bench import plots

        for path in plots.draw(records, args.plots):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
