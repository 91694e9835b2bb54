"""One case in a process of its own: peak extra memory of its first run, and its error against float64.

    python -m bench.fresh '{"suite": "head", "provider": "chunked", ...}' truth.pt

Extra memory is what the process (on a GPU: torch's allocator) held at its peak beyond what it held with the inputs
in place, results included. On Linux the kernel's own high-water mark is reset before the run, so nothing is missed
between samples; elsewhere the mark cannot be reset, and making the inputs hides a peak smaller than its own.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.suites import BASELINE, CEILING, DEVICE, DTYPES, SUITES, Results, Shape

# Errors that nobody can complain of, in units of the dtype's rounding and relative to the largest value: the project's
# bound is twice the baseline's error plus one unit; the baselines themselves must be right to a few.
OURS_TIMES_BASELINE = 2
BASELINE_UNITS = 16


@dataclass(frozen=True)
class Case:
    """What is run; a round of it is timed elsewhere."""

    suite: str
    provider: str
    dtype: str
    kind: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.suite}-{self.dtype}-{self.kind}-{self.provider}"

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{**values, "shape": Shape(*values["shape"])})


@dataclass(frozen=True)
class Outcome:
    peak_mib: float
    error: dict[str, float]  # largest error of each result, divided by the largest true value


def measure(case: Case, truth: Path) -> Outcome:
    """Run the case in a fresh process."""
    command = [sys.executable, "-m", "bench.fresh", json.dumps(asdict(case)), str(truth)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def check(case: Case, outcome: Outcome, baseline: Outcome) -> None:
    """Raise AssertionError where the case is too far from float64 to be worth timing."""
    for name, error in outcome.error.items():
        unit = torch.finfo(torch.float32 if name in ("logps", "loss") else DTYPES[case.dtype]).eps
        if case.provider in (BASELINE, "cross_entropy"):
            bound = BASELINE_UNITS * torch.finfo(DTYPES[case.dtype]).eps
        else:
            bound = OURS_TIMES_BASELINE * baseline.error[name] + unit
        assert error <= bound, f"{case}: {name} is off by {error:.2e} of its largest value, allowed are {bound:.2e}"


def main(case: Case, truth: Path) -> Outcome:
    suite = SUITES[case.suite]
    # A small run first: thread pools and the libraries' own buffers are no part of the case.
    suite.step(case.provider, case.kind, suite.inputs(Shape(64, 32, 257), case.dtype))
    inputs = suite.inputs(case.shape, case.dtype)
    gc.collect()
    before = _reset_peak()
    results = suite.step(case.provider, case.kind, inputs)
    peak = _peak() - before
    if case.provider == CEILING:
        return Outcome(peak / 2**20, {})
    return Outcome(peak / 2**20, errors(suite.sample(results, inputs), torch.load(truth, map_location=DEVICE)))


def errors(results: Results, truth: Results) -> dict[str, float]:
    """Largest error of each result, divided by the largest true value."""
    return {
        name: ((result.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
        for name, result in results.items()
    }


def _reset_peak() -> int:
    """Bytes held now; later peaks count from here."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(main(Case.from_json(sys.argv[1]), Path(sys.argv[2])))))
