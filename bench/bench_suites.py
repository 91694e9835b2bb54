"""The timed cases. Rounds alternate between the providers, so that a ratio compares times of the same minutes."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.fresh import Case, Outcome, check, measure
from bench.suites import BASELINE, DEVICE, DTYPES, SUITES, Shape


def pytest_generate_tests(metafunc) -> None:
    options = metafunc.config.option
    cases = [
        pytest.param(case := Case(suite.name, provider, dtype, kind, options.shape), id=f"{case}-{round_}")
        for suite in SUITES.values()
        for dtype in DTYPES
        for kind in suite.flops
        for round_ in range(options.rounds or suite.rounds(dtype))
        for provider in suite.providers
        if suite.runs(provider, dtype, kind) and (not options.providers or provider in options.providers)
    ]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="session")
def truths(tmp_path_factory):
    """File of the float64 results of a suite at a shape and dtype, made once."""
    folder = tmp_path_factory.mktemp("truth")

    @functools.cache
    def truth(suite: str, dtype: str, shape: Shape) -> Path:
        path = folder / f"{suite}-{dtype}.pt"
        torch.save(SUITES[suite].truth(inputs(suite, dtype, shape)), path)
        return path

    return truth


@pytest.fixture(scope="session")
def measured(truths):
    """Memory and error of a case, measured once, the baseline first; raises where the case is wrong."""

    @functools.cache
    def outcome(case: Case) -> Outcome:
        truth = truths(case.suite, case.dtype, case.shape)
        own = measure(case, truth)
        baseline = own if case.provider == BASELINE else outcome(replace(case, provider=BASELINE))
        check(case, own, baseline)
        return own

    return outcome


@functools.lru_cache(maxsize=1)  # the head's inputs are large: those of one dtype at a time
def inputs(suite: str, dtype: str, shape: Shape):
    return SUITES[suite].inputs(shape, dtype)


def bench_case(case: Case, measured, benchmark) -> None:
    suite = SUITES[case.suite]
    outcome = measured(case)  # before anything is timed
    data = inputs(case.suite, case.dtype, case.shape)

    def step() -> None:
        suite.step(case.provider, case.kind, data)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    suite.step(case.provider, case.kind, suite.inputs(Shape(64, 32, 257), case.dtype))  # kernels are chosen or compiled
    benchmark.extra_info.update(asdict(case), **asdict(outcome), device=str(DEVICE))
    benchmark.pedantic(step, rounds=1, iterations=suite.iterations)
