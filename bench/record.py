"""JSON lines: one a measurement, each with everything that its figures depend on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import prefkern
from bench.providers import BASELINE
from bench.shapes import Shape
from bench.suites import SUITES

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "numpy")

NEEDED = {"date", "device", "threads", "versions", "suite", "model", "shape", "dtype", "pass", "provider", "ours"}

Record = dict[str, Any]


def provenance() -> Record:
    """Date, commit, versions and machine."""
    versions = {"python": platform.python_version(), "prefkern": prefkern.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if (
        info.exists()
    ) else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def case_record(suite: str, shape: Shape, dtype: str, kind: str, provider: str) -> Record:
    """What a measurement is of."""
    return {
        "suite": suite, "model": shape.model, "shape": [shape.n, shape.d, shape.v], "softcap": shape.softcap,
        "dtype": dtype, "pass": kind, "head": kind if kind in ("frozen", "trained") else None, "provider": provider,
        "ours": provider.startswith("prefkern"),
    }  # fmt: skip


def percentiles(times: Sequence[float]) -> Record:
    """Of the rounds, in seconds; by linear interpolation, so that few rounds do not make them the extremes."""
    ordered = sorted(times)

    def at(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = int(position)
        return ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {"rounds": len(ordered), "p20_s": at(0.2), "p50_s": at(0.5), "p80_s": at(0.8)}


def compare(records: Iterable[Record]) -> list[Record]:
    """The records with what follows from several: FLOPs, bytes, ratio to plain torch, fraction of the roof.

    roofs: FLOP/s of each matrix product of the same shape and dtype in the same rounds; where there is none in the
        suite, bytes/s of a copy. roof: the fastest.
    of_roof: the time that the pass's work takes at that rate, divided by the measured time. The work is what the result
        needs (2, 4 or 6 NDV), whatever a provider spends.
    """
    records = list(records)
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((r["suite"], r["model"], *r["shape"], r["dtype"], r["pass"]), []).append(r)
    for (name, _, n, d, v, dtype, kind), group in groups.items():
        suite, shape = SUITES.get(name), Shape(n, d, v)
        timed = {r["provider"]: r for r in group if "p50_s" in r}
        if suite is None:
            continue
        for provider, r in timed.items():
            is_roof = provider in suite.roofs
            work = suite.roof_work(shape, dtype) if is_roof else suite.work(kind, shape, dtype)
            r.update(work._asdict())
        rates = {name: timed[name][suite.bound] / timed[name]["p50_s"] for name in suite.roofs if name in timed}
        best = max(rates, key=rates.get, default=None)
        for r in timed.values():
            r["ratio"] = r["p50_s"] / timed[BASELINE]["p50_s"] if BASELINE in timed else None
            r["roof"], r["roofs"] = best, rates
            r["of_roof"] = r[suite.bound] / rates[best] / r["p50_s"] if best else None
    return records


def from_benchmark(results: Mapping[str, Any], left_out: Iterable[Record] = ()) -> list[Record]:
    """Records of a file of pytest-benchmark, whose every entry is one round, and of what was not timed."""
    times: dict[tuple, list[float]] = {}
    measured: dict[tuple, Record] = {}
    for entry in results["benchmarks"]:
        suite, shape, dtype, kind, provider = entry["extra_info"]["case"]
        key = (suite, Shape(*shape), dtype, kind, provider)
        times.setdefault(key, []).append(entry["stats"]["median"])
        measured[key] = entry["extra_info"]["measured"]
    left_out = list(left_out)
    gone = [{k: v for k, v in r.items() if k != "left_out"} for r in left_out]
    records = [
        {**case_record(*key), **percentiles(values), "times_s": values, **measured[key]}
        for key, values in times.items()
        if case_record(*key) not in gone
    ]
    origin = provenance()
    return [{**origin, **r} for r in [*compare(records), *left_out]]


def beyond_results(r: Record) -> float | None:
    """MiB at the peak beyond inputs and results, 0 where the results took the place of inputs; None if not measured."""
    if r.get("peak_extra_mib") is None:
        return None
    return max(r["peak_extra_mib"] - (r.get("outputs_mib") or 0.0), 0.0)


def write(path: Path, records: Iterable[Record]) -> None:
    """Append the records."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def lines(path: Path) -> list[Record]:
    """The records of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measurements() -> list[Path]:
    """The files of bench/results that hold measurements; others hold what kernels were compiled to."""
    return [path for path in sorted(RESULTS.glob("*.jsonl")) if all(NEEDED <= r.keys() for r in lines(path))]


def read(paths: Iterable[Path]) -> list[Record]:
    """Records of several files, a case (suite, shape, dtype and pass on a machine) with all its providers of one run.

    A later run of a case replaces an earlier one whole, whoever was in it: only providers that were timed in turn
    are compared.

    Raises:
        ValueError: a file is missing or holds something else.
    """
    cases: dict[tuple, dict[str, Record]] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there")
        for r in lines(path):
            if not NEEDED <= r.keys():
                raise ValueError(f"{path}: no measurements as `python -m bench` writes them")
            key = (r["device"], r["threads"], r["suite"], r["model"], *r["shape"], r["dtype"], r["pass"])
            run = cases.setdefault(key, {})
            dates = {other["date"] for other in run.values()}
            if any(r["date"] < date for date in dates):
                continue
            if any(date < r["date"] for date in dates):
                run.clear()
            run[r["provider"]] = r
    return [r for run in cases.values() for r in run.values()]
