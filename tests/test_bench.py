"""The benchmarks compute what they say, at sizes that take no time."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from argparse import ArgumentTypeError

import pytest
import torch

from bench import __main__ as bench_main
from bench import bench_suites, conftest, fresh, gpu, once, plots, record, report, shapes, trainer_step
from bench.meter import Meter
from bench.providers import BASELINE, BETA, Provider
from bench.shapes import DTYPES, Shape
from bench.suites import SUITES

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
TINY = Shape(48, 16, 700)
CAPPED = TINY._replace(softcap=3.0)
COMPUTED = [SUITES[name] for name in ("head", "dpo", "tail", "logits")]  # the others are the head at other shapes


def _cases(shape: Shape):
    for suite in COMPUTED:
        for dtype in suite.dtypes:
            for kind in suite.flops:
                for provider in suite.providers.values():
                    if provider.obstacle(shape, dtype) is None and (suite.bound == "flops" or shape is TINY):
                        case = fresh.Case(suite.name, provider.name, dtype, kind, shape)
                        yield pytest.param(case, id=str(case), marks=[pytest.mark.slow] if provider.compiles else [])


def outcome(case: fresh.Case) -> fresh.Outcome:
    suite = SUITES[case.suite]
    inputs = suite.inputs(case.shape, case.dtype)
    truth, results = suite.truth(inputs), fresh.run(suite, case, inputs)
    return fresh.Outcome(0.0, 0.0, 0.0, fresh.errors(suite.sample(results, inputs), truth))


@pytest.mark.parametrize("case", [*_cases(TINY), *_cases(CAPPED)])
def test_every_provider_computes_the_same(case: fresh.Case):
    torch._dynamo.reset()  # a limit counts what was compiled before
    baseline = outcome(fresh.Case(case.suite, BASELINE, case.dtype, case.kind, case.shape))
    verdict = fresh.verdict(case, outcome(case), baseline)
    assert not verdict.startswith("wrong")
    if SUITES[case.suite].find(case.provider).ours:
        assert verdict == "met"


def test_providers_do_not_change_their_inputs():
    for suite in COMPUTED:
        inputs = suite.inputs(TINY, "fp32")
        before = suite.truth(inputs)
        for name, provider in suite.providers.items():
            if provider.obstacle(TINY, "fp32") is None and not provider.compiles:
                fresh.run(suite, fresh.Case(suite.name, name, "fp32", list(suite.flops)[-1], TINY), inputs)
        for key, value in suite.truth(inputs).items():
            assert torch.equal(value, before[key])


def test_verdicts():
    case = fresh.Case("head", "prefkern", "fp32", "forward", TINY)
    baseline = fresh.Outcome(0.0, 0.0, 0.0, {"logps": 1e-7})

    def verdict(error: float) -> str:
        return fresh.verdict(case, fresh.Outcome(0.0, 0.0, 0.0, {"logps": error}), baseline)

    assert verdict(3e-7) == "met"
    assert verdict(1e-5).startswith("not met: logps is off by 1.00e-05")
    assert verdict(2e-3).startswith("wrong: logps is off by 2.00e-03")
    assert verdict(float("nan")).startswith("wrong")


@pytest.mark.parametrize("shape", [TINY, CAPPED], ids=["plain", "capped"])
def test_truth_of_the_head_is_the_gradient_in_float64(shape):
    suite = SUITES["head"]
    inputs = suite.inputs(shape, "fp32")
    results = _double(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, shape.softcap, inputs.upstream_N.double())
    for name, value in suite.truth(inputs).items():
        expected = suite.sample(results, inputs)[name]
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def test_truth_of_dpo_is_the_gradient_in_float64():
    suite = SUITES["dpo"]
    inputs = suite.inputs(TINY, "fp32")
    assert inputs.layout.num_responses == 2 and inputs.length == 24

    def loss(logps):
        chosen, rejected = logps.view(2, 24).sum(1)  # the uniform reference cancels
        return torch.nn.functional.softplus(-BETA * (chosen - rejected))

    results = _double(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, None, loss)
    expected = suite.sample(results, inputs)
    truth = suite.truth(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-11, atol=1e-11)


def _double(hidden, weight, labels, softcap, upstream):
    """Results by autograd; `upstream` is a vector, or a loss of the log-probabilities."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logps = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    value = upstream(logps) if callable(upstream) else (upstream * logps).sum()
    dhidden, dweight = torch.autograd.grad(value, (hidden, weight))
    name, result = ("loss", value.reshape(1)) if callable(upstream) else ("logps", logps)
    return {name: result.detach(), "dhidden": dhidden, "dweight": dweight}


