"""The command line: what it prints, and one sentence with status 2 for everything that the user can mend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import tiny
from prefkern import __version__, losses, planner
from prefkern.training import run
from prefkern.training.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and data, good and bad, and a configuration that would train."""
    folder = tmp_path_factory.mktemp("cli")
    short = {"max_steps": 1, "save_strategy": "no", "report_to": "none"}
    config = tiny.write_run(folder, rows=tiny.pairs(4), trainer=short)
    (folder / "good.yaml").write_text(yaml.safe_dump(config))
    tiny.write_jsonl(folder / "empty_response.jsonl", [*tiny.pairs(2), {"prompt": "q", "chosen": "", "rejected": "b"}])
    tiny.write_jsonl(folder / "long.jsonl", [*tiny.pairs(1), {"prompt": "q" * 200, "chosen": "a", "rejected": "b"}])
    tiny.write_jsonl(folder / "extra.jsonl", [{"prompt": "q", "chosen": "<x0>", "rejected": "b"}])
    tiny.write_jsonl(
        folder / "chat.jsonl", [{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}]
    )
    tiny.write_jsonl(folder / "completions.jsonl", tiny.completions(4))
    (folder / "nothing.jsonl").touch()
    tiny.tokenizer(eos=None).save_pretrained(folder / "no_eos")
    tiny.tokenizer(extra=2).save_pretrained(folder / "larger")
    return folder


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "{}/none.yaml"], "cannot read the configuration '{}/none.yaml': No such file or directory"),
        (["loss.bta=1"], "unknown key 'loss.bta': did you mean 'beta'?"),
        (["trainer.learning_rat=1"], "unknown key 'trainer.learning_rat': did you mean 'learning_rate'?"),
        (["loss.beta=high"], "loss.beta='high' should be a number, not text"),
        (
            ["model.dtype=3"],
            "model.dtype=3 should be 'float32' or 'bfloat16' or 'float16' or 'auto', not a whole number",
        ),
        (
            ["loss.beta=0"],
            "the loss section is wrong: dpo: beta=0 must be a number in (0, 100] (0.01 to 0.5 in practice)",
        ),
        (["reference.mode=none"], "loss 'dpo' compares with a reference: set reference.mode to frozen or precomputed"),
        (
            ["loss.name=simpo", "reference.mode=frozen"],
            "loss 'simpo' uses no reference: remove reference.mode='frozen'",
        ),
        (["trainer.warmup_steps=-1"], "the trainer section is refused by transformers: "),
        (["data.train={}/nowhere.jsonl"], "there is no file or folder '{}/nowhere.jsonl': check the path"),
        (["data.train={}/nothing.jsonl"], "'{}/nothing.jsonl' is an empty file: a dataset needs at least one row"),
        (
            ["data.train={}/completions.jsonl"],
            "data.train has no column 'chosen' and no column 'rejected' (it has prompt, completion): "
            "rename yours or name it with data.columns.chosen",
        ),
        (
            ["data.train={}/empty_response.jsonl"],
            "row 2 of data.train: it has an empty response: remove the row or fill it in",
        ),
        (["data.train={}/chat.jsonl"], "row 0 of data.train: its cells should all be text or all be lists of"),
        (
            ["data.train={}/long.jsonl"],
            "row 1 of data.train: its prompt has 201 tokens, which leaves no room for a response within 128: "
            "set data.max_prompt_length (prompts are cut from the left) or raise data.max_length",
        ),
        (["data.max_length=200"], "data.max_length=200 is more than the 128 tokens that '{}/model' can read: lower it"),
        (
            ["data.train={}/extra.jsonl", "model.tokenizer={}/larger"],
            "row 0 of data.train: its token '<x0>' has the id 259, outside the "
            "model's vocabulary of 259: use the model's own tokenizer, or a model whose embeddings were resized",
        ),
        (
            ["model.tokenizer={}/no_eos"],
            "the tokenizer has no end-of-sequence token, so that responses would never end: "
            "name one with model.eos_token, or set data.append_eos=false",
        ),
        (["model.eos_token=<end>"], "model.eos_token='<end>' is not a token of '{}/model': choose one that is"),
        (["model.name={}/no_model"], "there is no folder model.name='{}/no_model': check the path"),
        (
            ["model.name={}/no_eos", "model.eos_token=</s>"],
            "no model can be loaded from model.name='{}/no_eos', a folder or a name on the hub; check it: ",
        ),
        (
            ["model.lora={{target_modules: [head]}}"],
            "model.lora is refused by peft: Target modules {{'head'}} not found in the base model",
        ),
        (["model.attn_implementation=flash"], "the model '{}/model' cannot be loaded, check the model section: "),
        (
            ["model.name=small"],
            "no tokenizer can be loaded from model.name='small', a folder or a name on the hub; check it: ",
        ),
        (["run.output={}/good.yaml"], "run.output='{}/good.yaml' is a file: choose another folder"),
        (["run.output={}"], None),
    ],
    ids=lambda value: value[-1].replace("{}/", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_status_2(folder, tmp_path, capfd, words, message):
    words = [w.format(folder) for w in words]
    output = tmp_path / "out"
    if words[0] != "train":
        given = [f"run.output={output}"] if not words[0].startswith("run.output") else []
        words = ["train", str(folder / "good.yaml"), *given, *words]
    if message is None:  # a folder that holds a run
        (folder / "checkpoint-1").mkdir()
        message = "run.output='{}' already holds a run: set run.resume=true to continue it, or choose another folder"
    before = sorted(folder.rglob("*"))
    assert main(words) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prefkern: ")]
    assert len(told) == 1 and message.format(folder) in told[0]
    assert told[0].count("prefkern: ") == 1
    assert not output.exists() and sorted(folder.rglob("*")) == before, "nothing is half-written"


def test_debug_shows_where_an_error_arose(folder, monkeypatch):
    monkeypatch.setenv("PREFKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown key 'loss.bta'"):
        main(["train", str(folder / "good.yaml"), "loss.bta=1"])


def test_train(folder, tmp_path, capsys):
    assert main(["train", str(folder / "good.yaml"), f"run.output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "step 1/1  loss 0.6931" in printed
    assert f"model    {tmp_path / 'out' / 'model'}" in printed
    assert main(["train", str(tmp_path / "out" / "config.yaml"), f"run.output={tmp_path / 'again'}"]) == 0
    saved = [yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("out", "again")]
    assert saved[0] | {"run": None} == saved[1] | {"run": None}, "the saved configuration trains the same again"


def test_train_leaves_no_process_group(folder, tmp_path, monkeypatch):
    """Its threads would abort an interpreter that ends before they do."""

    def in_a_group(config):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        return run.RunResult(tmp_path, {}, [])

    monkeypatch.setattr(run, "run_training", in_a_group)
    assert main(["train", str(folder / "good.yaml")]) == 0
    assert not dist.is_initialized()


def test_train_leaves_the_callers_process_group(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_training", lambda config: run.RunResult(tmp_path, {}, []))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert main(["train", str(folder / "good.yaml")]) == 0
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_losses_prints_every_loss(capsys):
    assert main(["losses"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table[2:]] == list(losses.names())


def test_doctor_names_versions_devices_and_bodies(capsys):
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for word in ("torch", "transformers", "cores", "Triton kernels", "Head, for N 1024 D 4096 V 128256 in bfloat16"):
        assert word in report


GRADIENTS = {
    "no gradient": {"grad_hidden": False, "grad_head": False},
    "head frozen": {"grad_hidden": True, "grad_head": False},
    "all weights trained, any loss": {"grad_hidden": True, "grad_head": True},
    "all weights trained, a loss local to groups of at most 300 rows": {
        "grad_hidden": True, "grad_head": True, "group_rows": 300,
    },
    "head adapted by LoRA of rank 8, any loss": {
        "grad_hidden": True, "grad_head": True, "grad_weight": False, "rank": 8, "grad_low": (True, True),
    },
    "head adapted by LoRA of rank 8, a loss local to groups of at most 300 rows": {
        "grad_hidden": True, "grad_head": True, "grad_weight": False, "rank": 8, "grad_low": (True, True),
        "group_rows": 300,
    },
}  # fmt: skip
ROOMY, TIGHT = 64 << 20, 1 << 20  # bytes of workspace: 512 rows of logits, and 8


@pytest.mark.parametrize("workspace, rows", [
    (ROOMY, ["no_grad", "frozen_head", "recompute", "group_local", "recompute_adapter", "group_local_adapter"]),
    (TIGHT, ["no_grad", "frozen_head", "recompute", "recompute", "recompute_adapter", "recompute_adapter"]),
], ids=["groups fit", "groups do not fit"])  # fmt: skip
def test_doctor_says_what_the_planner_does(capsys, workspace, rows):
    n, d, v = 2048, 64, 32_768
    words = ["--shape", str(n), str(d), str(v), "--dtype", "float32", "--rank", "8", "--group-rows", "300"]
    assert main(["doctor", *words, "--workspace-bytes", str(workspace)]) == 0
    _, report = capsys.readouterr().out.split(f"Head, for N {n} D {d} V {v} in float32 on ")
    device, *lines = report.splitlines()
    starts = [i for i, line in enumerate(lines) if not line.startswith("   ")]
    assert len(starts) == len(GRADIENTS)
    flops = []
    for (case, options), row, i, stop in zip(GRADIENTS.items(), rows, starts, [*starts[1:], len(lines)]):
        chosen = planner.plan(
            (n, d, v), torch.float32, torch.device(device), workspace_bytes=workspace, **options
        )  # fmt: skip
        text = "\n".join(lines[i:stop])
        assert chosen.row.name == row and lines[i].startswith(f"  {case}") and f": {row} (" in lines[i]
        figures = (
            f"why: {chosen.reason}", f"{chosen.row.flops_forward}NDV forward", f"{chosen.row.flops_backward}NDV back",
            f"= {chosen.flops:.3e}", f"bytes: {chosen.bytes:.3e}", f"workspace {workspace / 2**20:.0f} MiB",
        )  # fmt: skip
        for figure in figures:
            assert figure in text, (case, figure)
        flops.append(chosen.row.flops)
    assert flops == ([2, 4, 8, 6, 6, 4] if workspace == ROOMY else [2, 4, 8, 8, 6, 6])


@pytest.mark.parametrize("words, message", [
    (["--shape", "0", "64", "100"], "--shape: N=0 should be at least 1"),
    (["--group-rows", "-1"], "--group-rows=-1 should be at least 1"),
    (["--rank", "0"], "--rank=0 should be at least 1"),
    (["--workspace-bytes", "0"], "--workspace-bytes=0 should be at least 1"),
], ids=lambda x: x[0] if isinstance(x, list) else "")  # fmt: skip
def test_doctor_refuses_numbers_below_1(capsys, words, message):
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err == f"prefkern: {message}\n"


def test_help_and_no_command(capsys):
    assert main([]) == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0


def run_module(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "prefkern", *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}
    )


def test_a_real_process_exits_with_status_2(folder, tmp_path):
    done = run_module("train", str(folder / "good.yaml"), "loss.name=dppo", f"run.output={tmp_path / 'out'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prefkern: unknown loss.name='dppo': did you mean 'dpo'?\n"
    assert not (tmp_path / "out").exists()


def test_version_loads_neither_transformers_nor_datasets():
    code = (
        "import sys; from prefkern.training.cli import main\n"
        "try: main(['--version'])\n"
        "finally: assert not {'transformers', 'datasets', 'peft', 'triton'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"prefkern {__version__}\n", "")
