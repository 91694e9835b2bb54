"""One case in a process of its own: peak extra memory, time of one run, and error against float64.

The processes are forked from one that has imported the packages and done nothing else: no thread, no device.
Extra memory is what the process (on a GPU: torch's allocator) held at its peak beyond what it held with the inputs
in place, results included. On Linux the kernel's own high-water mark is reset before the run, so nothing is missed
between samples; elsewhere the mark cannot be reset, and making the inputs hides a peak smaller than its own.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.providers import BASELINE
from bench.shapes import DEVICE, DTYPES, Shape, synchronize
from bench.suite import Results, Suite
from bench.suites import SUITES

PEERS = ("trl.kernels.chunked_logprob", "liger_kernel.chunked_loss", "cut_cross_entropy")
# The project's bound: twice the baseline's error plus one unit, the dtype's rounding or fp32's for what is fp32.
TIMES_BASELINE = 2
# An error of this share of the largest value is no rounding: the provider computes something else.
WRONG = {"bf16": 0.1, "fp32": 1e-3}


@dataclass(frozen=True)
class Case:
    """What is run; a round of it is timed elsewhere."""

    suite: str
    provider: str
    dtype: str
    kind: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.suite}-{self.shape}-{self.dtype}-{self.kind}-{self.provider}"


@dataclass(frozen=True)
class Outcome:
    """seconds: of the run whose memory was measured. error: largest of each result, relative to the largest value."""

    peak_extra_mib: float
    outputs_mib: float
    seconds: float
    error: dict[str, float]


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, called in a fresh process.

    Raises:
        RuntimeError: it failed, with the first line of its exception's message, or the process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    # Peers are imported once; on a GPU each process does it, as some look at the device, which no fork survives.
    context.set_forkserver_preload(["bench.suites", *(PEERS if DEVICE.type == "cpu" else ())])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "was killed: out of memory?"
    process.join()
    if error is not None:
        raise RuntimeError(error)
    return result


def _send_result(sender, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:  # of whatever package computes
        sender.send((None, failure(error)))


def failure(error: Exception) -> str:
    """What is put on record of a provider that failed: the first line."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def verdict(case: Case, outcome: Outcome, baseline: Outcome) -> str:
    """ "met" where the contract on numerics is, "not met" with what is off, or "wrong" with it.

    Peers whose verdict is "not met" are timed, and reported with it; what is wrong is not timed. Ours has to meet it.
    """
    off = ""
    for name, error in outcome.error.items():
        unit = torch.finfo(torch.float32 if name in ("logps", "loss") else DTYPES[case.dtype]).eps
        bound = TIMES_BASELINE * baseline.error[name] + unit
        if math.isnan(error) or error > WRONG[case.dtype]:
            return f"wrong: {name} is off by {error:.2e} of its largest value"
        if error > bound and case.provider != BASELINE:
            off = off or f"not met: {name} is off by {error:.2e} of its largest value, allowed are {bound:.2e}"
    return off or "met"


def measure(case: Case, truth: Path) -> Outcome:
    """Run the case in this process.

    Args:
        truth: file of the results in float64, at the shape that is checked.
    """
    suite = SUITES[case.suite]
    inputs = suite.inputs(case.shape, case.dtype)
    warm_up(case, inputs)
    gc.collect()
    prepared = suite.prepare(case.provider, case.kind, inputs)
    before, start = reset_peak(), time.perf_counter()
    results = suite.step(case.provider, case.kind, prepared)
    synchronize()
    seconds, extra = time.perf_counter() - start, peak() - before
    outputs = sum(t.numel() * t.element_size() for t in results.values())
    small = suite.checked(case.shape)
    if small.n < case.shape.n:
        del results, prepared, inputs
        inputs = suite.inputs(small, case.dtype)
        results = run(suite, case, inputs)
    error = errors(suite.sample(results, inputs), torch.load(truth, map_location=DEVICE))
    return Outcome(extra / 2**20, outputs / 2**20, seconds, error)


def run(suite: Suite, case: Case, inputs: Any) -> Results:
    """A pass with what it starts from."""
    return suite.step(case.provider, case.kind, suite.prepare(case.provider, case.kind, inputs))


def warm_up(case: Case, inputs) -> None:
    """Thread pools, libraries' buffers and compilers are no part of a case: run it small, or compile it at its size."""
    suite = SUITES[case.suite]
    if suite.find(case.provider).compiles:
        for _ in range(2):  # the second may compile again, for sizes that may change
            run(suite, case, inputs)
    else:
        run(suite, case, suite.inputs(Shape(64, 32, 257, case.shape.softcap), case.dtype))


def errors(results: Results, truth: Results) -> dict[str, float]:
    """Largest error of each result, divided by the largest true value, or by the scale that the truth names."""

    def error(name: str, result: torch.Tensor) -> float:
        scale = truth.get(f"{name}_scale", truth[name]).abs().max()
        return ((result.double() - truth[name]).abs().max() / scale).item()

    return {name: error(name, result) for name, result in results.items()}


def reset_peak() -> int:
    """Bytes held now; later peaks count from here."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # what is free but kept would hide as much of the peak
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return peak()


def peak() -> int:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