def test_packed_pairs_are_stacked_chosen_first():
    inputs = SUITES["dpo"].inputs(Shape(512 * 3, 4, 50), "fp32")
    assert inputs.length == 256
    position = inputs.stacked(torch.arange(512 * 3))
    assert position[:3, 0].tolist() == [0, 512, 1024] and position[3:, 0].tolist() == [256, 768, 1280]


def test_memory_of_a_fresh_process_holds_the_logits_of_plain_torch(tmp_path):
    """1024 x 16,384 logits in fp32 are 64 MiB; plain torch holds them and their log-softmax at once."""
    case = fresh.Case("head", BASELINE, "fp32", "forward", Shape(1024, 8, 16_384))
    suite = SUITES["head"]
    torch.save(suite.truth(suite.inputs(case.shape, case.dtype)), tmp_path / "truth.pt")
    found = fresh.in_a_process(fresh.measure, case, tmp_path / "truth.pt")
    assert 120 < found.peak_extra_mib < 200
    assert found.outputs_mib == 1024 * 4 / 2**20
    assert fresh.verdict(case, found, found) == "met"


def test_more_rows_than_are_checked_are_measured(tmp_path, monkeypatch):
    case = fresh.Case("head", "prefkern", "fp32", "frozen", TINY)
    suite = SUITES["head"]
    monkeypatch.setattr(suite, "checked_rows", 32)
    inputs = suite.inputs(suite.checked(case.shape), case.dtype)
    assert len(inputs.labels_N) == 32
    torch.save(suite.truth(inputs), tmp_path / "truth.pt")
    found = fresh.measure(case, tmp_path / "truth.pt")
    assert found.outputs_mib == pytest.approx((48 * 16 + 48) * 4 / 2**20)
    assert max(found.error.values()) < 1e-6


def test_a_failure_in_a_fresh_process_is_an_error_here():
    with pytest.raises(RuntimeError, match="failed: ZeroDivisionError: .*by zero"):
        fresh.in_a_process(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="was killed"):
        fresh.in_a_process(os._exit, 9)


def options(**given):
    usual = dict(suite=["head"], shape=None, model=[], tokens=[], dtype=[], passes=[], providers=[], left_out=None)
    return types.SimpleNamespace(**{**usual, **given})


def test_cases_follow_the_options(monkeypatch):
    monkeypatch.setattr(shapes, "free_bytes", lambda: 64 << 30)
    monkeypatch.setattr(bench_suites, "matmul_rate", lambda dtype: 1e12)
    found = [case for case, why in bench_suites.cases(options()) if why is None]
    assert {case.kind for case in found} == {"forward"} and {case.dtype for case in found} == {"bf16", "fp32"}
    assert {case.shape for case in found} == {Shape()}
    asked = options(suite=["head", "dpo"], dtype=["fp32"], passes=["frozen"], providers=["torch", "liger"])
    found = [case for case, _ in bench_suites.cases(asked)]
    assert {(case.suite, case.provider) for case in found if case.provider not in report.ROOF_NAMES} == {
        ("head", "torch"), ("dpo", "torch"), ("dpo", "liger")
    }  # fmt: skip
    found = [case for case, why in bench_suites.cases(options(suite=["scaling"])) if why is None]
    ours = {(case.shape.n, case.shape.v) for case in found if case.provider == "prefkern"}
    assert ours == {(shape.n, shape.v) for shape in shapes.scaling_shapes()}
    peers = [case for case in found if case.provider == "cross_entropy"]
    assert {case.kind for case in peers} == {"frozen"} and max(case.shape.n for case in peers) == 4096
    roofs = {(case.shape.n, case.kind) for case in found if case.provider == "matmul"}
    assert roofs == {(n, kind) for n in shapes.SCALING_N for kind in ("forward", "frozen", "trained")}


