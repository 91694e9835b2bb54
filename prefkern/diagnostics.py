"""How hard a pair loss pulls on the chosen response, compared with the rejected one."""

import torch
from torch import Tensor


@torch.no_grad()
def gradient_ratios(
    grad_R: Tensor, logp_R: Tensor, count_R: Tensor, ref_logp_R: Tensor | None = None, suffix: str = ""
) -> dict[str, Tensor]:
    """Log-ratios of the magnitudes of a pair's two gradients, chosen to rejected, as means over pairs.

        log |dL/dq_w| - log |dL/dq_l|,    q = log P                 gradients/log_ratio_logp
                                          q = P                     gradients/log_ratio_prob
                                          q = P^(1/|y|)             gradients/log_ratio_token_prob
                                          q = P / P_ref             gradients/log_ratio_relative_prob

    0 is balance, above it the chosen response is pulled harder; exp of the mean is the geometric mean of the ratios.
    The first is what reaches the logits; the others are how losses are derived to balance. Pairs with a gradient of 0
    on either side (an empty response, a saturated loss) are left out; of no pairs at all the mean is 0.

    Args:
        grad_R: (R,) dL/dlogP of each response, R = 2 pairs, chosen before rejected. Where tokens of one response get
            different gradients, their mean over its counted tokens.
        logp_R: (R,) log P, in nats.
        count_R: (R,) counted tokens |y|.
        ref_logp_R: (R,) the reference's log P, in nats; None: no log_ratio_relative_prob.
        suffix: of the names.
    Returns:
        0-dim tensors by name, in nats.
    """

    def gap(values_R: Tensor) -> Tensor:
        chosen, rejected = values_R.view(-1, 2).unbind(1)
        return chosen - rejected

    chosen, rejected = grad_R.view(-1, 2).unbind(1)
    known = (chosen != 0) & (rejected != 0)
    n_R = count_R.clamp(min=1)
    log_ratio = gap(grad_R.abs().log())
    gaps = {
        "logp": log_ratio,
        "prob": log_ratio - gap(logp_R),  # dP = P dlogP
        "token_prob": log_ratio - gap(logp_R / n_R - n_R.log()),  # dP^(1/n) = P^(1/n) / n dlogP
    }
    if ref_logp_R is not None:
        gaps["relative_prob"] = log_ratio - gap(logp_R - ref_logp_R)
    return {
        f"gradients/log_ratio_{name}{suffix}": torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)
        for name, values in gaps.items()
    }
