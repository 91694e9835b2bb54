"""Checks and times the providers of a suite in this process, on a GPU by its own clock.

Times are of CUDA events around a step. Before each, a buffer larger than the last-level cache is overwritten, which
also keeps the device busy while the step is launched. Where there is no GPU, a clock of the host serves.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import fresh, record
from bench.providers import BASELINE
from bench.record import Record
from bench.shapes import DEVICE, Shape, matmul_rate
from bench.suite import Results, Suite
from prefkern.planner import interpreting

FLUSHED_BYTES = 1 << 30  # a quarter of a millisecond on an H200: longer than a step takes to be launched


class Meter:
    """Checks and times the providers of a suite, pass by pass."""

    def __init__(self, suite: Suite, rounds: int) -> None:
        self.suite, self.rounds = suite, rounds
        self.dtype = "fp32" if interpreting() else "bf16"  # the interpreter multiplies no bf16
        self.rate = matmul_rate(self.dtype)
        self.cuda = DEVICE.type == "cuda"
        if self.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            self.flushed = torch.empty(min(FLUSHED_BYTES, total // 64) // 4, device=DEVICE)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._truth: tuple = (None, None)
        self._errors: dict[str, dict[str, float]] = {}

    def group(self, shape: Shape, kind: str, listed: Sequence[str]) -> list[Record]:
        """Records of the providers, and of the roofs, at one shape and pass."""
        names = [*self.suite.roofs, *listed]
        left_out = {n: self.suite.obstacle(self.suite.find(n), kind, shape, self.dtype, self.rate) for n in names}
        left_out = {name: why for name, why in left_out.items() if why}
        facts: dict[str, Record] = {name: {} for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        if any(name not in left_out for name in listed):
            torch._dynamo.reset()  # code that was compiled for other shapes counts towards a limit
            inputs = self.suite.inputs(shape, self.dtype)
            for name in (name for name in names if name not in left_out):
                case = fresh.Case(self.suite.name, name, self.dtype, kind, shape)
                facts[name], why = self._attempt(self._facts, case, inputs)
                if why or str(facts[name].get("contract")).startswith("wrong"):
                    left_out[name] = why or facts[name]["contract"]
            for _ in range(self.rounds):
                for name in (name for name in names if name not in left_out):
                    seconds, why = self._attempt(self._seconds, name, kind, inputs)
                    if why:
                        left_out[name] = why
                    else:
                        times[name].append(seconds)
        records = []
        for name in (name for name in names if name in left_out or times[name]):
            of_case = record.case_record(self.suite.name, shape, self.dtype, kind, name)
            if name in left_out:
                records.append({**of_case, **(facts[name] or {}), "left_out": left_out[name]})
            else:
                timed = {**record.percentiles(times[name]), "times_s": times[name]}
                records.append({**of_case, **facts[name], **timed})
        return record.compare(records)

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        """What the function returns, or why it failed: whatever package computes, the others go on."""
        try:
            return function(*arguments), None
        except Exception as error:
            why = fresh.failure(error)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return None, why

    def _facts(self, case: fresh.Case, inputs: Any) -> Record:
        """Memory at the shape, error against float64 and what it means, after a run that compiles; none of a roof."""
        fresh.run(self.suite, case, inputs)
        if case.provider in self.suite.roofs:
            return {}
        if self.suite.find(case.provider).compiles:
            fresh.run(self.suite, case, inputs)
        prepared = self.suite.prepare(case.provider, case.kind, inputs)
        before = fresh.reset_peak()
        results = self.suite.step(case.provider, case.kind, prepared)
        extra = fresh.peak() - before
        outputs = sum(t.numel() * t.element_size() for t in results.values())
        small, truth = self._checked(case, inputs)
        if small is not inputs:
            del results, prepared
            results = fresh.run(self.suite, case, small)
        error = fresh.errors(self.suite.sample(results, small), truth)
        outcome = fresh.Outcome(extra / 2**20, outputs / 2**20, 0.0, error)
        verdict = fresh.verdict(case, outcome, self._baseline(case, inputs))
        measured = asdict(outcome)
        del measured["seconds"]
        return {**measured, "contract": verdict}

    def _baseline(self, case: fresh.Case, inputs: Any) -> fresh.Outcome:
        """Plain torch's error, at the shape that is checked."""
        small, truth = self._checked(case, inputs)
        if case.kind not in self._errors:
            results = fresh.run(self.suite, replace(case, provider=BASELINE), small)
            self._errors[case.kind] = fresh.errors(self.suite.sample(results, small), truth)
        return fresh.Outcome(0.0, 0.0, 0.0, self._errors[case.kind])

    def _checked(self, case: fresh.Case, inputs: Any) -> tuple[Any, Results]:
        """The inputs whose results are compared with float64, and what they should be; made once a shape."""
        shape = self.suite.checked(case.shape)
        if self._truth[0] != (shape, case.shape.n):
            self._truth, self._errors = (None, None), {}
            small = inputs if shape.n == case.shape.n else self.suite.inputs(shape, self.dtype)
            self._truth = ((shape, case.shape.n), (small, self.suite.truth(small)))
        small, truth = self._truth[1]
        return (inputs if shape.n == case.shape.n else small), truth

    def _seconds(self, name: str, kind: str, inputs: Any) -> float:
        """Of one step, without what it starts from."""
        prepared = self.suite.prepare(name, kind, inputs)
        if not self.cuda:
            start = time.perf_counter()
            self.suite.step(name, kind, prepared)
            return time.perf_counter() - start
        start, end = self.events
        self.flushed.zero_()
        start.record()
        self.suite.step(name, kind, prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