def test_what_does_not_fit_is_left_out_and_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "free_bytes", lambda: 16 << 30)
    monkeypatch.setattr(bench_suites, "matmul_rate", lambda dtype: 1e12)
    asked = options(suite=["models"], model=["gemma2-2b"], tokens=[512, 131_072], left_out=tmp_path / "left_out.jsonl")
    listed = list(bench_suites.cases(asked))
    why = {(case.provider, case.shape.n, case.kind): why for case, why in listed}
    assert why["prefkern", 512, "frozen"] is None
    assert why["prefkern", 131_072, "frozen"].startswith("would take")
    assert why["torch", 131_072, "frozen"].startswith("needs about")
    assert why["matmul", 131_072, "frozen"].startswith("needs about 6"), "logits once, in bf16: 62.5 GiB"
    assert why["cce", 512, "frozen"] == "does not run on cpu" or shapes.DEVICE.type == "cuda"
    bench_suites.leave_out(asked, [(case, why) for case, why in listed if why])
    noted = record.lines(tmp_path / "left_out.jsonl")
    assert any(r["provider"] == "torch" and r["shape"][0] == 131_072 and "GiB" in r["left_out"] for r in noted)


def test_unknown_names_are_errors():
    parse = conftest.listed(SUITES)
    assert parse("head,dpo") == ["head", "dpo"]
    with pytest.raises(ArgumentTypeError, match="unknown hade; known are head, dpo"):
        parse("hade")
    assert conftest.shape("8,4,100") == Shape(8, 4, 100)
    for text in ("8,4", "8,4,x", "8,4,100,2"):
        with pytest.raises(ArgumentTypeError, match=f"'{text}' should be three numbers: N,D,V"):
            conftest.shape(text)


def fake(provider: str, seconds: list[float], kind="frozen", suite="head", shape=TINY, dtype="bf16", **more):
    return {
        "device": "a machine", "threads": 2, "versions": {"torch": "2", "trl": None}, "date": "2026-01-01T00:00:00",
        **record.case_record(suite, shape, dtype, kind, provider), **record.percentiles(seconds), "times_s": seconds,
        "peak_extra_mib": 9.0, "outputs_mib": 2.0, "error": {"logps": 1e-3}, "contract": "met", **more,
    }  # fmt: skip


def test_records_compare_medians_of_one_run():
    records = record.compare([
        fake("matmul", [3.0, 1.0, 2.0]), fake(BASELINE, [8.0]), fake("prefkern", [5.0]), fake("trl", [10.0], "trained"),
    ])  # fmt: skip
    roof, _, ours, other = records
    assert roof["p50_s"] == 2.0 and roof["flops"] == 2 * TINY.ndv
    assert ours["ratio"] == 5 / 8
    assert ours["of_roof"] == pytest.approx(4 / 5), "4NDV take 4 s at the rate of the matmul"
    assert ours["roof"] == "matmul" and ours["roofs"]["matmul"] == TINY.ndv
    assert other["ratio"] is None and other["of_roof"] is None, "nothing of its own pass to compare it with"
    assert json.loads(json.dumps(ours)) == ours


def test_the_faster_matmul_is_the_roof():
    records = record.compare([fake("matmul", [2.0]), fake("onednn", [1.0]), fake("prefkern", [4.0])])
    assert records[2]["roof"] == "onednn" and records[2]["of_roof"] == pytest.approx(0.5)


def test_percentiles_interpolate():
    found = record.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found["p20_s"], found["p50_s"], found["p80_s"]) == (2.0, 3.5, 5.0)


