"""JSON lines as tables and pictures.

python -m bench.report bench/results/FILE.jsonl ... [--markdown] [--readme README.md] [--plots bench/results]

--readme replaces what stands between `<!-- bench -->` and `<!-- /bench -->` by the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import record
from bench.record import Record

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
COLUMNS = (
    "suite", "dtype", "pass", "provider", "p50 ms", "p20-p80 ms", "x torch", "of roof", "extra MiB", "error", "contract"
)  # fmt: skip
NAMES = 4  # columns that are no figures
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
LEGEND = (
    "x torch: p50 divided by plain torch's (logits in the model's dtype, softmax in fp32); of roof: time of the "
    "pass's 2, 4 or 6 NDV at the rate of the fastest matrix product of the same shape in the same rounds, divided by "
    "p50; extra: peak memory beyond the inputs, results included, "
    "on a CPU of a fresh process, on a GPU of torch's allocator; error: largest of all results "
    "against float64, relative to the largest value; contract: whether it is within twice plain torch's error."
)


def text(records: Sequence[Record]) -> str:
    """All records as aligned text, a table for each suite and shape."""
    return "\n\n".join(_table(title, rows, _aligned) for title, rows in _tables(records)) + f"\n\n{LEGEND}"


def markdown(records: Sequence[Record]) -> str:
    """The same in Markdown, with the summary first."""
    parts = [_table(title, rows, _markdown) for title, rows in _tables(records)]
    summary = _table("Ours against the fastest peer", [SUMMARY_COLUMNS, *summaries(records)], _markdown)
    return "\n\n".join([summary, *parts, LEGEND])


def _tables(records: Sequence[Record]) -> Iterable[tuple[str, list[tuple[str, ...]]]]:
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        own = () if r["suite"] == "scaling" else (r["model"], *r["shape"])
        groups.setdefault((r["device"], r["threads"], r["suite"], *own), []).append(r)
    for (device, threads, suite, *own), group in groups.items():
        timed = [r for r in group if "p50_s" in r]
        left = sorted({f"{r['provider']} ({r['left_out']})" for r in group if "left_out" in r})
        size = SIZES.get(suite, "N {0}, D {1}, V {2}").format(*own[1:]) if own else "D 1024"
        model = f"{own[0]}, " if own and own[0] else ""
        title = f"{TITLES[suite]}: {model}{size}; {device}, {threads} threads; {_versions(group[0])}"
        if left:
            title += f"\nleft out: {'; '.join(left)}"
        if timed:
            yield title, [_columns(suite), *(_row(r) for r in timed)]


def _versions(r: Record) -> str:
    known = {name: found for name, found in r["versions"].items() if found and name not in ("python", "numpy")}
    return ", ".join(f"{name} {found}" for name, found in known.items())


def _columns(suite: str) -> tuple[str, ...]:
    if suite != "trainer":
        return COLUMNS
    return (*("x TRL" if name == "x torch" else name for name in COLUMNS), "tokens/s")


def _row(r: Record) -> tuple[str, ...]:
    scaled = r["suite"] == "scaling"
    name = f"{r['suite']} N {r['shape'][0]} V {r['shape'][2]}" if scaled else r["suite"]
    error = max((r.get("error") or {}).values(), default=None)
    contract = (r.get("contract") or "").partition(":")[0]
    own = (_number(r["tokens_per_s"], ".0f"),) if "tokens_per_s" in r else ()
    return (
        name, r["dtype"], r["pass"], r["provider"], _milliseconds(r["p50_s"]),
        f"{_milliseconds(r['p20_s'])}-{_milliseconds(r['p80_s'])}", _number(r.get("ratio"), ".2f"),
        _number(r.get("of_roof"), ".2f"), _number(r.get("peak_extra_mib"), ".0f"), _number(error, ".1e"), contract,
        *own,
    )  # fmt: skip


SUMMARY_COLUMNS = (
    "suite", "N, D, V", "dtype", "pass", "ours ms", "fastest peer", "its ms", "ours / its", "of roof", "ours MiB",
    "its MiB",
)  # fmt: skip


def summaries(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Ours against the fastest peer of each case, whatever came out.

    Ours is what impl="auto" runs. MiB: peak beyond inputs and results. A peer that does not meet the contract counts.
    """
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        if "p50_s" in r and r["provider"] not in ROOF_NAMES:
            groups.setdefault((r["device"], r["suite"], *r["shape"], r["dtype"], r["pass"]), []).append(r)
    rows = []
    for (_, suite, *shape, dtype, kind), group in groups.items():
        ours = next((r for r in group if r["provider"] == "prefkern"), None)
        peers = [r for r in group if not r["ours"]]
        if ours is None or not peers:
            continue
        best = min(peers, key=lambda r: r["p50_s"])
        rows.append((
            suite, ", ".join(map(str, shape)), dtype, kind, _milliseconds(ours["p50_s"]), best["provider"],
            _milliseconds(best["p50_s"]), f"{ours['p50_s'] / best['p50_s']:.2f}", _number(ours.get("of_roof"), ".2f"),
            _beyond_outputs(ours), _beyond_outputs(best),
        ))  # fmt: skip
    return rows


ROOF_NAMES = ("matmul", "onednn", "copy")


def _beyond_outputs(r: Record) -> str:
    return _number(r["peak_extra_mib"] - r.get("outputs_mib", 0.0), ".0f") if r.get("peak_extra_mib") else ""


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(title: str, rows: Sequence[tuple[str, ...]], form) -> str:
    return f"{title}\n\n{form(rows)}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        "  ".join(cell.ljust(w) if i < NAMES else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([cells[0], "-" * len(cells[0]), *(line.rstrip() for line in cells[1:])])


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    rule = ["---" if i < NAMES else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def write_readme(path: Path, records: Sequence[Record]) -> None:
    """Replace what stands between the markers; ValueError where they are missing."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} lacks the markers {BEGIN} and {END}")
    path.write_text(f"{before}{begin}\n{markdown(records)}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines; of two of the same case the last one counts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--readme", type=Path, help="write the tables between the markers of this file")
    parser.add_argument("--plots", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    records = record.read(args.files)
    print(markdown(records) if args.markdown else text(records))
    if args.readme:
        write_readme(args.readme, records)
    if args.plots:
        from bench import plots

        for path in plots.draw(records, args.plots):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
