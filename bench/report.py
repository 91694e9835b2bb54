"""Results of pytest-benchmark as one table, and as JSON lines that can be compared between runs.

python -m bench.report results.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import prefkern
from bench.suites import BASELINE, CEILING, SUITES, Shape

PACKAGES = ("torch", "triton")
COLUMNS = ("suite", "dtype", "pass", "provider", "median ms", "ratio", "peak extra MiB", "of matmul rate", "error")


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record a case: the median of its rounds, its ratio to the baseline, memory, rate and error.

    ratio: median time divided by that of plain torch; below 1 is faster.
    of_matmul: FLOP/s of the work that the result needs, divided by those of hidden @ weight.T alone, in this run.
    """
    times: dict[tuple, list[float]] = {}
    info: dict[tuple, dict[str, Any]] = {}
    for entry in results["benchmarks"]:
        extra = entry["extra_info"]
        key = tuple(extra[name] for name in ("suite", "dtype", "kind", "provider"))
        times.setdefault(key, []).append(entry["stats"]["median"])
        info[key] = extra
    medians = {key: statistics.median(values) for key, values in times.items()}
    records = []
    for key, median in medians.items():
        suite, dtype, kind, provider = key
        baseline, ceiling = medians.get((suite, dtype, kind, BASELINE)), medians.get((suite, dtype, "forward", CEILING))
        flops = SUITES[suite].flops[kind]
        records.append({
            "suite": suite, "dtype": dtype, "pass": kind, "provider": provider,
            "median_s": median, "times_s": times[key], "ratio": median / baseline if baseline else None,
            "of_matmul": flops / 2 * ceiling / median if ceiling and flops else None,
            "peak_extra_mib": info[key]["peak_mib"],
            "error": info[key]["error"], "shape": info[key]["shape"], "device": info[key]["device"],
        })  # fmt: skip
    return records


def provenance(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures depend on: commit, versions, machine, date."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": results["datetime"], "commit": commit.get("id"), "uncommitted_changes": commit.get("dirty"),
        "python": machine["python_version"], "prefkern": prefkern.__version__, **versions,
        "cpu": machine.get("cpu", {}).get("brand_raw"), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as aligned text."""
    cells = [COLUMNS]
    for r in records:
        error = max(r["error"].values(), default=None)
        cells.append((
            r["suite"], r["dtype"], r["pass"], r["provider"], f"{1000 * r['median_s']:.2f}", _text(r["ratio"], ".2f"),
            f"{r['peak_extra_mib']:.0f}", _text(r["of_matmul"], ".2f"), _text(error, ".1e"),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    left = COLUMNS.index("median ms")
    aligned = []
    for row in cells:
        names = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        aligned.append("  ".join(names + figures))
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(path: Path) -> None:
    """Print the table and write JSON lines beside the results."""
    results = json.loads(path.read_text())
    records, origin = rows(results), provenance(results)
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({**origin, **record}) + "\n" for record in records))
    shape = Shape(*records[0]["shape"])
    print(table(records))
    machine = origin["gpu"] or f"{origin['cpu']}, {origin['threads']} threads"
    print(f"\nN {shape.n}, D {shape.d}, V {shape.v}; {machine}; torch {origin['torch']}")
    print("ratio: to plain torch; error: largest, of all results, against float64 and relative to the largest value")
    print(f"as JSON lines: {lines}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