def test_providers_of_a_case_are_of_one_run_the_latest(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    other = fake("trl", [5.0], "trained")
    record.write(a, [fake("trl", [1.0]), fake("prefkern", [1.0]), fake("prefkern", [1.5]), other])
    record.write(b, [fake("prefkern", [2.0], date="2026-01-02T00:00:00")])
    for order in ([a, b], [b, a]):
        found = sorted((r["provider"], r["pass"], r["p50_s"]) for r in record.read(order))
        assert found == [("prefkern", "frozen", 2.0), ("trl", "trained", 5.0)], "nothing is compared across runs"
    assert sorted(r["p50_s"] for r in record.read([a])) == [1.0, 1.5, 5.0], "of a run the last line of a provider"


def test_files_of_something_else_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.jsonl").write_text('{"kernel": "row_softmax"}\n')
    with pytest.raises(ValueError, match="other.jsonl: no measurements as"):
        record.read([tmp_path / "other.jsonl"])
    with pytest.raises(ValueError, match="is not there"):
        record.read([tmp_path / "gone.jsonl"])
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit):
        report.main()
    assert f"no measurements in {tmp_path}: make some by `python -m bench`" in capsys.readouterr().err
    record.write(tmp_path / "own.jsonl", [fake("prefkern", [1.0])])
    assert record.measurements() == [tmp_path / "own.jsonl"]
    report.main()
    assert "prefkern" in capsys.readouterr().out


def test_committed_results_can_be_read():
    others = {path.name for path in record.RESULTS.glob("*.jsonl")} - {path.name for path in record.measurements()}
    assert others == {"aot.jsonl"}
    record.read(record.measurements())


def test_what_failed_while_it_was_timed_is_left_out():
    case = {"case": ["head", list(TINY), "bf16", "frozen", "trl"], "measured": {"contract": "met"}}
    ours = {"case": ["head", list(TINY), "bf16", "frozen", "prefkern"], "measured": {"contract": "met"}}
    rounds = [{"extra_info": info, "stats": {"median": 1.0}} for info in (case, ours, ours)]
    gone = {**record.case_record("head", TINY, "bf16", "frozen", "trl"), "left_out": "failed: RuntimeError: later"}
    found = record.from_benchmark({"benchmarks": rounds}, json.loads(json.dumps([gone])))
    assert [(r["provider"], r.get("p50_s"), r.get("left_out")) for r in found] == [
        ("prefkern", 1.0, None), ("trl", None, "failed: RuntimeError: later")
    ]  # fmt: skip
    assert len(record.from_benchmark({"benchmarks": rounds})) == 2


def test_a_peer_that_fails_while_it_is_timed_stops_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_suites, "_failed", set())

    def fail(*_, **__):
        raise RuntimeError("no more\nof it")

    benchmark = types.SimpleNamespace(extra_info={}, pedantic=fail)
    config = types.SimpleNamespace(option=options(left_out=tmp_path / "left_out.jsonl"))
    found = fresh.Outcome(0.0, 0.0, 0.0, {}), "met"
    peer, ours = (fresh.Case("head", name, "fp32", "forward", TINY) for name in ("cross_entropy", "prefkern"))
    for round_, why in enumerate(["failed: RuntimeError: no more", "failed in an earlier round"]):
        with pytest.raises(pytest.skip.Exception, match=why):
            bench_suites.bench_time(peer, round_, lambda case: found, benchmark, config)
    assert [r["left_out"] for r in record.lines(tmp_path / "left_out.jsonl")] == ["failed: RuntimeError: no more"]
    with pytest.raises(RuntimeError, match="no more"):
        bench_suites.bench_time(ours, 0, lambda case: found, benchmark, config)


def test_memory_beyond_results_is_not_below_zero():
    assert record.beyond_results({"peak_extra_mib": 5.0, "outputs_mib": 2.0}) == 3.0
    assert record.beyond_results({"peak_extra_mib": 0.0, "outputs_mib": 2.0}) == 0.0, "gradients over the logits"
    assert record.beyond_results({"peak_extra_mib": 5.0}) == 5.0 and record.beyond_results({}) is None


def everything():
    """Records of every suite, as a run makes them."""
    records = []
    for name in ("head", "dpo"):
        for kind in SUITES[name].flops:
            for provider, seconds in (("matmul", 1.0), (BASELINE, 9.0), ("trl", 7.0), ("prefkern", 2.5)):
                records.append(fake(provider, [seconds], kind, name))
    for shape in shapes.scaling_shapes():
        for provider in ("matmul", "cross_entropy", "prefkern"):
            records.append(fake(provider, [shape.ndv / 1e9], "frozen", "scaling", shape))
    records.append(fake("prefkern", [1.0], "step", "trainer", tokens_per_s=123.4, loss_difference=2e-6,
                        error=None, contract=None))  # fmt: skip
    gone = record.case_record("head", TINY, "bf16", "frozen", "liger")
    records = record.compare(records)
    return [*records, {**records[0], **gone, "left_out": "liger_kernel is not installed"} | {"p50_s": None}]


