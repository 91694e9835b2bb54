"""Losses and gradients against TRL's own trainers: the same tiny model, the same batch, fp32.

TRL tokenises the rows, collates them with its padded collator and calls its `compute_loss`; prefkern packs the token
ids that TRL made and runs the same weights through `linear_preference_loss`. Policy and reference differ. Compared
are, relative to TRL's,
    the loss: within 1e-5 of its value;
    the gradient: every entry of every parameter, within 1e-5 of the largest entry of any parameter.

Where TRL's formula is another one than prefkern's default, the case names the option that reproduces TRL:
    sigmoid      TRL ignores `label_smoothing` here, prefkern's `dpo` does not: compared without.
    sft          is `nll` of the chosen responses, or the `nll_weight` of any pair loss.
    bco_pair     this TRL subtracts no running mean of rewards: `bco` with its default shift="none".
    lists        are `combination`. TRL's `use_weighting` weights a list's sft too, prefkern's `wpo` pair losses alone:
                 compared without.
    KTO          apo_zero_unpaired is `kto` with baseline="zero".
    ORPO         TRL's likelihood runs over the prompt too: compared on prompts of one token, which nothing predicts.
    cispo        eps_high is the cap itself in both.
"""

import copy
import importlib
import os
import sys

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# TRL needs Python 3.11. In CI its absence is a failure, not a reason to skip.
NEEDED = os.environ.get("CI") and sys.version_info >= (3, 11)
trl = importlib.import_module("trl") if NEEDED else pytest.importorskip("trl")

import datasets  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

import prefkern as pk  # noqa: E402
import tiny  # noqa: E402
from prefkern.training.collator import PackedCollator  # noqa: E402
from prefkern.training.model import pack_forward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's use of transformers, not of ours

WITHIN = 1e-5
BETA = 0.5
# Lengths differ within pairs, both ways, and between them; the last chosen response is the last rejected one's start.
ROWS = [
    {"prompt": "1 and 1 make ", "chosen": "2", "rejected": "11, or so"},
    {"prompt": "say ab ", "chosen": "abababab ab", "rejected": "a"},
    {"prompt": "7 less 3 is ", "chosen": "4!", "rejected": "5?"},
    {"prompt": "", "chosen": "hello", "rejected": "bye"},
    {"prompt": "count to five: ", "chosen": "1 2 3 4 5", "rejected": "5 4 3 2"},
    {"prompt": "ab", "chosen": "x", "rejected": "xy"},
]

