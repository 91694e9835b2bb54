"""Any causal language model, run on packed sequences, with only the response rows entering its head.

`pack_forward` gives a model's `forward` two more keywords. Called with `response_rows`, it runs the decoder, keeps
those rows and hands them with the head's weight and bias to `tail`, and with the head's adapter, as a keyword `lora`,
where it has one that is on. All that is inside the module's own forward: hooks of DDP, FSDP, autocast and peft fire as
in any other forward. Called without, it is what it was; saving and generating are untouched.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.head import LoRA
from prefkern.training import attention
from prefkern.training.config import LoraConfig, ModelConfig
from prefkern.training.errors import ModelError
from prefkern.training.output_head import OutputHead, head_in_force

logger = logging.getLogger(__name__)

Tail = Callable[..., Any]  # (hidden, weight, bias), and lora= where the head is adapted


def load_tokenizer(config: ModelConfig):
    """The tokenizer of a configuration, with `eos_token` set if the configuration names one.

    Raises:
        ModelError: it cannot be loaded, or the named token is not in its vocabulary.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.name
    key = "model.tokenizer" if config.tokenizer else "model.name"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=None if config.tokenizer else config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for an unreadable folder or an unknown name
        raise ModelError(_unloadable("tokenizer", key, name, error)) from error
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ModelError(f"model.eos_token={config.eos_token!r} is not a token of {name!r}: choose one that is")
        tokenizer.eos_token = config.eos_token
    return tokenizer


def load_model_config(config: ModelConfig):
    """The model's own configuration, which names its vocabulary and context before any weight is read.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ModelError(_unloadable("model", "model.name", config.name, error)) from error


def load_model(config: ModelConfig, device: torch.device | None = None) -> nn.Module:
    """The policy of a configuration: weights, adapters, packed forward, checked by `check_model`.

    Args:
        config: the model section.
        device: where to put it; None leaves that to a distributed engine.
    Raises:
        ModelError: it cannot be loaded or adapted, or cannot be trained packed.
    """
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            **options,
        )
    except Exception as error:
        raise ModelError(
            f"the model {config.name!r} cannot be loaded, check the model section: {_first_line(error)}"
        ) from error
    check_model(pack_forward(model if device is None else model.to(device)))
    return add_adapters(model, config.lora, config.gradient_checkpointing) if config.lora else model


def add_adapters(model: nn.Module, lora: LoraConfig, gradient_checkpointing: bool = False) -> nn.Module:
    """The model wrapped by peft with low-rank adapters, everything else frozen.

    Raises:
        ModelError: peft finds no such module, or the output head would be adapted in a way that is not supported.
    """
    import peft

    options = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
    )
    try:
        wrapped = peft.get_peft_model(model, options)
    except ValueError as error:
        raise ModelError(f"model.lora is refused by peft: {_first_line(error)}") from error
    output_head(model)
    if gradient_checkpointing:
        model.enable_input_require_grads()
    return wrapped


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model beneath peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: nn.Module) -> OutputHead:
    """What makes logits of hidden states: an unsharded (V, D) weight, perhaps a bias, perhaps a low-rank adapter.

    Raises:
        ModelError: there is none, or it is quantised, split across processes, or adapted in a way not supported.
    """
    head = base_model(model).get_output_embeddings()
    kind = type(base_model(model)).__name__
    if head is None or not hasattr(head, "weight"):
        raise ModelError(f"{kind} has no output head with a weight: use a causal language model")
    head = head_in_force(head)
    if not head.weight.is_floating_point():
        raise ModelError(f"the output head of {kind} is quantised: load the model with an unquantised head")
    if hasattr(head.weight, "ds_id"):
        raise ModelError("ZeRO-3 splits the output head, which is not supported yet: use FSDP or ZeRO-2")
    return head


def head_options(model: nn.Module) -> dict[str, float | None]:
    """`softcap` and `logit_scale` of the model's head, as `prefkern.token_logps` takes them."""
    config = base_model(model).config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # so does Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return {"softcap": softcap, "logit_scale": scale}


def pack_forward(model: nn.Module) -> nn.Module:
    """Give the model's forward the keywords `response_rows`, `tail` and `sequence_lengths`: see the module's docstring.

    A model whose attention is "sdpa" attends to each packed sequence by itself, see `prefkern.training.attention`.

    Args:
        model: a transformers causal language model, or peft's wrapper of one. Changed in place and returned.
    """
    base = base_model(model)
    base.forward = types.MethodType(_packed_forward, base)  # a bound method follows its module through deepcopy
    chunked = getattr(base.config.get_text_config(), "attention_chunk_size", None) is not None
    if base.config._attn_implementation == "sdpa" and not chunked:
        base.set_attn_implementation(attention.NAME)
    return model


