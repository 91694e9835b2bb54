"""The demo: its problems are what they claim to be, and the whole road runs."""

import json
import re
from argparse import ArgumentParser

import pytest

from prefkern.training import demo, demo_data
from prefkern.training.demo_data import FAMILIES, SLIPS, SPLIT_NUMBERS, draw_examples, mixed_solutions
from prefkern.training.demo_report import Outcome, Share, table, wilson
from prefkern.training.errors import ConfigError

# The checker: it knows the stories by a word of theirs and reads everything else, numbers included, out of the texts.
# A plan line is (left, op, right); "n2" is the third number of the story, "r0" what the first line gave as its result.
PLANS = {
    "pay": [("n0", "*", "n1"), ("r0", "+", "n2")],
    "km": [("n0", "+", "n1"), ("r0", "-", "n2")],
    "friends": [("n1", "*", "n2"), ("n0", "-", "r0"), ("r1", "+", "n3")],
    "faulty": [("n1", "*", "n0"), ("r0", "+", "n2"), ("r1", "-", "n3")],
    "saves": [("n2", "*", "n1"), ("r0", "+", "n0"), ("r1", "-", "n3")],
    "bad": [("n1", "*", "n0"), ("r0", "-", "n2")],
}


def evaluate(text: str) -> int:
    """One side of an equation: a number, or two with an operation between."""
    left, *rest = text.split()
    if not rest:
        return int(left)
    op, right = rest
    return {"*": int(left) * int(right), "+": int(left) + int(right), "-": int(left) - int(right)}[op]


def inconsistent_lines(question: str, solution: str) -> list[int]:
    """Lines of a worked solution that do not follow from the story and the lines above, or contain a false equation."""
    [plan] = [steps for word, steps in PLANS.items() if re.search(rf"\b{word}\b", question)]
    known = {f"n{i}": int(n) for i, n in enumerate(re.findall(r"\d+", question))}
    *lines, last = solution.split("\n")
    assert len(lines) == len(plan)
    wrong = []
    for i, (line, (left, op, right)) in enumerate(zip(lines, plan)):
        sides = line.split(": ")[1].split(" = ")
        known[f"r{i}"] = int(sides[-1])
        planned = f"{known[left]} {op} {known[right]}"
        if sides[0] != planned or len({evaluate(side) for side in sides}) > 1:
            wrong.append(i)
    if last != f"answer: {known[f'r{len(plan) - 1}']}":
        wrong.append(len(plan))
    return wrong


def right_answer(question: str) -> int:
    """The answer worked out of the story alone."""
    [plan] = [steps for word, steps in PLANS.items() if re.search(rf"\b{word}\b", question)]
    known = {f"n{i}": int(n) for i, n in enumerate(re.findall(r"\d+", question))}
    for i, (left, op, right) in enumerate(plan):
        known[f"r{i}"] = evaluate(f"{known[left]} {op} {known[right]}")
    return known[f"r{len(plan) - 1}"]


@pytest.fixture(scope="module")
def drawn():
    return {split: draw_examples(600, split, seed=3, pitfall_share=0.6) for split in SPLIT_NUMBERS}


def test_right_solutions_are_right(drawn):
    for example in (e for examples in drawn.values() for e in examples):
        assert inconsistent_lines(example.prompt, example.chosen) == []
        assert demo_data.read_answer(example.chosen) == right_answer(example.prompt)


def test_slipped_solutions_are_wrong_in_one_line_and_in_the_answer(drawn):
    for example in (e for examples in drawn.values() for e in examples):
        assert inconsistent_lines(example.prompt, example.rejected) == [example.slip[1]]
        assert demo_data.read_answer(example.rejected) != right_answer(example.prompt)


def test_the_checker_notices_a_second_slip():
    question = "Mia buys 4 pens at 7 dollars each and a bag for 35 dollars. What does Mia pay?"
    assert inconsistent_lines(question, "pens: 4 * 7 = 29\nall: 29 + 35 = 50 + 14 = 54\nanswer: 55") == [0, 1, 2]


