"""Rows to tokens: boundaries, special tokens, truncation, sources, and errors that name the row."""

import json

import datasets
import pytest
import torch

import tiny
from prefkern.training.collator import PackedCollator
from prefkern.training.columns import Needs
from prefkern.training.config import DataConfig
from prefkern.training.data import prepare_dataset
from prefkern.training.errors import DataError
from prefkern.training.prompts import common_prompt
from prefkern.training.sources import load_splits

BOS, EOS = 0, 1
TOK = tiny.tokenizer()


def ids(text: str) -> list[int]:
    return TOK(text, add_special_tokens=False)["input_ids"]


def prepare(rows: list[dict], tokenizer=TOK, arity="pair", vocab_size=None, boundaries=False, **options) -> list[dict]:
    made = prepare_dataset(
        datasets.Dataset.from_list(rows),
        tokenizer,
        DataConfig(train="x", **options),
        Needs(arity, boundaries),
        vocab_size=vocab_size,
    )
    return list(made)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_prompt_and_response_are_tokenised_apart():
    assert len(ids("ab")) == 1, "the tokenizer merges across the boundary"
    [row] = prepare([{"prompt": "xa", "chosen": "by", "rejected": "bz"}])
    assert row["prompt_ids"] == [BOS, *ids("x"), *ids("a")]
    assert row["chosen_ids"] == [*ids("b"), *ids("y"), EOS]
    assert row["rejected_ids"] == [*ids("b"), *ids("z"), EOS]


@pytest.mark.parametrize("adds_bos, prompt, expected", [
    (True, "q", [BOS, *ids("q")]),
    (True, "<s>q", [BOS, *ids("q")]),
    (False, "q", ids("q")),
    (False, "", [BOS]),
    (True, "", [BOS]),
], ids=["added", "there already", "not added", "stands for nothing", "stands for nothing, added"])  # fmt: skip
def test_bos_once(adds_bos, prompt, expected):
    [row] = prepare([{"prompt": prompt, "completion": "r"}], tiny.tokenizer(adds_bos=adds_bos), arity="single")
    assert row["prompt_ids"] == expected


@pytest.mark.parametrize("response, append, expected", [
    ("r", True, [*ids("r"), EOS]),
    ("r</s>", True, [*ids("r"), EOS]),
    ("r", False, ids("r")),
], ids=["appended", "there already", "switched off"])  # fmt: skip
def test_eos_of_plain_text(response, append, expected):
    [row] = prepare([{"prompt": "q", "completion": response}], arity="single", append_eos=append)
    assert row["completion_ids"] == expected


def test_conversation_ends_with_the_templates_eos():
    row = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    [made] = prepare([row])
    assert made["prompt_ids"] == [*ids("<|user|>q"), EOS, *ids("\n<|assistant|>")], (
        "the template gives no BOS: neither do we"
    )
    assert made["chosen_ids"] == [*ids("yes"), EOS], "the newline after EOS could never be generated"


def test_conversation_gets_eos_where_the_template_has_none():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    [made] = prepare([row], tiny.tokenizer(chat_template=template))
    assert made["prompt_ids"] == ids("[user]q[assistant]")
    assert made["rejected_ids"] == [*ids("no"), EOS]


def test_what_the_template_puts_before_an_answer_belongs_to_the_response():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}(){% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>!{% endif %}"
    )
    row = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    [made] = prepare([row], tiny.tokenizer(chat_template=template))
    assert made["prompt_ids"] == ids("<user>q<assistant>")
    assert made["chosen_ids"] == [*ids("()yes"), EOS]


