"""Preference losses for language models without ever building the logits.

Importing this package touches no device and imports neither triton nor transformers.
`prefkern.kernels` (Triton) and `prefkern.training` (transformers) are imported on first use.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, kernels/ and training/ lie beside this folder rather than inside it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))