# TRL's options and prefkern's loss, by TRL's name; beta is BETA in both.
LOSSES = {
    "sigmoid": ({}, "dpo", {}),
    "hinge": ({}, "hinge", {}),
    "ipo": ({}, "ipo", {}),
    "exo_pair": ({"label_smoothing": 0.1}, "exo", {"label_smoothing": 0.1}),
    "nca_pair": ({}, "nca", {}),
    "robust": ({"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}),
    "bco_pair": ({}, "bco", {}),
    "sppo_hard": ({}, "sppo", {}),
    "aot": ({}, "aot", {}),
    "aot_unpaired": ({}, "aot_unpaired", {}),
    "apo_zero": ({}, "apo_zero", {}),
    "apo_down": ({}, "apo_down", {}),
    "discopop": ({"discopop_tau": 0.2}, "discopop", {"tau": 0.2}),
    "sigmoid_norm": ({}, "sigmoid_norm", {}),
}
SMOOTHED = {
    "aot": ({"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    "aot_unpaired": ({"label_smoothing": 0.1}, "aot_unpaired", {"label_smoothing": 0.1}),
}
DIVERGENCES = {
    "forward_kl": ({"f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, {"f_divergence": "js"}),
    "alpha_divergence": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence": "alpha", "f_alpha": 0.3},
    ),
}
OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def models(swapped: bool = False) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy, and a reference some way off; or the other way round."""
    first = tiny.llama(initializer_range=0.15)
    second = copy.deepcopy(first)
    torch.manual_seed(1)
    for p in second.parameters():
        p.data += 0.05 * torch.randn_like(p)
    policy, reference = (second, first) if swapped else (first, second)
    return policy, reference.requires_grad_(False)


def tokenizer():
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    return made


@pytest.fixture
def arguments(tmp_path):
    """Options of every TRL configuration."""
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=len(ROWS),
    )  # fmt: skip
    if not silent:
        datasets.enable_progress_bars()


def theirs(trainer, inputs=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, the whole data set unless given, by TRL."""
    loss = trainer.compute_loss(trainer.model, inputs or trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}


def packed(model, batch, tail):
    """`tail(hidden, weight)` of a packed batch."""
    keys = ("input_ids", "position_ids", "response_rows", "sequence_lengths")
    return model(**{key: batch[key] for key in keys}, tail=lambda hidden, weight, bias: tail(hidden, weight))


def log_probabilities(model, batch) -> torch.Tensor:
    return packed(model, batch, lambda hidden, weight: pk.token_logps(hidden, weight, batch["labels"]).logps)


def ours(loss, rows, swapped=False, **given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of TRL's token ids, by prefkern."""
    policy, reference = (pack_forward(model) for model in models(swapped))
    batch = PackedCollator(loss.arity)(rows)
    if loss.needs_reference:
        given["ref_logps"] = log_probabilities(reference, batch).detach()
    if loss.needs_mismatched:
        given["mismatched"] = mismatched(policy, reference, rows)

    def tail(hidden, weight):
        return pk.linear_preference_loss(hidden, weight, batch["labels"], batch["layout"], loss, **given).loss

    value = packed(policy, batch, tail)
    value.backward()
    return value.detach(), {name: p.grad for name, p in policy.named_parameters()}


@torch.no_grad()
def mismatched(policy, reference, rows) -> torch.Tensor:
    """(R,) log-ratio sums of the completions that TRL put to other prompts."""
    batch = PackedCollator("single")([{**row, "completion_ids": row["KL_completion_ids"]} for row in rows])
    ratios = log_probabilities(policy, batch) - log_probabilities(reference, batch)
    return torch.stack([part.sum() for part in ratios.split(batch["layout"].lengths)])


def agree(mine, other) -> None:
    """What the module's docstring says."""
    (loss, grads), (their_loss, their_grads) = mine, other
    assert loss.item() == pytest.approx(their_loss.item(), rel=WITHIN)
    assert grads.keys() == their_grads.keys()
    largest = max(grad.abs().max().item() for grad in their_grads.values())
    assert largest > 1e-3
    for name, grad in their_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=WITHIN * largest, msg=lambda m, n=name: f"{n}: {m}")


# --- Pairs against a reference -------------------------------------------------------------------------------------


def dpo_trainer(arguments, loss_type, options):
    config = trl.DPOConfig(loss_type=loss_type, beta=BETA, **arguments, **options)
    data = datasets.Dataset.from_list(ROWS)
    return trl.DPOTrainer(*models(), config, train_dataset=data, processing_class=tokenizer())


def check_dpo(arguments, loss_type, options, loss) -> None:
    trainer = dpo_trainer(arguments, loss_type, options)
    agree(ours(loss, list(trainer.train_dataset)), theirs(trainer))


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_trainer(arguments, name):
    options, mine, fields = LOSSES[name]
    check_dpo(arguments, [name], options, pk.losses.get(mine, beta=BETA, **fields))


@pytest.mark.parametrize("name", SMOOTHED)
def test_dpo_trainer_label_smoothing(arguments, name):
    options, mine, fields = SMOOTHED[name]
    check_dpo(arguments, [name], options, pk.losses.get(mine, beta=BETA, **fields))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_dpo_trainer_f_divergence(arguments, name, divergence):
    options, mine, fields = LOSSES[name]
    more, own = DIVERGENCES[divergence]
    check_dpo(arguments, [name], options | more, pk.losses.get(mine, beta=BETA, **fields, **own))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_dpo_trainer_length_desensitised(arguments, name, ld_alpha):
    options, mine, fields = LOSSES[name]
    loss = pk.losses.get(mine, beta=BETA, ld_alpha=ld_alpha, **fields)
    check_dpo(arguments, [name], {**options, "ld_alpha": ld_alpha}, loss)


# TRL refuses to weight aot, and cannot differentiate a weighted hinge: it multiplies relu's output in place.
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("aot", "aot_unpaired", "hinge")])
def test_dpo_trainer_weighted_preferences(arguments, name):
    options, mine, fields = LOSSES[name]
    loss = pk.losses.get(mine, beta=BETA, wpo=True, **fields)
    check_dpo(arguments, [name], {**options, "use_weighting": True}, loss)


def test_dpo_trainer_weighted_hinge_has_the_same_value(arguments):
    trainer = dpo_trainer(arguments, ["hinge"], {"use_weighting": True})
    with torch.no_grad():
        value = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss = pk.losses.get("hinge", beta=BETA, wpo=True)
    assert ours(loss, list(trainer.train_dataset))[0].item() == pytest.approx(value.item(), rel=WITHIN)


def test_dpo_trainer_sft(arguments):
    trainer = dpo_trainer(arguments, ["sft"], {})
    rows = [{"prompt_ids": r["prompt_ids"], "completion_ids": r["chosen_ids"]} for r in trainer.train_dataset]
    agree(ours(pk.losses.NLL(), rows), theirs(trainer))


def test_dpo_trainer_with_likelihood_of_the_chosen(arguments):
    loss = pk.losses.DPO(beta=BETA, nll_weight=0.2)
    check_dpo(arguments, ["sigmoid", "sft"], {"loss_weights": [1.0, 0.2]}, loss)


LISTS = {
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
    "squares": (["ipo", "apo_zero", "sppo_hard"], [0.5, 2.0, 0.01]),
    "sorted": (["aot", "sigmoid_norm"], None),
}


@pytest.mark.parametrize("names, weights", LISTS.values(), ids=LISTS)
def test_dpo_trainer_lists(arguments, names, weights):
    parts = [pk.losses.NLL() if name == "sft" else pk.losses.get(LOSSES[name][1], beta=BETA) for name in names]
    loss = pk.losses.get("combination", parts=tuple(zip(weights or [1.0] * len(parts), parts)))
    check_dpo(arguments, names, {"loss_weights": weights}, loss)


# --- Single responses, and pairs without a reference ---------------------------------------------------------------


UNPAIRED = {
    "kto": ("kto", {}, {}),
    "kto-weights": ("kto", {}, {"desirable_weight": 0.7, "undesirable_weight": 1.3}),
    "apo_zero_unpaired": ("apo_zero_unpaired", {"baseline": "zero"}, {}),
}


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("name, fields, options", UNPAIRED.values(), ids=UNPAIRED)
def test_kto_trainer(arguments, name, fields, options, swapped):
    """With policy and reference exchanged too: one way round the baseline is clamped at 0."""
    rows = [(row, "chosen" if i % 3 else "rejected") for i, row in enumerate(ROWS)]
    rows = [{"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"} for row, key in rows]
    config = trl.KTOConfig(loss_type=name, beta=BETA, **arguments, **options)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.KTOTrainer(*models(swapped), config, train_dataset=data, processing_class=tokenizer())
    loss, made = pk.losses.get("kto", beta=BETA, **fields, **options), list(trainer.train_dataset)
    agree(ours(loss, made, swapped, targets=torch.tensor([row["label"] for row in made])), theirs(trainer))
    assert (trainer._metrics["train"]["kl"][0] > 0) == (swapped and name == "kto")


REFERENCE_FREE = {
    "cpo": ({"loss_type": "sigmoid", "cpo_alpha": 0.5, "label_smoothing": 0.1},
            ("cpo", {"nll_weight": 0.5, "label_smoothing": 0.1})),
    "simpo": ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, ("simpo", {"gamma": 0.5})),
    "cpo-simpo": ({"loss_type": "simpo", "cpo_alpha": 1.0, "simpo_gamma": 0.5},
                  ("simpo", {"gamma": 0.5, "nll_weight": 1.0})),
}  # fmt: skip


def unpadded(row) -> dict[str, list[int]]:
    """Token ids of a row as TRL's older trainers hold it."""
    responses = {name: [t for t in row[f"{name}_labels"] if t != -100] for name in ("chosen", "rejected")}
    prompt = row["chosen_input_ids"][: -len(responses["chosen"])]
    return {"prompt_ids": prompt, **{f"{name}_ids": ids for name, ids in responses.items()}}


@pytest.mark.parametrize("options, mine", REFERENCE_FREE.values(), ids=REFERENCE_FREE)
def test_cpo_trainer(arguments, options, mine):
    config, data = CPOConfig(beta=BETA, **arguments, **options), datasets.Dataset.from_list(ROWS)
    trainer = CPOTrainer(models()[0], config, train_dataset=data, processing_class=tokenizer())
    loss = pk.losses.get(mine[0], beta=BETA, **mine[1])
    agree(ours(loss, [unpadded(row) for row in trainer.train_dataset]), theirs(trainer))


def test_orpo_trainer(arguments):
    config, data = ORPOConfig(beta=BETA, **arguments), datasets.Dataset.from_list([{**r, "prompt": ""} for r in ROWS])
    trainer = ORPOTrainer(models()[0], config, train_dataset=data, processing_class=tokenizer())
    rows = [unpadded(row) for row in trainer.train_dataset]
    assert all(len(row["prompt_ids"]) == 1 for row in rows)
    agree(ours(pk.losses.get("orpo", beta=BETA), rows), theirs(trainer))


# --- Policy gradients ----------------------------------------------------------------------------------------------


CLIP = {"eps": 0.1, "eps_high": 0.2}
POLICY = {
    "grpo": ({}, CLIP),
    "bnpo": ({}, CLIP),
    "dr_grpo": ({"max_completion_length": 20}, {**CLIP, "max_length": 20}),
    "dapo": ({}, CLIP),
    "cispo": ({"epsilon_high": 1.1}, {"eps_high": 1.1}),
    "sapo": ({"sapo_temperature_pos": 1.3, "sapo_temperature_neg": 2.0},
             {"temperature_pos": 1.3, "temperature_neg": 2.0}),
    "grpo two-sided": ({"delta": 1.25}, {**CLIP, "delta": 1.25}),
    "grpo sequence": ({"importance_sampling_level": "sequence"}, {**CLIP, "level": "sequence"}),
    "grpo weighted-kl": ({"use_bias_correction_kl": True}, {**CLIP, "weight_kl": True}),  # TRL's default
}  # fmt: skip


def padded(parts, *, left: bool = False, value: float = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        parts, batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )


@pytest.mark.parametrize("name", POLICY)
def test_grpo_trainer(arguments, name):
    """Off-policy by a fifth of a nat, with a penalty towards a reference; some tokens are clipped, and one masked."""
    options, fields = POLICY[name]
    objective, tokens = name.split()[0], tokenizer()
    texts = [(tokens(row["prompt"]), tokens(row["rejected"], add_special_tokens=False)) for row in ROWS]
    rows = [{"prompt_ids": prompt["input_ids"], "completion_ids": text["input_ids"]} for prompt, text in texts]
    policy = pack_forward(models()[0])
    batch = PackedCollator("single")(rows)
    logps = log_probabilities(policy, batch)
    old, ref = logps.detach() + 0.2 * torch.randn(2, len(logps), generator=torch.Generator().manual_seed(2))
    advantages = torch.tensor([1.0, -0.5, 0.7, -2.0, 0.3, -0.2])
    mask = torch.ones_like(logps, dtype=torch.bool)
    mask[1] = False
    out = getattr(pk.policy_gradient, objective)(
        logps, old, advantages, pk.Layout.groups(batch["layout"].lengths, [2, 2, 2]), mask=mask, ref_logps=ref,
        beta=0.1, **fields,
    )  # fmt: skip
    out.loss.backward()

    config = trl.GRPOConfig(**{
        **arguments, "loss_type": objective, "beta": 0.1, "num_generations": 2, "epsilon": 0.1, "epsilon_high": 0.2,
        "use_bias_correction_kl": False, **options,
    })  # fmt: skip
    models()[0].save_pretrained(arguments["output_dir"])  # its reference is loaded from where the policy was
    trainer = trl.GRPOTrainer(
        arguments["output_dir"], lambda completions, **_: [0.0] * len(completions), config, processing_class=tokens,
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    split = lambda values: padded(values.split(batch["layout"].lengths))  # noqa: E731
    ids = [[torch.tensor(row[key]) for row in rows] for key in ("prompt_ids", "completion_ids")]
    inputs = {
        "prompt_ids": padded(ids[0], left=True),
        "prompt_mask": padded([torch.ones_like(x) for x in ids[0]], left=True),
        "completion_ids": padded(ids[1]),
        "completion_mask": padded([torch.ones_like(x) for x in ids[1]]),
        "tool_mask": split(mask.long()),
        "advantages": advantages,
        "old_per_token_logps": split(old),
        "ref_per_token_logps": split(ref),
        "num_items_in_batch": mask.sum(),
    }
    agree((out.loss.detach(), {key: p.grad for key, p in policy.named_parameters()}), theirs(trainer, inputs))
    if "clip_ratio/low" in out.metrics and "level" not in fields:  # TRL counts responses there
        clipped = out.metrics["clip_ratio/low"] + out.metrics["clip_ratio/high"]
        assert clipped.item() > 0
        assert clipped.item() == pytest.approx(trainer._metrics["train"]["clip_ratio/region_mean"][0], abs=1e-6)
