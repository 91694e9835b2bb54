"""The tail: what a loss makes of log-probabilities, its constants first, then its sum, then what is reported of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefkern import reference
from prefkern.diagnostics import gradient_ratios
from prefkern.gradients import first_order_only
from prefkern.layout import Layout, TailIndex
from prefkern.losses.base import Addend, Batch, Loss
from prefkern.planner import require_triton, uses_triton


class PreferenceOutput(NamedTuple):
    """A loss to call backward on, and what happened, all on the device; reading a metric is the caller's host sync."""

    loss: Tensor  # 0-dim, fp32
    metrics: dict[str, Tensor]  # 0-dim each, detached
    logps: Tensor  # (N,) per-token log-probabilities in nats, detached
    scores: Tensor | None  # (S,) segment scores in group order (see Layout), detached; None under torch.compile


@dataclass(frozen=True)
class Given:
    """What a call brings beside log-probabilities and layout; constants under differentiation, except token_kl."""

    ref_logps_N: Tensor | None = None
    token_weights_N: Tensor | None = None
    mask_N: Tensor | None = None
    target_R: Tensor | None = None
    mismatched_R: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    token_kl_N: Tensor | None = None
    vocab_size: int | None = None
    diagnostics: bool = False


@dataclass(frozen=True)
class Tail:
    """One loss's constants, as the tail wants them."""

    loss: Loss
    batch: Batch
    index: TailIndex
    ref_logps_N: Tensor | None
    scale_R: Tensor | None
    margin: float | Tensor
    target_R: Tensor | None
    weight_G: Tensor | None
    diagnostics: bool = False

    def of_segments(self, values_R: Tensor | None) -> Tensor | None:
        """(S,) values of each segment's response."""
        return None if values_R is None else values_R[self.index.response_of_segment_S]

    @property
    def kernel_arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments that tail and fused_logits share."""
        margin_G = self.margin
        if not isinstance(margin_G, Tensor):
            groups, device = self.batch.layout.num_groups, self.batch.count_R.device
            margin_G = torch.full((groups,), margin_G, device=device) if margin_G != 0 else None
        return {
            "ref_logps_N": self.ref_logps_N, "token_weights_N": self.batch.weights_N,
            "scale_S": self.of_segments(self.scale_R), "margin_G": margin_G,
            "target_S": self.of_segments(self.target_R), "weight_G": self.weight_G,
        }  # fmt: skip


def loss_of_logps(logps, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    """The loss of log-probabilities; arguments as `preference_loss`'s. While torch.compile traces: an operator."""
    if torch.compiler.is_compiling():
        from prefkern import operators

        return operators.traced_preference(logps, layout, loss, given, normalizer, impl, state)
    return sum_of_addends(logps, layout, loss, given, normalizer, impl, state)


