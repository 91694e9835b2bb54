"""`prefkern score-critical-tokens` against plain logits, its files, what it says to wrong input, and training on it."""

import datasets
import peft
import pytest
import torch

import tiny
from prefkern.losses import CriticalTokenDPO
from prefkern.training.cli import main
from prefkern.training.collator import PackedCollator
from prefkern.training.columns import Needs
from prefkern.training.config import DataConfig
from prefkern.training.data import prepare_dataset

ROWS = tiny.pairs(5)


def tuned(seed):
    """A model whose weights have been moved at random."""
    model = tiny.llama()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def with_adapter(seed):
    torch.manual_seed(seed)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny.llama(), options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    made = {"base": tiny.llama(), "right": tuned(1), "wrong": tuned(2), "lora_right": with_adapter(3),
            "lora_wrong": with_adapter(4), "larger": tiny.llama(vocab=300)}  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    head = peft.LoraConfig(r=2, target_modules=["lm_head"])
    peft.get_peft_model(tiny.llama(), head).save_pretrained(folder / "lora_head")
    tiny.write_jsonl(folder / "rows.jsonl", [row | {"id": i} for i, row in enumerate(ROWS)])
    tiny.write_jsonl(folder / "no_prompt.jsonl", [{k: row[k] for k in ("chosen", "rejected")} for row in ROWS])
    tiny.write_jsonl(folder / "weighted.jsonl", [row | {"chosen_token_weights": [1.0]} for row in ROWS])
    tiny.write_jsonl(
        folder / "own.jsonl", [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in ROWS]
    )
    return folder, made


def score(folder, tmp_path, *words, output="out.jsonl", data="rows.jsonl"):
    assert main(["score-critical-tokens", str(folder / data), "--output", str(tmp_path / output), *words]) == 0
    if not output.endswith(("jsonl", "parquet")):
        return datasets.load_from_disk(str(tmp_path / output))
    kind = "json" if output.endswith("jsonl") else "parquet"
    return datasets.load_dataset(kind, data_files=str(tmp_path / output), split="train")


@torch.no_grad()
def by_hand(positive, negative, response, gamma=1.0, prompt_limit=None, limit=None, rows=None):
    """1 - softmax(...)[y] of every response token, sequence by sequence, from full logits."""
    tok, scores = tiny.tokenizer(), []
    for row in rows or ROWS:
        prompt = [0, *tok(row["prompt"], add_special_tokens=False)["input_ids"]]
        prompt = prompt if prompt_limit is None else [0, *prompt[len(prompt) - prompt_limit + 1 :]]
        answer = [*tok(row[response], add_special_tokens=False)["input_ids"], 1][:limit]
        ids = torch.tensor([prompt + answer])
        z = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() for m in (positive, negative)]
        p = ((1 + gamma) * z[0] - gamma * z[1]).softmax(-1)
        scores.append((1 - p.gather(-1, torch.tensor(answer)[:, None])[:, 0]).tolist())
    return scores


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)


def models(folder):
    return "--positive", str(folder / "right"), "--negative", str(folder / "wrong")


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "sub/out"])
def test_two_models(folder, tmp_path, output, capsys):
    folder, made = folder
    got = score(folder, tmp_path, *models(folder), "--batch-size", "2", output=output)
    want = [s[:-1] + [1.0] for s in by_hand(made["right"], made["wrong"], "rejected")]
    close(got["rejected_token_weights"], want)
    assert all(w == [1.0] * len(w) for w in got["chosen_token_weights"])
    assert [len(w) for w in got["chosen_token_weights"]] == [len(row["chosen"]) + 1 for row in ROWS]
    assert got["id"] == list(range(5)) and got["rejected"] == [row["rejected"] for row in ROWS]
    assert "rows     5" in capsys.readouterr().out


def test_adapters_of_one_model(folder, tmp_path):
    folder, made = folder
    words = ["--model", str(folder / "base"), "--positive", str(folder / "lora_right")]
    words += ["--negative", str(folder / "lora_wrong"), "--gamma", "0.5"]
    got = score(folder, tmp_path, *words)
    want = [s[:-1] + [1.0] for s in by_hand(made["lora_right"], made["lora_wrong"], "rejected", gamma=0.5)]
    close(got["rejected_token_weights"], want)