def test_every_family_and_slip_occurs(drawn):
    assert len(FAMILIES) >= 5
    for examples in drawn.values():
        assert {e.problem.family for e in examples} == set(FAMILIES)
        assert {e.slip[0] for e in examples} == set(SLIPS)


@pytest.mark.parametrize("split", list(SPLIT_NUMBERS))
def test_every_split_gives_its_own_numbers(drawn, split):
    others = {n for other, numbers in SPLIT_NUMBERS.items() if other != split for n in numbers}
    for example in drawn[split]:
        given = {int(n) for n in re.findall(r"\d+", example.prompt)}
        assert any(n > 9 for n in given)
        assert not given & others


def test_the_seed_decides(drawn):
    assert draw_examples(600, "train", 3, 0.6) == drawn["train"]
    assert draw_examples(600, "train", 4, 0.6) != drawn["train"]


def test_questions_are_asked_once():
    taken: set[str] = set()
    first = draw_examples(300, "train", 0, 0.6, taken)
    second = draw_examples(300, "train", 0, 0.6, taken)
    assert len({e.prompt for e in first + second}) == 600


def test_mixed_solutions_slip_as_often_as_asked(drawn):
    rows = mixed_solutions(drawn["train"], 0.7, seed=0)
    slipped = sum(row["completion"] == e.rejected for row, e in zip(rows, drawn["train"], strict=True))
    assert 0.64 < slipped / len(rows) < 0.76  # three standard deviations of 600 draws
    assert all(row["completion"] in (e.chosen, e.rejected) for row, e in zip(rows, drawn["train"]))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407), (81, 263, 0.255260, 0.366160)],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    # 81 of 263 is the example of Newcombe 1998, "Two-sided confidence intervals for the single proportion".
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_nonsense_is_refused(successes, trials):
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, trials)


def test_table_says_which_changes_are_outside_the_intervals():
    def outcome(name, right):
        flags = [i < right for i in range(100)]
        return Outcome(name, ["travel"] * 100, flags, flags, [""] * 100)

    text = table([outcome("start", 40), outcome("dpo", 80), outcome("ipo", 45), outcome("simpo", 10)])
    assert "dpo, exact answer: +40.0 points, better: the intervals do not overlap" in text
    assert "ipo, exact answer: +5.0 points, undecided: the intervals overlap" in text
    assert "simpo, preference accuracy: -30.0 points, worse" in text
    assert str(Share(40, 100)) in text


def options(*words: str):
    parser = ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def test_quick_demo_runs_the_whole_road(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "demo"
    assert demo.main(options("--quick", "--out", str(out))) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["models"]) == ["start", "dpo", "autoregressive_dpo"]
    for model in report["models"].values():
        for measure in ("exact", "preference"):
            assert model[measure]["trials"] == demo.QUICK.test
            assert sum(f["successes"] for f in model[measure]["by_family"].values()) == model[measure]["successes"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "data" / "pairs.jsonl").read_text().splitlines()) == demo.QUICK.pair_steps * demo.QUICK.batch
    printed = capsys.readouterr().out
    for name in ("start", "dpo", "autoregressive_dpo"):
        assert (out / name / "model" / "model.safetensors").exists()
        assert f"prefkern train {out / name / 'config.yaml'} run.output=" in printed
    assert "before (" in printed and "after " in printed and "95 % interval" in printed


def test_both_methods_get_the_same_budget(tmp_path):
    data = {name: tmp_path / f"{name}.jsonl" for name in ("nll", "pairs")}
    dpo, autoregressive = (demo.stage(name, demo.Settings(), tmp_path, data) for name in ("dpo", "autoregressive_dpo"))
    assert dpo["loss"]["beta"] == autoregressive["loss"]["beta"]
    for section in ("model", "data", "reference", "trainer"):
        assert dpo[section] == autoregressive[section]


def test_a_demo_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        demo.main(options("--quick", "--out", str(tmp_path)))


def test_a_folder_of_something_else_is_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no demo"):
        demo.main(options("--quick", "--overwrite", "--out", str(tmp_path)))
    assert (tmp_path / "thesis.tex").exists()