def sum_of_addends(logps, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    """The loss, addend by addend."""
    if loss.is_one:
        return _one_loss(logps, layout, loss, given, normalizer, impl, state)
    addends = loss.addends(state)
    normalizers = _normalizers(loss, addends, normalizer)
    loss.check_layout(layout)
    _check_diagnostics(loss, given)
    results = [
        _one_loss(logps, layout, term.loss, share(given, term.loss), own, impl, term.state)
        for term, own in zip(addends, normalizers)
    ]
    total = sum(term.weight * result.loss for term, result in zip(addends, results))
    metrics: dict[str, Tensor] = {}
    for term, result in zip(addends, results):
        again = sum(name.split("#")[0] == f"loss/{term.loss.name}" for name in metrics)
        metrics[f"loss/{term.loss.name}" + f"#{again + 1}" * bool(again)] = result.loss.detach()
    return PreferenceOutput(total, {**results[0].metrics, **metrics}, logps.detach(), results[0].scores)


def _normalizers(loss: Loss, addends: Sequence[Addend], normalizer) -> list[float | Tensor | None]:
    """One for each addend; None where the loss has to say."""
    found = [None] * len(addends) if normalizer is None else _listed(normalizer)
    if len(found) == len(addends):
        return found
    if loss.is_one:
        raise ValueError(f"{loss.name} has one addend, but {len(found)} normalizers were given")
    raise ValueError(
        f"{loss.name} has {len(addends)} addends ({', '.join(term.loss.name for term in addends)}), but"
        f" {len(found)} normalizer(s) were given; pass one for each, as loss.normalizers counts them"
    )


def _listed(normalizer: float | Tensor | Sequence[float | Tensor]) -> list[float | Tensor]:
    several = isinstance(normalizer, Sequence) or isinstance(normalizer, Tensor) and normalizer.dim() > 0
    return list(normalizer) if several else [normalizer]


def share(given: Given, loss: Loss) -> Given:
    """What one addend looks at: the others' reference and targets are not its concern."""
    return replace(
        given,
        ref_logps_N=given.ref_logps_N if loss.needs_reference else None,
        target_R=given.target_R if loss.target_kind else None,
        mismatched_R=given.mismatched_R if loss.needs_mismatched else None,
        token_kl_N=given.token_kl_N if loss.needs_token_kl else None,
        diagnostics=given.diagnostics and loss.arity == "pair",
    )


def _one_loss(logps, layout, loss, given: Given, normalizer, impl, state) -> PreferenceOutput:
    check_tail(logps, layout, loss, given)
    wide = reference.accumulator(logps.dtype)
    tail = prepare(loss.segmented(layout), loss, logps.device, wide, given, state, logps)
    x = with_token_kl(logps, given.token_kl_N, tail)
    summed, score_S = _summed(x, tail, impl)
    return finish(summed, score_S, logps.detach(), tail, normalizer, {}, x.detach())


def _summed(x: Tensor, tail: Tail, impl: str) -> tuple[Tensor, Tensor]:
    """Sum of weighted group values, and segment scores."""
    return PreferenceTail.apply(x, tail) if _use_triton(impl, x) else eager_tail(x, tail)


def with_token_kl(logps: Tensor, kl_N: Tensor | None, tail: Tail) -> Tensor:
    """What the loss adds up: log-probabilities, and its share of the divergence where it has one."""
    if kl_N is None:
        return logps
    weights_N = tail.batch.weights_N
    kl_N = kl_N if weights_N is None else torch.where(weights_N != 0, kl_N, 0.0)
    return tail.loss.with_token_kl(logps, kl_N, tail.batch.index)


def prepare(layout, loss, device, wide: torch.dtype, given: Given, state, logps=None) -> Tail:
    """One loss's constants.

    Args:
        layout: as the loss compares it, `loss.segmented` of the batch's.
        wide: dtype of the arithmetic.
        logps: for losses that need a first pass.
    """
    index = layout.index(device)
    with torch.no_grad():
        ref_logps, weights, target_R, mismatched_R = (
            None if t is None else t.detach().to(wide)
            for t in (given.ref_logps_N, given.token_weights_N, given.target_R, given.mismatched_R)
        )
        mask = None if given.mask_N is None else given.mask_N.bool()
        if mask is None:
            count_R = index.response_offsets.diff().to(wide)
        else:
            weights = mask.to(wide) if weights is None else torch.where(mask, weights, 0.0)
            count_R = reference.span_sums(mask.to(wide), index.response_offsets)
        stats = {name: t.detach().to(wide) for name, t in given.stats.items()}
        batch = Batch(layout, index, count_R, mask, weights, target_R, mismatched_R, stats, state, given.vocab_size)
        factor_N = loss.token_factor(batch)
        if factor_N is not None:
            weights = factor_N if weights is None else weights * factor_N
            batch = replace(batch, weights_N=weights)
        if loss.needs_first_pass:
            first = logps.detach().to(wide)

            def sums(x_N: Tensor, ref_N: Tensor | None = None) -> Tensor:
                return reference.span_sums(reference.log_ratios(x_N, ref_N, weights), index.response_offsets)

            logp_R = sums(first)
            ref_R = torch.zeros_like(logp_R) if ref_logps is None else sums(ref_logps)
            ratio_R = logp_R if ref_logps is None else sums(first, ref_logps)
            batch = replace(batch, logps_N=first, logp_R=logp_R, ref_R=ref_R, ratio_R=ratio_R)
        scale_R, margin, target_R = loss.scale(batch), loss.margin(batch), loss.target(batch)
        tail_index = loss.regroup(batch)
        weight_G = _alive(layout, tail_index, weights, wide)
        own_G = loss.group_weight(batch)
        own_G = None if own_G is None else own_G.to(wide)
        weight_G = own_G if weight_G is None else weight_G if own_G is None else weight_G * own_G
        return Tail(loss, batch, tail_index, ref_logps, scale_R, margin, target_R, weight_G, given.diagnostics)


def _alive(layout: Layout, index: TailIndex, weights_N: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """(G,) 1, or 0 where no token of the group counts: nothing was compared, so nothing is lost. None: 1 everywhere."""
    if weights_N is not None:
        sums = reference.span_sums((weights_N != 0).to(wide), index.row_order_offsets)
        tokens_S = torch.empty_like(sums).index_copy(0, index.token_order_S, sums)
    elif layout.has_empty_group or index is not layout.index(index.group_offsets.device):  # regrouped: empty with empty
        tokens_S = (index.segment_end_S - index.segment_start_S).to(wide)
    else:
        return None
    return (reference.span_sums(tokens_S, index.group_offsets) > 0).to(wide)


def eager_tail(logps: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Sum of weighted group values, and segment scores, in plain torch."""
    d = reference.log_ratios(logps, tail.ref_logps_N, tail.batch.weights_N)
    score_S = reference.segment_scores(d, tail.index, tail.scale_R, tail.batch.layout.segments_per_response)
    score_GK, valid_GK = reference.pad_groups(score_S, tail.index)
    targets = ()
    if tail.loss.link_targets:
        targets = reference.pad_groups(tail.of_segments(tail.target_R), tail.index)[0], valid_GK
    value_G = tail.loss.eager(score_GK, tail.margin, *targets)
    return (value_G if tail.weight_G is None else value_G * tail.weight_G).sum(), score_S.detach()


def finish(summed, score_S, logps_N, tail: Tail, normalizer, metrics, x_N=None) -> PreferenceOutput:
    """Divides, and measures what the loss reports.

    Args:
        x_N: what was added up, where it is not logps_N.
    """
    batch = tail.batch
    if normalizer is None:
        normalizer = tail.loss.normalizer(batch.layout, batch.count_R)
    else:
        [normalizer] = _normalizers(tail.loss, [tail.loss], normalizer)
    with torch.no_grad():
        d = reference.log_ratios(logps_N if x_N is None else x_N, tail.ref_logps_N, batch.weights_N)
        score_R = reference.span_sums(d, batch.index.response_offsets)
        score_R = score_R if tail.scale_R is None else score_R * tail.scale_R
        logp_R = _counted_sums(logps_N, batch)
        own = tail.loss.metrics(score_R, logp_R, batch)
        if tail.diagnostics:
            own.update(_gradient_ratios(logps_N if x_N is None else x_N, logp_R, tail))
    return PreferenceOutput(summed / normalizer, {**own, **metrics}, logps_N, score_S)


def _counted_sums(values_N: Tensor, batch: Batch) -> Tensor:
    """(R,) sums over each response's counted tokens, whatever their weights."""
    kept_N = values_N if batch.mask_N is None else torch.where(batch.mask_N, values_N, 0.0)
    return reference.span_sums(kept_N, batch.index.response_offsets)


def _gradient_ratios(x_N: Tensor, logp_R: Tensor, tail: Tail) -> dict[str, Tensor]:
    batch, offsets, before = tail.batch, tail.batch.index.response_offsets, tail.loss.uncorrected()
    ref_R = None if tail.ref_logps_N is None else _counted_sums(tail.ref_logps_N, batch)

    def ratios(tail: Tail, suffix: str) -> dict[str, Tensor]:
        x = x_N.detach().requires_grad_()
        with torch.enable_grad():
            (g_N,) = torch.autograd.grad(eager_tail(x, tail)[0], x)
        grad_R = reference.span_sums(g_N, offsets) / batch.count_R.clamp(min=1)
        return gradient_ratios(grad_R, logp_R, batch.count_R, ref_R, suffix)

    out = ratios(tail, "")
    if before is not None:
        tail = replace(tail, loss=before, scale_R=before.scale(batch), target_R=before.target(batch))
        out.update(ratios(tail, "_before"))
    return out


class Promptwise:
    """A loss whose every term hangs on one prompt alone, to be differentiated some prompts at a time."""

    def __init__(
        self, layout: Layout, loss: Loss, given: Given, normalizer, impl: str, *, own_reference: bool = False
    ) -> None:
        """Arguments as `preference_loss`'s, with a mask in `given`.

        Args:
            own_reference: the policy's log-probabilities are the reference's, too.
        """
        addends, mask_N = loss.addends(), given.mask_N
        # What is not there yet has the shape and place of the mask.
        stats = {name: mask_N for term in addends for name in term.loss.row_outputs}
        whole = replace(given, ref_logps_N=mask_N if own_reference else given.ref_logps_N, stats=stats)
        loss.check_layout(layout)
        _check_diagnostics(loss, given)
        for term in addends:
            check_tail(mask_N, layout, term.loss, whole if loss.is_one else share(whole, term.loss))
        index = layout.index(mask_N.device)
        count_R = reference.span_sums(mask_N.float(), index.response_offsets)
        self.given, self.impl, self.own_reference = given, impl, own_reference
        self.terms = []
        for term, own in zip(addends, _normalizers(loss, addends, normalizer)):
            cut = term.loss.segmented(layout)
            self.terms.append((term, cut, term.loss.normalizer(cut, count_R) if own is None else own))

    @staticmethod
    def serves(loss: Loss, given: Given, state: nn.Module | None) -> bool:
        """Whether the loss is one, with this data."""
        alone = all(not term.loss.couples_batch and term.state is None for term in loss.addends(state))
        return alone and given.mismatched_R is None and given.token_kl_N is None

    def gradient(self, run: slice, logps: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
        """dL/dlogp of the rows of a run of prompts, as of the whole batch's loss.

        Args:
            logps: (n,) of their rows; stats: (n,) outputs of `token_logps`, by name.
        """
        x = logps.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(sum(self._term(*term, run, x, stats) for term in self.terms), x)[0]

    def _term(self, term: Addend, layout: Layout, normalizer, run: slice, x: Tensor, stats) -> Tensor:
        loss, part = term.loss, layout.prompts(run)

        def of(values: Tensor | None, where: slice) -> Tensor | None:
            return None if values is None else values[where]

        given = replace(
            self.given,
            ref_logps_N=x.detach() if self.own_reference else of(self.given.ref_logps_N, part.rows),
            token_weights_N=of(self.given.token_weights_N, part.rows),
            mask_N=of(self.given.mask_N, part.rows),
            target_R=of(self.given.target_R, part.responses),
            stats={name: stats[name] for name in loss.row_outputs},
        )
        wide = reference.accumulator(x.dtype)
        tail = prepare(part.layout, loss, x.device, wide, share(given, loss), None, x)
        return term.weight * _summed(x, tail, self.impl)[0] / normalizer


class PreferenceTail(torch.autograd.Function):
    """logps -> (sum of weighted group values, segment scores), by the tail kernel; g_N is made in forward."""

    @staticmethod
    def forward(ctx, logps, call: Tail):
        from prefkern.kernels import links, tail

        value_G, score_S, g_N = tail.tail(
            logps.detach(), call.index, links.find(call.loss.link), call.loss.link_params(),
            want_grad=ctx.needs_input_grad[0], **call.kernel_arguments,
        )  # fmt: skip
        ctx.save_for_backward(logps, g_N)
        ctx.mark_non_differentiable(score_S)
        return value_G.sum(), score_S

    @staticmethod
    def backward(ctx, grad_loss, _):
        logps, g_N = ctx.saved_tensors
        with torch.no_grad():
            dlogps = g_N * grad_loss
        return *first_order_only((dlogps,), (logps,)), None


def _use_triton(impl: str, logps: Tensor) -> bool:
    if impl not in ("auto", "triton", "eager"):
        raise ValueError(f"impl={impl!r} must be one of auto, triton, eager")
    if impl == "triton":
        require_triton(logps.device, logps.dtype)
        return True
    return impl == "auto" and uses_triton(logps.device, logps.dtype)


def _check_diagnostics(loss: Loss, given: Given) -> None:
    if given.diagnostics and torch.is_inference_mode_enabled():
        raise ValueError("diagnostics differentiate, which torch.inference_mode forbids; use torch.no_grad")
    if given.diagnostics and loss.arity != "pair":
        raise ValueError(
            f"diagnostics compare the responses of a pair, but {loss.name} is not of pairs; leave them out"
        )


def check_tail(rows_N: Tensor, layout: Layout, loss: Loss, given: Given) -> None:
    """Raise ValueError where layout, loss and data do not go together; rows_N: any (N,) tensor on the rows' device."""
    loss.check_layout(layout)
    _check_diagnostics(loss, given)
    needs = (
        (loss.needs_reference, given.ref_logps_N, "compares with a reference", "uses no reference", "ref_logps",
         "(N,) from token_logps of the reference model"),
        (loss.target_kind, given.target_R, "reads targets", "reads no targets", "targets",
         f"(R,), a {loss.target_kind} of each response"),
        (loss.needs_mismatched, given.mismatched_R, "needs a baseline", "needs no baseline", "mismatched",
         "log-ratio sums of prompts with other prompts' responses"),
        (loss.needs_token_kl, given.token_kl_N, "needs the KL divergence of every row", "uses no KL divergence",
         "token_kl", "(N,) from token_kl"),
    )  # fmt: skip
    for needed, value, does, does_not, name, what in needs:
        if needed and value is None:
            raise ValueError(f"{loss.name} {does}: pass {name}, {what}")
        if not needed and value is not None:
            raise ValueError(f"{loss.name} {does_not}, but {name} were given; leave them out")
    if loss.needs_token_weights and given.token_weights_N is None:
        raise ValueError(f"{loss.name} weights tokens: pass token_weights, (N,)")
    for name in loss.row_outputs:
        if name not in given.stats:
            raise ValueError(f"{loss.name} needs the output {name!r} of token_logps: pass stats={{{name!r}: ...}}")
    rows = {"logps": rows_N, "ref_logps": given.ref_logps_N, "token_weights": given.token_weights_N,
            "mask": given.mask_N, "token_kl": given.token_kl_N, **given.stats}  # fmt: skip
    for name, t in rows.items():
        if t is not None and t.shape != (layout.num_tokens,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but the layout holds {layout.num_tokens} tokens")
    if given.target_R is not None and given.target_R.shape != (layout.num_responses,):
        raise ValueError(
            f"targets has shape {tuple(given.target_R.shape)}, but the layout holds {layout.num_responses} responses"
        )
    for name, t in {**rows, "targets": given.target_R, "mismatched": given.mismatched_R}.items():
        if t is not None and t.device != rows_N.device:
            raise ValueError(f"{name} is on {t.device}, but the policy's log-probabilities are on {rows_N.device}")