def test_implicit_prompt_of_conversations():
    explicit = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    whole = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    beside = {"prompt": "q", **whole}
    expected = prepare([explicit])
    assert prepare([whole]) == expected
    assert prepare([beside]) == expected, "a text beside whole conversations repeats their beginning"


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("Q: 7+7? A: 14", "Q: 7+7? A: 15", "Q: 7+7? A:"),
    ("Q\nA: yes sir", "Q\nA: no", "Q\nA:"),
    ("Q\nyes", "Q\nno", "Q\n"),
    ("ask: yes", "ask: yes sir", "ask:"),
    ("你好吗好", "你好吗不", "你好吗"),
], ids=["inside a number", "after a colon", "after a newline", "one begins the other", "no blanks"])  # fmt: skip
def test_implicit_prompt_ends_at_a_word(chosen, rejected, prompt):
    found, responses = common_prompt([chosen, rejected])
    assert found == prompt
    assert [found + r for r in responses] == [chosen, rejected]


def test_truncation_cuts_the_prompt_left_and_the_response_right():
    row = {"prompt": "12345", "chosen": "abcdef", "rejected": "x"}
    [made] = prepare([row], max_prompt_length=3, max_response_length=4)
    assert made["prompt_ids"] == [BOS, *ids("45")], "BOS stays"
    assert made["chosen_ids"] == ids("abcde"), "ab is one token; EOS lies beyond the cut"
    assert made["rejected_ids"] == [*ids("x"), EOS]
    assert made["length"] == (3 + 4 - 1) + (3 + 2 - 1), "the model does not read a response's last token"
    assert made["cut_tokens"] == 3 + 2, "of the prompt with its BOS, and of ab c d e f EOS"
    [made] = prepare([row], max_prompt_length=3, max_length=5)
    assert (len(made["prompt_ids"]), len(made["chosen_ids"]), len(made["rejected_ids"])) == (3, 2, 2)


def test_a_prompt_cut_to_one_token_keeps_its_last():
    [made] = prepare([{"prompt": "12", "chosen": "a", "rejected": "b"}], max_prompt_length=1)
    assert made["prompt_ids"] == ids("2")


def test_boundaries_in_characters_become_cuts_in_tokens():
    row = {"prompt": "q", "chosen": "ab cd", "rejected": "xyz", "chosen_boundaries": [1, 3], "rejected_boundaries": [3]}
    [made] = prepare([row], boundaries=True)
    assert made["chosen_cuts"] == [1, 2], "ab begins before the first cut"
    assert made["rejected_cuts"] == [3]
    layout = PackedCollator("pair")([made])["layout"]
    assert layout.segment_lengths == ((1, 1, 3), (3, 1, 0))
    [made] = prepare([row], boundaries=True, max_response_length=2)
    assert (made["chosen_cuts"], made["rejected_cuts"]) == ([1, 2], [2])


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (
            [{"prompt": "q", "good": "a", "bad": "b"}],
            {},
            "no column 'chosen' and no column 'rejected' (it has prompt, good, bad)",
        ),
        ([{"prompt": "q", "completion": "a"}], {"arity": "pair"}, "no column 'chosen'"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {"arity": "single"}, "no column 'completion'"),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            {"columns": {"chosen": "choosen"}},
            "did you mean 'chosen'?",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2 + [{"prompt": "q", "chosen": " ", "rejected": "b"}],
            {},
            "row 2 of data.train: it has an empty response: remove the row",
        ),
        (
            [{"prompt": "q" * 20, "chosen": "a", "rejected": "b"}],
            {"max_length": 8},
            "row 0 of data.train: its prompt has 21 tokens, which leaves no room for a response within 8: set data.max",
        ),
        (
            [{"prompt": "q", "chosen": "<x0>", "rejected": "b"}],
            {"tokenizer": tiny.tokenizer(extra=1), "vocab_size": 259},
            "row 0 of data.train: its token '<x0>' has the id 259, outside the model's vocabulary of 259: use",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            {"tokenizer": tiny.tokenizer(eos=None)},
            "no end-of-sequence token, so that responses would never end: name one with model.eos_token",
        ),
        (
            [{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}],
            {"tokenizer": tiny.tokenizer(chat_template=None)},
            "no chat template: set model.tokenizer",
        ),
        ([{"chosen": "same", "rejected": "same"}], {}, "its responses are the same"),
        ([{"chosen": "left", "rejected": "right"}], {}, "share no beginning that could be the prompt"),
        (
            [{"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]}],
            {},
            "share no first message",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_boundaries": [3], "rejected_boundaries": [0]}],
            {"boundaries": True},
            "row 0 of data.train: its boundaries [3] should not decrease and lie within the 1 characters",
        ),
    ],
    ids=[
        "columns",
        "single for pair",
        "pair for single",
        "renamed",
        "empty response",
        "no room",
        "vocabulary",
        "no eos",
        "no template",
        "same",
        "no prompt",
        "no message",
        "boundaries",
    ],
)
def test_errors_name_row_and_mend(rows, options, message):
    with pytest.raises(DataError) as error:
        prepare(rows, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "disk", "disk dict", "folder"])
