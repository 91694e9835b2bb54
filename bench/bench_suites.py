"""First every case is checked, each in a process of its own; then all are timed.

Rounds alternate between the providers, so that a ratio compares times of the same minutes. A case of ours that is
wrong is a red test; a peer's that is wrong, or fails, is left out and said to be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import record
from bench.fresh import Case, Outcome, failure, in_a_process, measure, verdict, warm_up
from bench.providers import BASELINE
from bench.shapes import DTYPES, Shape, matmul_rate, synchronize
from bench.suites import SUITES

SLOW_SECONDS, SLOW_ROUNDS = 5, 3  # a run that takes longer is run less often, yet has a median
_warm: set[Case] = set()  # of the group that is being timed
_group: list[Case] = []  # one of that group
_failed: set[Case] = set()  # while they were timed


def cases(options) -> Iterator[tuple[Case, str | None]]:
    """All cases that the options ask for, each with why it is left out, or None."""
    rates = {dtype: matmul_rate(dtype) for dtype in DTYPES}
    for suite in (SUITES[name] for name in options.suite if name in SUITES):
        usual = (*suite.roofs, *suite.usual_providers)
        names = [*suite.roofs, *options.providers] if options.providers else usual
        for shape in suite.shapes(options.shape or [Shape()], options.model, options.tokens):
            for dtype in [d for d in suite.dtypes if d in (options.dtype or suite.usual_dtypes)]:
                for kind in suite.passes(options.passes):
                    for name in names:
                        if name in suite.roofs or name in suite.providers:
                            provider = suite.find(name)
                            why = suite.obstacle(provider, kind, shape, dtype, rates[dtype])
                            yield Case(suite.name, name, dtype, kind, shape), why


def pytest_generate_tests(metafunc) -> None:
    options = metafunc.config.option
    listed = list(cases(options))
    run = [case for case, why in listed if why is None]
    if metafunc.function is bench_is_right:
        leave_out(options, [(case, why) for case, why in listed if why])
        run = [case for case in run if case.provider not in SUITES[case.suite].roofs]
        metafunc.parametrize("case", run, ids=str)
        return
    groups: dict[tuple, list[Case]] = {}
    for case in run:
        groups.setdefault((case.suite, case.shape, case.dtype, case.kind), []).append(case)
    rounds = [
        pytest.param(case, round_, id=f"{case}-{round_}")
        for (suite, _, dtype, _), group in groups.items()
        for round_ in range(options.rounds or SUITES[suite].rounds(dtype))
        for case in group
    ]
    metafunc.parametrize("case, round_", rounds)


def leave_out(options, left_out: list[tuple[Case, str]]) -> None:
    """Put on record why cases are not timed."""
    if options.left_out:
        kept = [(c, why) for c, why in left_out if c.provider not in SUITES[c.suite].roofs]
        parts = [(record.case_record(c.suite, c.shape, c.dtype, c.kind, c.provider), why) for c, why in kept]
        record.write(options.left_out, [{**r, "left_out": why} for r, why in parts])


@pytest.fixture(scope="session")
def truths(tmp_path_factory):
    """File of the float64 results of a suite at a shape and dtype, made once."""
    folder = tmp_path_factory.mktemp("truth")

    @functools.cache
    def truth(suite: str, dtype: str, shape: Shape) -> Path:
        path = folder / f"{suite}-{dtype}-{shape.n}-{shape.d}-{shape.v}-{shape.softcap}.pt"
        torch.save(SUITES[suite].truth(inputs(suite, dtype, shape)), path)
        return path

    return truth


@pytest.fixture(scope="session")
def measured(truths, pytestconfig):
    """Outcome and verdict of a case, made once; a string where it failed."""

    @functools.cache
    def outcome(case: Case) -> tuple[Outcome, str] | str:
        small = SUITES[case.suite].checked(case.shape)
        truth = truths(case.suite, case.dtype, small)
        try:
            own = in_a_process(measure, case, truth)
        except RuntimeError as error:
            leave_out(pytestconfig.option, [(case, str(error))])
            return str(error)
        baseline = replace(case, provider=BASELINE, shape=small)
        of_baseline = (own, "") if case == baseline else outcome(baseline)
        if isinstance(of_baseline, str):
            return f"nothing to compare it with: {of_baseline}"
        found = verdict(case, own, of_baseline[0])
        if found.startswith("wrong"):
            leave_out(pytestconfig.option, [(case, found)])
            return found
        return own, found

    return outcome


@functools.lru_cache(maxsize=1)  # the head's inputs are large: those of one dtype at a time
def inputs(suite: str, dtype: str, shape: Shape):
    return SUITES[suite].inputs(shape, dtype)


def bench_is_right(case: Case, measured) -> None:
    found = measured(case)
    if SUITES[case.suite].find(case.provider).ours:
        assert not isinstance(found, str), found
        assert found[1] == "met", f"{case}: {found[1]}"


def bench_time(case: Case, round_: int, measured, benchmark, pytestconfig) -> None:
    suite = SUITES[case.suite]
    if case in _failed:
        pytest.skip("failed in an earlier round")
    facts = {"contract": None}
    if case.provider not in suite.roofs:
        found = measured(case)
        if isinstance(found, str):
            pytest.skip(found)
        if found[0].seconds > SLOW_SECONDS and round_ >= SLOW_ROUNDS:
            pytest.skip(f"{found[0].seconds:.0f} s a run: {SLOW_ROUNDS} rounds are enough")
        facts = {**asdict(found[0]), "contract": found[1]}
        facts.pop("seconds")
    benchmark.extra_info.update(
        case=[case.suite, list(case.shape), case.dtype, case.kind, case.provider], measured=facts
    )  # fmt: skip
    try:
        time_once(case, benchmark)
    except Exception as error:  # of whatever package computes; what it timed before is dropped with it
        if suite.find(case.provider).ours or case.provider in suite.roofs:
            raise
        _failed.add(case)
        leave_out(pytestconfig.option, [(case, failure(error))])
        pytest.skip(failure(error))


def time_once(case: Case, benchmark) -> None:
    """One round; where it is the first of its group or provider, warm up before."""
    suite, data = SUITES[case.suite], inputs(case.suite, case.dtype, case.shape)

    def step() -> None:
        suite.step(case.provider, case.kind, prepared)
        synchronize()

    if not _group or replace(_group[0], provider=case.provider) != case:
        _group[:] = [case]
        _warm.clear()
        torch._dynamo.reset()  # code that was compiled for other dtypes and passes counts towards a limit
    if case not in _warm:
        warm_up(case, data)
        _warm.add(case)
    prepared = suite.prepare(case.provider, case.kind, data)
    benchmark.pedantic(step, rounds=1, iterations=suite.iterations)
