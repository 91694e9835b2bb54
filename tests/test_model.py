"""Packed equals one-by-one; the head is described as it is; adapters, checkpointing and saving are untouched."""

import copy

import pytest
import torch
import transformers

import tiny
from prefkern.token_logps import token_logps
from prefkern.training.collator import PackedCollator
from prefkern.training.config import HeadConfig, LoraConfig, ModelConfig
from prefkern.training.errors import ModelError
from prefkern.training.model import add_adapters, check_model, head_options, load_model, pack_forward
from prefkern.training.reference import head_arguments, reference_logps

SIZES = dict(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=1)  # fmt: skip
ROWS = [
    {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7, 8, 1], "rejected_ids": [9]},
    {"prompt_ids": [11], "chosen_ids": [12], "rejected_ids": [13, 96, 1]},
]


def build(name: str, attention: str = "sdpa", **options):
    torch.manual_seed(1)
    if name in ("Bloom", "OPT", "GPTJ", "Mamba"):
        sizes = {"vocab_size": 97, "hidden_size": 16, "n_embd": 16, "num_hidden_layers": 2, "n_layer": 2, "n_head": 2,
                 "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16, "rotary_dim": 4, "state_size": 4,
                 "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
        known = getattr(transformers, f"{name}Config")().to_dict()
        sizes = {k: v for k, v in sizes.items() if k in known}
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
    else:
        config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    config._attn_implementation = attention
    return pack_forward(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def one_by_one(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Log-probabilities, in a dtype, of ROWS' response tokens from the model's own logits, one sequence at a time."""
    found = []
    for row in ROWS:
        for response in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = model(input_ids=ids, use_cache=False).logits[0].to(dtype).log_softmax(-1)
            rows = torch.arange(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
            found.append(logps[rows, ids[0, rows + 1]])
    return torch.cat(found)


def packed(model) -> torch.Tensor:
    """The same through the packed batch and the fused head."""
    batch = PackedCollator("pair")(ROWS)
    options = head_arguments(model, HeadConfig())

    def tail(hidden, weight, bias, lora=None):
        assert hidden.shape == (len(batch["labels"]), weight.shape[1]), "only response rows enter the head"
        return token_logps(hidden, weight, batch["labels"], bias=bias, lora=lora, **options).logps

    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "response_rows")}
    return model(**inputs, tail=tail)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_packed_equals_one_by_one(name, attention):
    model = build(name, attention, **({"head_dim": 8} if name == "Qwen3" else {}))
    upstream = torch.randn(9)
    expected = one_by_one(model)
    (expected * upstream).sum().backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    found = packed(model)
    (found * upstream).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[k], rtol=1e-4, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("window", [2, 4])
def test_a_sliding_window_is_honoured(window):
    model = build("Mistral", head_dim=8, sliding_window=window)
    with torch.no_grad():
        found, expected = packed(model), one_by_one(model)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, packed(build("Mistral", head_dim=8, sliding_window=None)), atol=1e-3)


def test_no_mask_over_the_whole_batch_is_made():
    model = build("Llama")
    largest = []
    with _Sizes(largest), torch.no_grad():
        packed(model)
    rows = PackedCollator("pair")(ROWS)["input_ids"].shape[1]
    assert (rows, rows) not in {shape[-2:] for shape in largest}


@pytest.mark.parametrize("name, options", [
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
    ("Cohere", {"logit_scale": 0.5}),
    ("Granite", {"logits_scaling": 3.0}),
    ("Phi", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("GPTJ", {}),
], ids=["softcap, tied", "scale", "divisor", "bias", "tied", "bias, gpt-j"])  # fmt: skip
def test_head_is_described_as_it_is(name, options):
    model = build(name, "eager" if name in ("Gemma2", "GPTJ") else "sdpa", **options)
    check_model(model)
    with torch.no_grad():
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.normal_()
        torch.testing.assert_close(packed(model), one_by_one(model), rtol=1e-5, atol=1e-5)
    assert not getattr(model, "pads_sequences", False)


@pytest.mark.parametrize("name", ["Bloom", "OPT", "Mamba"])
def test_models_that_leak_between_packed_sequences_are_padded(name, caplog):
    model = build(name, "eager")
    check_model(model)
    assert "padded instead" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(packed(model), one_by_one(model), rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_understood_is_refused(monkeypatch):
    model = build("Llama")
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda hidden: 2 * hidden @ model.lm_head.weight.T)
    with pytest.raises(ModelError, match="LlamaForCausalLM computes other logits"):
        check_model(model)


def test_copies_saving_and_plain_calls_are_untouched(tmp_path):
    model = build("Llama")
    ids = torch.tensor([[3, 4, 5]])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        assert not torch.equal(packed(model), packed(copied)), "a copy runs on its own weights"
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == "sdpa", "our attention is not saved with the model"
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 6


def test_gradient_checkpointing_changes_no_gradient():
    model = build("Llama").train()
    packed(model).sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed(model).sum().backward()
    assert all(torch.equal(p.grad, expected[k]) for k, p in model.named_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_alone_and_switched_off_are_the_reference(checkpointing):
    base = build("Llama").train()
    with torch.no_grad():
        before = one_by_one(base.eval())
    model = add_adapters(base, LoraConfig(r=2), gradient_checkpointing=checkpointing).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in k for k in trained)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if "lora_B" in k:
                p.normal_()
    found = packed(model)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(found, before)
    reference = reference_logps(model, PackedCollator("pair")(ROWS), head_arguments(model, HeadConfig()))
    torch.testing.assert_close(reference, before, rtol=1e-5, atol=1e-5)
    assert model.training and trained == {k for k, p in model.named_parameters() if p.requires_grad}


def test_adapter_errors():
    with pytest.raises(ModelError, match="model.lora is refused by peft"):
        add_adapters(build("Llama"), LoraConfig(target_modules=["q_porj"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_model(tmp_path, dtype):
    build("Llama").save_pretrained(tmp_path)
    model = load_model(ModelConfig(name=str(tmp_path), dtype=dtype, lora=LoraConfig(r=2)))
    assert model.get_base_model().lm_head.weight.dtype == getattr(torch, dtype)
    assert head_options(model) == {"softcap": None, "logit_scale": 1.0}


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __init__(self, shapes: list) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.extend(tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if hasattr(t, "shape"))
        return out


def test_packed_llama_of_the_trainer_tests_is_not_degenerate():
    """The tiny model's outputs depend on its context; otherwise leaks would go unseen."""
    model = pack_forward(tiny.llama())
    with torch.no_grad():
        a, b = (model(torch.tensor([[first, 7]])).logits[0, 1] for first in (5, 6))
    assert (a - b).abs().max() > 0.01