def without_time(records):
    return [{k: v for k, v in r.items() if not (k == "p50_s" and v is None)} for r in records]


def test_report_as_text_and_markdown(tmp_path):
    records = without_time(everything())
    lines = report.text(records).splitlines()
    assert any(line.startswith("left out: liger (liger_kernel is not installed)") for line in lines)
    title = next(i for i, line in enumerate(lines) if line.startswith("From hidden states to a DPO loss"))
    assert lines[title].endswith("N 48, D 16, V 700; a machine, 2 threads; torch 2")
    found = next(line.split() for line in lines[title:] if "frozen   prefkern" in line)
    assert found == ["bf16", "frozen", "prefkern", "2,500", "2,500-2,500", "0.28", "0.80", "7", "1.0e-03", "met"]
    many = [line for line in lines if line.startswith("N 8192, D 1024, V 128256") and " prefkern " in line]
    assert len(many) == 1, "a table of several shapes says which"
    trainer = next(i for i, line in enumerate(lines) if line.startswith("A whole training step"))
    columns = ["dtype", "pass", "provider", "p50", "ms", "p20-p80", "ms", "MiB", "tokens/s", "loss", "off", "TRL's"]
    assert lines[trainer + 2].split() == columns and lines[trainer + 4].split()[-2:] == ["123", "2.0e-06"]
    rows = report.summaries(records)
    assert ("dpo", "N 48, D 16, V 700", "bf16", "frozen", "trl", "2,500", "7,000", "0.36", "0.80", "7", "7") in rows
    assert all(row[0] != "scaling" for row in rows)
    table = [line for line in report.markdown(records).splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in table)


def test_models_are_rows_of_one_table_and_what_did_not_run_is_told():
    small, large = (shapes.MODELS["qwen3-0.6b"]._replace(model="qwen3-0.6b", n=n) for n in (512, 131_072))
    timed = record.compare([fake(p, [s], suite="models", shape=small) for p, s in (("torch", 1.0), ("prefkern", 2.0))])
    origin = {key: timed[0][key] for key in ("device", "threads", "versions", "date")}
    gone = [
        {**origin, **record.case_record("models", shape, "bf16", "frozen", provider), "left_out": why}
        for shape, provider, why in (
            (large, "torch", "needs 99 GiB"), (large, "prefkern", "would take 99 s"), (small, "cce", "does not run"),
            (large, "cce", "does not run"), (large, "", "cut: out of time"),
        )
    ]  # fmt: skip
    words = report.text([*timed, *gone])
    assert "qwen3-0.6b, N 512  bf16   frozen  prefkern" in words
    for line in (
        "left out: torch (needs 99 GiB), at qwen3-0.6b, N 131072 bf16 frozen",
        "left out: prefkern (would take 99 s), at qwen3-0.6b, N 131072 bf16 frozen",
        "left out: cce (does not run)",
        "left out: all others (cut: out of time), at qwen3-0.6b, N 131072 bf16 frozen",
    ):
        assert line in words.splitlines(), line
    [row] = report.summaries([*timed, *gone])
    assert row[:2] == ("models", "qwen3-0.6b, N 512") and "2.00" in row, "a loss is told like a gain"
    nothing = report.text(gone)
    assert "Heads of real models" in nothing and "would take 99 s" in nothing, "also where nothing ran"


def test_readme_gets_the_summary_and_the_tables_of_one_shape(tmp_path):
    records = without_time(everything())
    short = report.markdown(records, report.IN_README)
    assert report.markdown(records).count("**") > short.count("**") and "**Against N" not in short
    assert "**Ours against the fastest peer**: a machine, 2 threads" in short

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_readme(readme, records)
    assert readme.read_text() == f"before\n{report.BEGIN}\n{short}\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        report.write_readme(readme, records)