def test_both_sides_and_own_columns(folder, tmp_path):
    folder, made = folder
    own = [w for pair in ("prompt=q", "chosen=good", "rejected=bad") for w in ("--column", pair)]
    got = score(folder, tmp_path, *models(folder), "--both", *own, data="own.jsonl")
    want = [[1 - x for x in s[:-1]] + [1.0] for s in by_hand(made["right"], made["wrong"], "chosen")]
    close(got["chosen_token_weights"], want)
    assert got.column_names == ["q", "good", "bad", "chosen_token_weights", "rejected_token_weights"]


def test_limits_are_those_of_training_and_what_they_cut_weighs_1(folder, tmp_path):
    folder, made = folder
    limits = {"max_prompt_length": 6, "max_response_length": 3}
    words = [w for name, value in limits.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    got = score(folder, tmp_path, *models(folder), *words, "--limit", "4")["rejected_token_weights"]
    want = by_hand(made["right"], made["wrong"], "rejected", prompt_limit=6, limit=3, rows=ROWS[:4])
    full = prepare_dataset(datasets.Dataset.from_list(ROWS[:4]), tiny.tokenizer(), DataConfig(train=""))
    assert [len(w) for w in got] == [len(ids) for ids in full["rejected_ids"]] and max(map(len, got)) > 3
    close([w[:3] for w in got], want)
    assert all(x == 1.0 for w in got for x in w[3:])


def test_training_reads_what_was_written(folder, tmp_path):
    """Each token that is left after truncation keeps its own weight."""
    folder, _ = folder
    got = score(folder, tmp_path, *models(folder), "--max-response-length", "4")
    data, needs = DataConfig(train="", max_response_length=4), Needs.of(CriticalTokenDPO())
    rows = prepare_dataset(got, tiny.tokenizer(), data, needs)
    batch = PackedCollator("pair")(list(rows))
    want = [w for row in got for side in ("chosen", "rejected") for w in row[f"{side}_token_weights"][:4]]
    assert batch["token_weights"].tolist() == pytest.approx(want) and len(want) == batch["layout"].num_tokens


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--positive", "{}/lora_right"],
            "--positive='{}/lora_right' is an adapter: name the model that it belongs to",
        ),
        (["--negative", "{}/larger"], "--positive has a vocabulary of 259 tokens and --negative of 300"),
        (["--negative", "{}/none"], "--negative='{}/none' cannot be used: the model '{}/none' cannot be loaded"),
        (["--model", "{}/base"], "--positive='{}/right' is no adapter of '{}/base', check both"),
        (
            ["--model", "{}/base", "--positive", "{}/lora_head", "--negative", "{}/lora_head"],
            "--positive and --negative adapt the output head, which cannot be scored: merge them",
        ),
        (["{}/no_prompt.jsonl"], "DATASET has no column 'prompt' (it has chosen, rejected)"),
        (["{}/weighted.jsonl"], "DATASET has a column 'chosen_token_weights' already: remove or rename it"),
        (["{}/nowhere.jsonl"], "there is no file or folder '{}/nowhere.jsonl': check the path"),
        (["--output", "{}/rows.jsonl"], "--output='{}/rows.jsonl' is there already"),
        (["--gamma", "-1"], "--gamma=-1.0 should be at least 0"),
        (["--batch-size", "0"], "--batch-size=0 should be at least 1"),
        (["--device", "abacus"], "--device='abacus' cannot be used here"),
        (["--column", "chosen"], "--column 'chosen' is no pair: write standard=own"),
        (["--max-length", "0"], "data.max_length=0 should be at least 1"),
    ],
    ids=lambda value: " ".join(value).replace("{}/", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_status_2(folder, tmp_path, capfd, words, message):
    folder, _ = folder
    words = [w.format(folder) for w in words]
    data = [] if words[0].endswith("jsonl") else [str(folder / "rows.jsonl")]
    default = [*models(folder), "--output", str(tmp_path / "out.jsonl")]
    assert main(["score-critical-tokens", *data, *default, *words]) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prefkern: ")]
    assert len(told) == 1 and message.replace("{}", str(folder)) in told[0]
    assert not (tmp_path / "out.jsonl").exists()
