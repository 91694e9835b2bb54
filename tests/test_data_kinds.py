"""Lists, single responses with labels, pairs with probabilities, token weights: from rows to packed batches."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import tiny
from prefkern import losses
from prefkern.training.collator import PackedCollator
from prefkern.training.columns import Needs
from prefkern.training.config import DataConfig, HeadConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import DataError
from prefkern.training.model import pack_forward
from prefkern.training.reference import add_reference_logps, logps_tail
from prefkern.training.trainer import PreferenceTrainer

EOS = 1
TOK = tiny.tokenizer()
LISTS = Needs("list", target_kind="score")
LABELS = Needs("single", target_kind="label")
SOFT = Needs("pair", target_kind="preference")
WEIGHTED = Needs("pair", token_weights=True)


def ids(text: str) -> list[int]:
    return TOK(text, add_special_tokens=False)["input_ids"]


def prepare(rows: list[dict], needs: Needs, **options) -> datasets.Dataset:
    return prepare_dataset(datasets.Dataset.from_list(rows), TOK, DataConfig(train="x", **options), needs)


def close(found: list[float] | torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float32), torch.tensor(expected))


def test_lists_of_several_sizes():
    rows = tiny.lists(5)
    made = prepare(rows, LISTS)
    assert made.column_names == ["prompt_ids", "completions_ids", "targets", "length", "cut_tokens"]
    assert [len(r["completions"]) for r in rows] == [2, 3, 4, 2, 3]
    for row, got in zip(rows, made):
        assert got["completions_ids"] == [[*ids(text), EOS] for text in row["completions"]]
        close(got["targets"], row["scores"])
        assert got["length"] == sum(len(got["prompt_ids"]) + len(r) - 1 for r in got["completions_ids"])


def test_a_batch_of_lists():
    rows = tiny.lists(5)
    batch = PackedCollator("list")(list(prepare(rows, LISTS)))
    assert batch["layout"].group_sizes == (2, 3, 4, 2, 3)
    assert batch["targets"].shape == (14,) and batch["targets"].dtype == torch.float32
    close(batch["targets"], [score for row in rows for score in row["scores"]])
    responses = [[*ids(text), EOS] for row in rows for text in row["completions"]]
    assert batch["labels"].tolist() == [token for response in responses for token in response]
    assert batch["layout"].lengths == tuple(map(len, responses))
    assert not batch.keys() & {"ref_logps", "token_weights", "mismatched"}


def test_lists_of_conversations():
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no", "ab")],
        "scores": [1, 0, -2],
    }
    [made] = prepare([row], LISTS)
    assert made["prompt_ids"] == [*ids("<|user|>q"), EOS, *ids("\n<|assistant|>")]
    assert made["completions_ids"] == [[*ids(text), EOS] for text in ("yes", "no", "ab")]
    assert made["targets"] == [1.0, 0.0, -2.0]


@pytest.mark.parametrize("yes, no", [(True, False), (1, 0), (1.0, 0.0)], ids=["bool", "int", "float"])
def test_labels(yes, no):
    rows = [{**row, "label": yes if row["label"] else no} for row in tiny.unpaired(4)]
    made = prepare(rows, LABELS)
    assert list(made["targets"]) == [[1.0], [0.0], [1.0], [0.0]]
    batch = PackedCollator("single")(list(made))
    assert batch["targets"].tolist() == [1, 0, 1, 0] and batch["layout"].group_sizes == (1, 1, 1, 1)


def test_preferences_are_given_to_both_responses():
    batch = PackedCollator("pair")(list(prepare(tiny.soft(5), SOFT)))
    assert batch["targets"].tolist() == [0, 1, 0.25, 0.75, 0.5, 0.5, 0.75, 0.25, 1, 0]


@pytest.mark.parametrize("arity, column, values, expected", [
    ("pair", ("chosen_score", "rejected_score"), (3, -0.5), [3.0, -0.5]),
    ("single", ("score",), (-7,), [-7.0]),
], ids=["pair", "single"])  # fmt: skip
def test_scores_of_pairs_and_of_single_responses(arity, column, values, expected):
    row = {"pair": tiny.pairs, "single": tiny.completions}[arity](1)[0]
    [made] = prepare([row | dict(zip(column, values))], Needs(arity, target_kind="score"))
    assert made["targets"] == expected


def test_token_weights_run_along_the_labels():
    rows = tiny.weighted([{"prompt": "q", "chosen": "ab", "rejected": "xyz"}, *tiny.pairs(2)])
    made = prepare(rows, WEIGHTED)
    assert made[0]["chosen_token_weights"] == [0.25, 0.5], "ab is one token"
    assert made[0]["rejected_token_weights"] == [0.25, 0.5, 0.75, 0.25]
    batch = PackedCollator("pair")(list(made))
    assert batch["token_weights"].dtype == torch.float32 and batch["token_weights"].shape == batch["labels"].shape
    expected = [w for row in rows for r in ("chosen", "rejected") for w in row[f"{r}_token_weights"]]
    close(batch["token_weights"], expected)


def test_a_missing_column_of_a_pairs_weights_is_ones():
    rows = tiny.weighted(tiny.pairs(2))
    for row in rows:
        del row["chosen_token_weights"]
    made = prepare(rows, WEIGHTED)
    assert list(made["chosen_token_weights"]) == [[1.0] * len(c) for c in made["chosen_ids"]]
    assert list(made["rejected_token_weights"]) == [row["rejected_token_weights"] for row in rows]


@pytest.mark.parametrize("arity", ["single", "list"])
def test_token_weights_of_other_arities(arity):
    rows = tiny.weighted({"single": tiny.completions, "list": tiny.lists}[arity](4))
    batch = PackedCollator(arity)(list(prepare(rows, Needs(arity, token_weights=True))))
    cells = [row.get("completions_token_weights") or [row["completion_token_weights"]] for row in rows]
    close(batch["token_weights"], [w for cell in cells for response in cell for w in response])


def test_truncation_cuts_weights_and_lists_alike():
    [pair] = prepare(
        tiny.weighted([{"prompt": "12345", "chosen": "xyzxyz", "rejected": "a"}]), WEIGHTED, max_response_length=3
    )
    assert pair["chosen_ids"] == ids("xyz") and pair["chosen_token_weights"] == [0.25, 0.5, 0.75]
    assert pair["rejected_ids"] == [*ids("a"), EOS] and pair["rejected_token_weights"] == [0.25, 0.5]
    rows = tiny.weighted([{"prompt": "123", "completions": ["x", "wxyz", "xyz"], "scores": [1, 2, 3]}])
    [made] = prepare(rows, Needs("list", target_kind="score", token_weights=True), max_length=4 + 2)
    assert made["completions_ids"] == [[*ids("x"), EOS], ids("wx"), ids("xy")]
    assert made["completions_token_weights"] == [[0.25, 0.5]] * 3
    assert made["targets"] == [1.0, 2.0, 3.0] and made["cut_tokens"] == 3 + 2


def test_mismatched_prompts_and_responses():
    """Every prompt with the response of the row before it, packed as any other batch."""
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 1], "targets": [1.0]},
        {"prompt_ids": [4], "completion_ids": [3], "targets": [0.0]},
        {"prompt_ids": [9, 9, 9], "completion_ids": [2, 1], "targets": [1.0]},
    ]
    batch = PackedCollator("single", mismatched=True)(rows)
    plain = PackedCollator("single")(rows)
    other = batch.pop("mismatched")
    assert batch["labels"].tolist() == plain["labels"].tolist() and batch.keys() == plain.keys()
    crossed = [row | {"completion_ids": before["completion_ids"]} for row, before in zip(rows, [rows[2], *rows[:2]])]
    expected = PackedCollator("single")([{k: v for k, v in row.items() if k != "targets"} for row in crossed])
    assert other.keys() == expected.keys() == {
        "input_ids", "position_ids", "response_rows", "labels", "layout", "sequence_lengths"
    }  # fmt: skip
    for key in ("input_ids", "position_ids", "response_rows", "labels"):
        assert other[key].tolist() == expected[key].tolist(), key
    assert (other["layout"], other["sequence_lengths"]) == (expected["layout"], expected["sequence_lengths"])
    short = PackedCollator("single", mismatched=True, max_length=4)(rows)["mismatched"]
    assert short["layout"].lengths == (2, 3, 1), "a prompt of three leaves room for one token"


LIST, NAN = {"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 2.0]}, float("nan")
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("needs, good, bad, message", [
    (LISTS, LIST, {"scores": [1.0, NAN]}, "its scores holds nan, which is not a finite number"),
    (LISTS, LIST, {"scores": [1.0, None]}, "its scores holds None, which is not a finite number"),
    (LISTS, LIST, {"scores": [1.0]}, "it has 1 scores for 2 completions: give each completion one"),
    (LISTS, LIST, {"scores": None}, "its scores should be a list of one number a completion, not None"),
    (LISTS, LIST, {"completions": [], "scores": []}, "its list of completions is empty: remove the row or fill it in"),
    (LISTS, LIST, {"completions": ["a", " "]}, "it has an empty response: remove the row or fill it in"),
    (LABELS, {"prompt": "q", "completion": "a", "label": 1}, {"label": 2},
     "its label is 2, but it should be true (desirable) or false (undesirable)"),
    (LABELS, {"prompt": "q", "completion": "a", "label": True}, {"label": None}, "its label is None, but it should be"),
    (SOFT, PAIR | {"preference": 0.5}, {"preference": 1.5}, "its preference is 1.5, but a probability lies in [0, 1]"),
    (SOFT, PAIR | {"preference": 0.5}, {"preference": NAN}, "its preference is nan, but a probability lies in [0, 1]"),
    (WEIGHTED, tiny.weighted([PAIR])[0], {"rejected_token_weights": [1.0, 1.0, 1.0]},
     "but the response has 2 tokens, with its end-of-sequence token and before truncation"),
    (WEIGHTED, tiny.weighted([PAIR])[0], {"chosen_token_weights": [1.0, NAN]}, "hold nan, which is not a finite"),
    (Needs("list", token_weights=True), tiny.weighted([LIST])[0], {"completions_token_weights": [[1.0, 1.0]]},
     "it has 1 completions_token_weights for 2 completions"),
], ids=[
    "NaN score", "no score", "too few scores", "null scores", "no completions", "empty completion", "label 2",
    "no label", "preference 1.5", "NaN preference", "too many weights", "NaN weight", "too few lists of weights",
])  # fmt: skip
def test_errors_name_the_row(needs, good, bad, message):
    with pytest.raises(DataError) as error:
        prepare([good, good, {**good, **bad}], needs)
    assert str(error.value).startswith("row 2 of data.train: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("needs, row, message", [
    (LISTS, {"prompt": "q", "completions": ["a", "b"]}, "no column 'scores' (it has prompt, completions)"),
    (LISTS, {"completions": ["a", "b"], "scores": [1, 2]}, "no column 'prompt' (it has completions, scores)"),
    (LABELS, {"prompt": "q", "completion": "a"}, "no column 'label'"),
    (SOFT, PAIR, "no column 'preference'"),
    (WEIGHTED, PAIR, "no column 'chosen_token_weights' and no column 'rejected_token_weights'"),
], ids=["scores", "prompt", "label", "preference", "weights"])  # fmt: skip
def test_missing_columns(needs, row, message):
    with pytest.raises(DataError) as error:
        prepare([row], needs)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_own_names_of_the_new_columns():
    rows = [{"question": "q", "answers": ["a", "b"], "marks": [2, 1]}]
    [made] = prepare(rows, LISTS, columns={"prompt": "question", "completions": "answers", "scores": "marks"})
    assert made["targets"] == [2.0, 1.0] and len(made["completions_ids"]) == 2


def test_packed_lists_equal_one_by_one():
    model, rows = tiny.llama().double(), list(prepare(tiny.lists(4), LISTS))
    expected = []
    with torch.no_grad():
        for row in rows:
            for response in row["completions_ids"]:
                whole = torch.tensor([row["prompt_ids"] + response])
                logps = model(whole).logits[0].log_softmax(-1)
                start = len(row["prompt_ids"])
                expected += [logps[start + t - 1, token].item() for t, token in enumerate(response)]
        batch = PackedCollator("list")(rows)
        names = ("input_ids", "position_ids", "response_rows", "sequence_lengths")
        packed = pack_forward(model)(**{k: batch[k] for k in names}, tail=logps_tail(batch["labels"], {}))
    torch.testing.assert_close(packed.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_reference_columns_of_lists_are_lists():
    model, rows = pack_forward(tiny.llama()), prepare(tiny.lists(5), LISTS)
    added = add_reference_logps(rows, model, arity="list", head=HeadConfig(), batch_size=2)
    for row in added:
        assert [len(x) for x in row["ref_completions_logps"]] == [len(x) for x in row["completions_ids"]]
    batch = PackedCollator("list")(list(added))
    with torch.no_grad():
        names = ("input_ids", "position_ids", "response_rows", "sequence_lengths")
        want = model(**{k: batch[k] for k in names}, tail=logps_tail(batch["labels"], {}))
    torch.testing.assert_close(batch["ref_logps"], want, rtol=1e-5, atol=1e-5)


def test_mismatched_log_ratios_reach_the_loss(tmp_path):
    """KTO's baseline in the trainer is the mean log-ratio of each prompt with the response of the row before it."""
    policy, reference = tiny.llama().double(), tiny.llama(initializer_range=0.1).double()
    rows = list(prepare(tiny.unpaired(4), LABELS))
    ratios = []
    with torch.no_grad():
        for row, before in zip(rows, [rows[3], *rows[:3]]):
            ids, start = torch.tensor([row["prompt_ids"] + before["completion_ids"]]), len(row["prompt_ids"])
            sums = [m(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]) for m in (policy, reference)]
            ratios.append(sums[0][start - 1 :].sum() - sums[1][start - 1 :].sum())
    kl = torch.stack(ratios).mean().item()
    if kl < 0:
        policy, reference, kl = reference, policy, -kl
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run = PreferenceTrainer(policy, args, loss=losses.KTO(), reference_model=reference)
    _, out = run.compute_loss(run.model, run.data_collator(rows), return_outputs=True)
    assert kl > 0.1 and out.metrics["kl"].item() == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("loss", [{"name": "anchored_listwise", "tau": 0.5}, {"name": "kto", "baseline": "zero"}],
                         ids=lambda loss: loss["name"])  # fmt: skip
def test_precomputed_reference_equals_frozen(tmp_path, loss):
    tiny.write_run(tmp_path)
    history, weights = [], []
    for mode in ("frozen", "precomputed"):
        history.append(tiny.train(tmp_path, loss, tmp_path / mode, f"reference.mode={mode}", "trainer.optim=sgd"))
        weights.append(load_file(tmp_path / mode / "model" / "model.safetensors"))
    for frozen, precomputed in zip(*history, strict=True):
        assert frozen["loss"] == pytest.approx(precomputed["loss"], rel=1e-5)
        assert frozen["grad_norm"] == pytest.approx(precomputed["grad_norm"], rel=1e-5)
    for k in weights[0]:
        torch.testing.assert_close(weights[0][k], weights[1][k], rtol=1e-5, atol=1e-7)


def test_needs_of_the_losses():
    assert Needs.of(losses.AnchoredListwise()) == LISTS
    assert Needs.of(losses.KTO()) == LABELS
    assert Needs.of(losses.AnchoredPairwise()) == SOFT
    assert Needs.of(losses.CriticalTokenDPO()) == WEIGHTED
    assert Needs.of(losses.DPO(), token_weights=True) == WEIGHTED