def test_pictures_are_drawn(tmp_path):
    logits = [
        fake(provider, [1e-3], kind, "logits", Shape(n, 1, v), of_roof=0.5)
        for provider in ("torch", "prefkern")
        for kind in ("forward", "backward")
        for n in (64, 1024)
        for v in (32_768, 262_144)
    ]
    other = [fake("prefkern", [1.0], shape=TINY._replace(n=24), of_roof=0.5)]
    drawn = plots.draw(without_time(everything()) + other + logits, tmp_path)
    assert [path.name for path in drawn] == [
        "a-machine-scaling-bf16.png", "a-machine-roof-n48-d16-v700.png", "a-machine-roof-n24-d16-v700.png",
        "a-machine-logits.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert plots.draw([], tmp_path) == []


def test_no_figure_after_a_red_gate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_main, "gate", lambda: 1)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "out.jsonl")])
    assert bench_main.main() == 1
    assert "no figures" in capsys.readouterr().out and not (tmp_path / "out.jsonl").exists()


def test_no_figure_where_a_case_of_ours_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_main, "suites", lambda folder, options: None)
    monkeypatch.setattr("sys.argv", ["bench", "--no-gate", "--suite", "head", "--out", str(tmp_path / "out.jsonl")])
    assert bench_main.main() == 1
    assert "no figures" in capsys.readouterr().out and not (tmp_path / "out.jsonl").exists()


def test_the_command_measures_and_reports(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.argv", [
        "bench", "--no-gate", "--suite", "head,tail", "--shape", "48,16,700", "--providers", "torch,prefkern,linear_ce",
        "--dtype", "bf16,fp32", "--rounds", "2", "--out", str(out),
    ])  # fmt: skip
    assert bench_main.main() == 0
    assert "From hidden states to token log-probabilities: N 48, D 16, V 700" in capsys.readouterr().out
    found = {(r["suite"], r["dtype"], r["pass"], r["provider"]): r for r in record.lines(out)}
    ours, roof = found["head", "bf16", "forward", "prefkern"], found["head", "bf16", "forward", "matmul"]
    assert ours["rounds"] == len(ours["times_s"]) == 2 and ours["contract"] == "met"
    assert ours["flops"] == roof["flops"] == 2 * TINY.ndv and ours["roof"] == "matmul"
    assert ours["bytes"] == (48 * 16 + 700 * 16) * 2 + 48 * 16
    assert torch.__version__.startswith(ours["versions"]["torch"].split("+")[0])
    assert ours["device"] and ours["peak_extra_mib"] >= 0 and "uncommitted_changes" in ours
    assert ours["commit"] is not None or not (gpu.ROOT / ".git").exists()
    assert ("tail", "fp32", "backward", "torch") in found
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert found["head", "bf16", "forward", "linear_ce"]["contract"].startswith("not met")


@pytest.mark.skipif(shapes.DEVICE.type != "cpu", reason="on a GPU it can be timed")
def test_the_command_tells_where_nothing_could_be_timed(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    asked = ["bench", "--no-gate", "--suite", "tail", "--providers", "prefkern_eager", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*asked, "--out", str(out)])
    assert bench_main.main() == 1
    assert "nothing was timed\n  left out: prefkern_eager (does not run on cpu)" in capsys.readouterr().out
    assert [r["left_out"] for r in record.lines(out)] == ["does not run on cpu"] * 2


def test_trainers_that_disagree_take_no_other_figures_with_them(monkeypatch, tmp_path, capsys):
    def disagree():
        raise AssertionError("step 1: our loss is 1, TRL's 2")

    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(bench_main, "suites", lambda folder, options: [fake("prefkern", [1.0])])
    monkeypatch.setattr(trainer_step, "compare_trainers", disagree)
    monkeypatch.setattr("sys.argv", ["bench", "--no-gate", "--suite", "head,trainer", "--out", str(out)])
    assert bench_main.main() == 1
    assert "no figures of the trainers: step 1: our loss is 1, TRL's 2" in capsys.readouterr().out
    assert [r["provider"] for r in record.lines(out)] == ["prefkern"]


