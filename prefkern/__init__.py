"""Preference losses for language models without ever building the logits.

Importing this package touches no device and imports neither triton nor transformers.
`prefkern.kernels` (Triton) and `prefkern.training` (transformers) are imported on first use.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, kernels/ and training/ lie beside this folder rather than inside it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from prefkern import losses, policy_gradient  # noqa: E402 - the path above must be set first
from prefkern.critical_tokens import critical_token_scores  # noqa: E402
from prefkern.granularity import Adaptive, Boundaries, Static  # noqa: E402
from prefkern.head import Head, LoRA  # noqa: E402
from prefkern.layout import Layout  # noqa: E402
from prefkern.packing import Packed, pack  # noqa: E402
from prefkern.planner import explain  # noqa: E402
from prefkern.preference import (  # noqa: E402
    PreferenceOutput,
    linear_preference_loss,
    logits_preference_loss,
    preference_loss,
)
from prefkern.token_kl import token_kl  # noqa: E402
from prefkern.token_logps import TokenLogpsOutput, logits_token_logps, token_logps  # noqa: E402

__all__ = [
    "Adaptive", "Boundaries", "Head", "Layout", "LoRA", "Packed", "PreferenceOutput", "Static", "TokenLogpsOutput",
    "critical_token_scores", "explain", "linear_preference_loss", "logits_preference_loss", "logits_token_logps",
    "losses", "pack", "policy_gradient", "preference_loss", "token_kl", "token_logps",
]  # fmt: skip
