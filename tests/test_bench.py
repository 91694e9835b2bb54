"""The benchmarks compute what they say, at sizes that take no time."""

import json

import pytest
import torch

from bench import fresh, report
from bench.suites import BASELINE, CEILING, DTYPES, SUITES, Shape

TINY = Shape(48, 16, 700)
CASES = [
    fresh.Case(suite.name, provider, dtype, kind, TINY)
    for suite in SUITES.values()
    for dtype in DTYPES
    for kind in suite.flops
    for provider in suite.providers
    if suite.runs(provider, dtype, kind) and provider != CEILING
]


def errors(case: fresh.Case) -> fresh.Outcome:
    suite = SUITES[case.suite]
    inputs = suite.inputs(case.shape, case.dtype)
    truth, results = suite.truth(inputs), suite.step(case.provider, case.kind, inputs)
    return fresh.Outcome(0.0, fresh.errors(suite.sample(results, inputs), truth))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_is_right(case: fresh.Case):
    baseline = errors(fresh.Case(case.suite, BASELINE, case.dtype, case.kind, case.shape))
    fresh.check(case, errors(case), baseline)


def test_a_wrong_result_is_not_timed():
    case = fresh.Case("head", "chunked", "fp32", "forward", TINY)
    right = fresh.Outcome(0.0, {"logps": 1e-7})
    with pytest.raises(AssertionError, match="head-fp32-forward-chunked: logps is off by 1.00e-03"):
        fresh.check(case, fresh.Outcome(0.0, {"logps": 1e-3}), right)
    with pytest.raises(AssertionError, match="off by nan"):
        fresh.check(case, fresh.Outcome(0.0, {"logps": float("nan")}), right)


def test_truth_is_the_gradient_in_float64():
    suite = SUITES["head"]
    inputs = suite.inputs(TINY, "fp32")
    names = ("hidden_ND", "weight_VD", "upstream_N")
    double = inputs._replace(**{name: getattr(inputs, name).double() for name in names})
    hidden, weight = double.hidden_ND.requires_grad_(), double.weight_VD.requires_grad_()
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, inputs.labels_N[:, None])[:, 0]
    grads = torch.autograd.grad(logps, (hidden, weight), double.upstream_N)
    expected = suite.sample({"logps": logps.detach(), "dhidden": grads[0], "dweight": grads[1]}, inputs)
    for name, value in suite.truth(inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_memory_of_a_fresh_process_holds_the_logits_of_plain_torch(tmp_path):
    """1024 x 16,384 logits in fp32 are 64 MiB; plain torch holds them and their log-softmax at once."""
    case = fresh.Case("head", BASELINE, "fp32", "forward", Shape(1024, 8, 16_384))
    suite = SUITES["head"]
    torch.save(suite.truth(suite.inputs(case.shape, case.dtype)), tmp_path / "truth.pt")
    outcome = fresh.measure(case, tmp_path / "truth.pt")
    assert 120 < outcome.peak_mib < 200
    fresh.check(case, outcome, outcome)


def test_report_compares_medians_of_one_run():
    entries = [
        {
            "extra_info": {
                "suite": "head", "dtype": "bf16", "kind": kind, "provider": provider, "peak_mib": 7.0, "device": "cpu",
                "error": {"logps": 1e-3, "dhidden": 2e-3}, "shape": [1024, 8, 64],
            },
            "stats": {"median": seconds},
        }
        for kind, provider, times in [
            ("frozen", BASELINE, (2.0, 4.0, 9.0)), ("frozen", "chunked", (1.0, 3.0, 2.0)), ("forward", CEILING, (1.0,)),
        ]
        for seconds in times
    ]  # fmt: skip
    records = {r["provider"]: r for r in report.rows({"benchmarks": entries})}
    assert records["chunked"]["times_s"] == [1.0, 3.0, 2.0]
    assert records["chunked"]["ratio"] == 0.5
    assert records["chunked"]["of_matmul"] == 1.0  # twice the FLOPs of one pass in twice its time
    assert records[CEILING]["ratio"] is None
    lines = report.table(list(records.values())).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[3].split() == ["head", "bf16", "frozen", "chunked", "2000.00", "0.50", "7", "1.00", "2.0e-03"]
    assert json.loads(json.dumps(records["chunked"])) == records["chunked"]