def _packed_forward(
    self,
    *args,
    response_rows: Tensor | None = None,
    tail: Tail | None = None,
    sequence_lengths: Sequence[int] | None = None,
    **kwargs,
):
    if response_rows is None:
        return type(self).forward(self, *args, **kwargs)
    input_ids, position_ids = kwargs["input_ids"], kwargs["position_ids"]
    separate = self.config._attn_implementation == attention.NAME
    padded = getattr(self, "pads_sequences", False)
    if sequence_lengths is None and (separate or padded):
        sequence_lengths = _lengths(position_ids)
    if padded:
        hidden = _decode_padded(self.get_decoder(), input_ids, sequence_lengths)
    else:
        options = {"sequence_lengths": sequence_lengths} if separate else {}
        with attention.no_mask() if separate else contextlib.nullcontext():
            hidden = _decode(self.get_decoder(), input_ids, position_ids, **options)
    rows, head = hidden.index_select(0, response_rows), head_in_force(self.get_output_embeddings())
    adapter = {} if head.adapter is None else {"lora": head.adapter.of(rows)}
    return tail(rows, head.weight, head.bias, **adapter)


def _lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the packed sequences, read back from the device."""
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()
    return torch.diff(starts, append=torch.tensor([position_ids.shape[1]])).tolist()


def _decode(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor, **options) -> Tensor:
    out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
    return out.last_hidden_state[0]


def _decode_padded(decoder: nn.Module, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same (T, D) rows by way of a padded (R, longest) batch."""
    rows = nn.utils.rnn.pad_sequence(input_ids[0].split(list(lengths)), batch_first=True)
    mask = (torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]).to(rows.device)
    hidden = decoder(input_ids=rows, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return hidden[mask]


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Compare packed with one-by-one forward on two made-up sequences of a few tokens.

    Catches at the start of a run what would silently train on wrong numbers: attention or state that leaks from one
    packed sequence into the next (such a model is run on padded batches instead, and a warning says so), position
    ids that are ignored, and a head that does more than `head_options` says.

    Raises:
        ModelError: packed and one-by-one disagree.
    """
    base = base_model(model)
    weight = output_head(model).weight
    if weight.is_meta or getattr(base, "packing_is_checked", False):  # meta: a distributed engine fills it in later
        return
    exact = weight.dtype in (torch.float32, torch.float64)
    training = base.training
    base.eval()
    try:
        leak, gap = _packing_errors(base, weight)
        if base.config._attn_implementation == attention.NAME and not leak <= (1e-4 if exact else 2e-2):
            base.set_attn_implementation("sdpa")  # its layers do not pass the lengths on
            leak, gap = _packing_errors(base, weight)
        if not leak <= (1e-4 if exact else 2e-2):
            base.pads_sequences = True
            logger.warning("%s lets packed sequences see each other: they are padded instead", type(base).__name__)
            leak, gap = _packing_errors(base, weight)
    finally:
        base.train(training)
    if not gap <= (1e-3 if exact else 1e-1):
        raise ModelError(
            f"{type(base).__name__} computes other logits than its decoder and output head give "
            f"(relative difference {gap:.1e}): it cannot be trained by prefkern yet"
        )
    base.packing_is_checked = True


def _packing_errors(base: nn.Module, weight: Tensor) -> tuple[float, float]:
    """How much a sequence changes with its neighbour, and packed logits differ from one-by-one ones, relatively."""
    device, vocab, options = weight.device, weight.shape[0], head_options(base)
    first, second = torch.arange(6, device=device) * 7919 % vocab, torch.arange(1, 6, device=device) * 5003 % vocab

    def packed(*sequences: Tensor) -> Tensor:
        ids = torch.cat(sequences)[None]
        positions = torch.cat([torch.arange(len(s), device=device) for s in sequences])[None]
        rows = torch.arange(ids.shape[1], device=device)
        return base(input_ids=ids, position_ids=positions, response_rows=rows, tail=partial(_logits, **options))

    together, other = packed(first, second), packed(first.flip(0), second)
    alone = torch.cat([base(input_ids=s[None], use_cache=False).logits[0].float() for s in (first, second)])
    scale = alone.abs().max().clamp(min=1e-6)
    leak = (together - other)[len(first) :].abs().max() / scale
    return leak.item(), ((together - alone).abs().max() / scale).item()


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None = None,
    *,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    z = nn.functional.linear(hidden, weight, bias)
    if lora is not None:
        low, low_weight = lora.factors(hidden, weight)
        z = z + low @ low_weight.T
    z = logit_scale * z.float()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _unloadable(kind: str, key: str, name: str, error: Exception) -> str:
    if not Path(name).expanduser().exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        return f"there is no folder {key}={name!r}: check the path"
    return f"no {kind} can be loaded from {key}={name!r}, a folder or a name on the hub; check it: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