def test_sources_give_the_same_rows(tmp_path, kind):
    rows = tiny.pairs(6)
    data, target = datasets.Dataset.from_list(rows), tmp_path / kind
    if kind == "jsonl":
        target = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    elif kind == "json":
        target = tmp_path / "d.json"
        target.write_text(json.dumps(rows))
    elif kind == "parquet":
        target = tmp_path / "d.parquet"
        data.to_parquet(target)
    elif kind == "disk":
        data.save_to_disk(target)
    elif kind == "disk dict":
        datasets.DatasetDict(train=data).save_to_disk(target)
    else:
        target.mkdir()
        data.to_parquet(target / "train.parquet")
    train, evaluation = load_splits(DataConfig(train=str(target)))
    assert list(train) == rows
    assert evaluation is None


@pytest.mark.parametrize("change, message", [
    ({"train": "missing.jsonl"}, "there is no file or folder 'missing.jsonl': check the path"),
    ({"train": "{}/empty.jsonl"}, "is an empty file: a dataset needs at least one row"),
    ({"train": "{}/none.json"}, "none.json' has no rows"),
    ({"train": "{}/rows.csv"}, "is not a .json, .jsonl or .parquet file: convert it"),
    ({"train": "{}/broken.jsonl"}, "cannot be read"),
    ({"train": "{}/disk", "split": "tran"}, "has no split 'tran': did you mean 'train'?"),
    ({"train": "{}/disk", "eval_size": 6}, "data.eval_size=6 would hold out 6 of 6 rows"),
], ids=["missing", "empty", "no rows", "csv", "broken", "split", "eval_size"])  # fmt: skip
def test_sources_errors(tmp_path, change, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    datasets.DatasetDict(train=datasets.Dataset.from_list(tiny.pairs(6))).save_to_disk(tmp_path / "disk")
    change = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(DataError) as error:
        load_splits(DataConfig(**change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenising_is_cached(tmp_path):
    source = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.pairs(6))
    config = DataConfig(train=str(source))

    def cache(**options) -> str:
        rows, _ = load_splits(config)
        return prepare_dataset(rows, tiny.tokenizer(), config, **options).cache_files[0]["filename"]

    assert cache() == cache()
    assert cache() != cache(context_length=20)


def test_collator_packs_in_prefkerns_order():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9]},
        {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2, 1]},
    ]
    batch = PackedCollator("pair")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 4, 4, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0, 1]]
    assert batch["sequence_lengths"] == [4, 2, 1, 2]
    assert batch["labels"].tolist() == [7, 8, 1, 9, 3, 2, 1]
    assert batch["response_rows"].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert batch["layout"].lengths == (3, 1, 1, 2) and batch["layout"].is_pairs
    assert batch["response_rows"].dtype == batch["labels"].dtype == torch.int64


def test_collator_takes_reference_logps_in_the_same_order():
    row = {
        "prompt_ids": [5],
        "chosen_ids": [7, 8],
        "rejected_ids": [9],
        "ref_chosen_logps": [-1.0, -2.0],
        "ref_rejected_logps": [-3.0],
    }
    assert PackedCollator("pair")([row, row])["ref_logps"].tolist() == [-1, -2, -3] * 2