def steps(losses) -> trainer_step.Steps:
    return trainer_step.Steps(losses, [9.0, 1.0, 2.0], [10, 20, 40], 5.0)


def test_trainers_are_compared_where_their_losses_agree():
    theirs, ours = trainer_step.records({"trl": [steps([1.0] * 3)], "prefkern": [steps([1.00005] * 3)]}, TINY)
    assert theirs["tokens_per_s"] == 20 and theirs["ratio"] == 1.0 and ours["rounds"] == 2
    assert ours["loss_difference"] == pytest.approx(5e-5) and theirs["loss_difference"] == 0
    with pytest.raises(AssertionError, match="step 2: our loss is 1.1, TRL's 1.0"):
        trainer_step.records({"trl": [steps([1.0] * 3)], "prefkern": [steps([1.0, 1.0, 1.1])]}, TINY)


def test_times_of_steps_do_not_overlap(monkeypatch):
    """Whole loops collate a batch ahead; the steps' times still add up to the loop's."""
    clock = iter(range(100))
    monkeypatch.setattr(trainer_step.time, "perf_counter", lambda: float(next(clock)))
    callbacks, seen = [], {"losses": [], "seconds": [], "tokens": []}
    trainer = types.SimpleNamespace(
        training_step=lambda batch: torch.tensor(float(len(batch))), data_collator=list, add_callback=callbacks.append
    )
    trainer_step.watch(trainer, seen)
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    [callback] = callbacks
    callback.on_train_begin()
    batches = [trainer.data_collator([row])]
    for _ in range(2):
        batches.append(trainer.data_collator([row, row]))
        trainer.training_step(batches.pop(0))
        callback.on_step_end()
    assert seen == {"losses": [1.0, 2.0], "seconds": [1.0, 1.0], "tokens": [7, 14, 14]}


@pytest.mark.slow
def test_a_step_of_ours_and_of_trl_have_the_same_loss():
    pytest.importorskip("trl")
    size = trainer_step.Size(vocab=2000, hidden=32, layers=2, pairs=2, steps=3, longest=16)
    theirs, ours = trainer_step.compare_trainers(size, rounds=1)
    assert (theirs["provider"], ours["provider"]) == ("trl", "prefkern")
    assert len(ours["losses"]) == 3 and abs(ours["losses"][0] - 0.6931) > 1e-3, "policy and reference differ"
    assert ours["tokens_per_s"] > 0 and ours["peak_extra_mib"] > 0


class Broken(torch.nn.Module):
    """A provider that fails, at once or when it is timed."""

    def __init__(self, runs: int, factor: float = 1.0):
        super().__init__()
        self.runs, self.factor = runs, factor

    def forward(self, logits, labels):
        self.runs -= 1
        if self.runs < 0:
            raise RuntimeError("no more\nof it")
        return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0] * self.factor


@pytest.fixture
def meter(monkeypatch):
    """Of the logits suite, with providers that fail or are wrong."""
    suite = SUITES["logits"]
    own = {"fails": Broken(0), "fails_later": Broken(3), "lies": Broken(99, 1.5)}
    named = {name: Provider(name, run) for name, run in own.items()}
    monkeypatch.setattr(suite, "providers", {**suite.providers, **named})
    monkeypatch.setattr(suite, "copied_bytes", 4096)
    return Meter(suite, rounds=3)


def test_a_peer_that_fails_or_is_wrong_stops_nobody_else(meter):
    names = ["torch", "fails", "fails_later", "lies", "prefkern"]
    found = {r["provider"]: r for r in meter.group(Shape(8, 1, 300), "forward", names)}
    assert found["fails"]["left_out"] == found["fails_later"]["left_out"] == "failed: RuntimeError: no more"
    assert found["lies"]["left_out"].startswith("wrong: logps is off by 5.00e-01")
    assert not {"p50_s"} & (found["fails_later"].keys() | found["lies"].keys())
    for name in ("torch", "prefkern"):
        assert found[name]["rounds"] == 3 and found[name]["contract"] == "met"
        assert found[name]["of_roof"] == pytest.approx(
            found[name]["bytes"] / found[name]["p50_s"] / (2 * 4096 / found["copy"]["p50_s"])
        )
    assert found["prefkern"]["bytes"] == 8 * 300 * (4 if meter.dtype == "fp32" else 2) + 16 * 8


def test_meter_leaves_out_what_does_not_fit(meter, monkeypatch):
    monkeypatch.setattr(shapes, "free_bytes", lambda: 1 << 20)
    records = meter.group(Shape(1 << 20, 1, 1 << 20), "forward", ["torch"])
    assert all(r["left_out"].startswith("needs about") for r in records)


def test_no_time_means_cut_and_said(tmp_path, capsys):
    out, block = tmp_path / "out.jsonl", gpu.Block("logits", ("forward", "backward"), large=((8, 1, 300),))
    assert gpu.run_block(block, deadline=0.0, out=out, dry_run=False, date="today") == 0
    assert {r["date"] for r in record.lines(out)} == {"today"}
    assert [r["left_out"] for r in record.lines(out)] == ["cut: out of time"] * 2
    assert "cut: D1-V300-N8 backward" in capsys.readouterr().out


def test_blocks_start_with_what_matters_most():
    first = [(shape.n, shape.d, shape.v, kind) for shape, kind in gpu.groups(gpu.BLOCKS[0], dry_run=False)]
    assert first[:2] == [(8192, 4096, 128_256, "frozen"), (8192, 4096, 128_256, "trained")]
    for block in gpu.BLOCKS:
        suite = SUITES[block.suite]
        assert set(block.passes) <= set(suite.flops)
        assert set(gpu.names(block, suite)) <= set(suite.providers)
        assert list(gpu.groups(block, dry_run=True)) and list(gpu.groups(block, dry_run=False))
    sizes = {(shape.n, shape.v) for shape, _ in gpu.groups(gpu.BLOCKS[1], dry_run=False)}
    assert {(64, 32_768), (8192, 32_768), (64, 262_144), (8192, 262_144)} <= sizes


def test_tests_for_a_gpu_need_no_package_that_is_missing(monkeypatch):
    everywhere = [path.stem for path in gpu.kernel_tests()]
    assert everywhere[: len(gpu.FIRST)] == list(gpu.FIRST)
    assert "test_packaging" not in everywhere
    find = importlib.util.find_spec
    absent = {"datasets", "trl", "peft", "yaml", "tokenizers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    assert gpu.missing_imports(gpu.TESTS / "test_trl.py") >= {"datasets", "trl", "yaml"}
    selected = [path.stem for path in gpu.kernel_tests()]
    assert set(selected) >= set(gpu.FIRST) and "test_trl" not in selected


@pytest.mark.slow
def test_the_gpu_command_runs_dry(tmp_path):
    """Every block at toy sizes; where there is no GPU, kernels in the interpreter."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--minutes", "15", "--out", str(out)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {(r["suite"], r["pass"], r["provider"]): r for r in record.read([out])}
    ours = [r for r in found.values() if r["ours"] and "left_out" not in r]
    assert {r["suite"] for r in ours} == {block.suite for block in gpu.BLOCKS}
    assert all(r["contract"] == "met" and r["p50_s"] > 0 for r in ours)
    for case in (
        ("dpo", "trained", "prefkern_cut"),
        ("head", "forward", "prefkern_cut"),
        ("logits", "backward", "prefkern"),
    ):
        assert "p50_s" in found[case], case
    assert "cut" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", SUITES)
def test_a_quick_look_at_any_suite(name, monkeypatch, capsys):
    asked = ["--suite", name, "--shape", "16,8,60", "--dtype", "fp32", "--rounds", "1", "--providers", "torch,prefkern"]
    monkeypatch.setattr("sys.argv", ["once", *asked])
    once.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    suite = SUITES[name]
    timed = {(kind, provider) for kind, provider, _, unit, *_ in lines if unit == "ms"}
    assert timed >= {(kind, p) for kind in suite.passes([]) for p in (*suite.roofs, "torch", "prefkern")}
    assert all(("roof" in line) == bool(suite.roofs) for line in lines if line[1] == "prefkern")


def test_dtypes_of_the_suites_are_known():
    assert all(set(suite.usual_dtypes) <= set(suite.dtypes) <= set(DTYPES) for suite in SUITES.values())
