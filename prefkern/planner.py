"""Which way through the head costs the fewest FLOPs and fits the workspace: one readable table.

One pass of the head, `hidden @ weight.T`, is 2NDV FLOPs. No row changes a result beyond rounding.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

_TILE = 64  # rows, or vocabulary entries, of a library product's tile

IMPLS = ("auto", "chunked", "cut", "eager")


@dataclass(frozen=True)
class Row:
    """One row of the table: what it is called, when it is right, how it works, what it costs."""

    name: str
    body: str
    when: str
    how: str
    flops_forward: int  # multiples of N * D * V
    flops_backward: int
    memory: str

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward together, in multiples of N * D * V."""
        return self.flops_forward + self.flops_backward


NO_GRAD = Row(
    "no_grad", "chunked", "no gradient is needed",
    "logits of a chunk of rows, reduced and overwritten by the next",
    2, 0, "workspace",
)  # fmt: skip
FROZEN = Row(
    "frozen_head", "chunked", "only hidden needs a gradient",
    "forward keeps u_n = weight[y_n] - p_n @ weight from the same chunk of logits; backward is dhidden_n = g_n u_n",
    4, 0, "N*D + workspace",
)  # fmt: skip
# The place of the 6NDV row, trained head with a loss local to a group that fits the workspace, is here: it needs g
# while the chunk's logits are there, so it belongs to linear_preference_loss and not to token_logps.
RECOMPUTE = Row(
    "recompute", "chunked", "the head (weight or bias) needs a gradient",
    "backward walks the vocabulary in slices: logits again, gradient in place, a product each for dhidden and dweight",
    2, 6, "N*D in fp32 + V*D for dweight + workspace",
)  # fmt: skip
CUT_NO_GRAD = Row(
    "cut_no_grad", "cut", "impl='cut', no gradient is needed",
    "Triton matmul with an online log-sum-exp: no logits in memory",
    2, 0, "a few floats a row",
)  # fmt: skip
CUT_FROZEN = Row(
    "cut_frozen_head", "cut", "impl='cut', only hidden needs a gradient",
    "as above; backward recomputes tiles and stores only their gradient, a slice of the vocabulary at a time",
    2, 4, "N*D in fp32 + workspace",
)  # fmt: skip
CUT_TRAINED = Row(
    "cut_trained_head", "cut", "impl='cut', the head needs a gradient",
    "as above, with one more product for dweight",
    2, 6, "N*D in fp32 + V*D for dweight + workspace",
)  # fmt: skip
EAGER_NO_GRAD = Row(
    "eager_no_grad", "eager", "impl='eager', no gradient is needed",
    "plain torch with all logits in memory: the definition",
    2, 0, "several N*V",
)  # fmt: skip
EAGER_FROZEN = Row(
    "eager_frozen_head", "eager", "impl='eager', only hidden needs a gradient",
    "the same under autograd; the one body with second derivatives",
    2, 2, "several N*V",
)  # fmt: skip
EAGER_TRAINED = Row(
    "eager_trained_head", "eager", "impl='eager', the head needs a gradient",
    "the same under autograd",
    2, 4, "several N*V + V*D for dweight",
)  # fmt: skip

# One line a body; columns: no gradient, frozen head, trained head.
BODIES: dict[str, tuple[Row, Row, Row]] = {
    "chunked": (NO_GRAD, FROZEN, RECOMPUTE),
    "cut": (CUT_NO_GRAD, CUT_FROZEN, CUT_TRAINED),
    "eager": (EAGER_NO_GRAD, EAGER_FROZEN, EAGER_TRAINED),
}
TABLE: tuple[Row, ...] = tuple(row for rows in BODIES.values() for row in rows)


@dataclass(frozen=True)
class Plan:
    """A row of the table with the sizes filled in."""

    row: Row
    shape: tuple[int, int, int]  # N, D, V
    workspace_bytes: int
    itemsize: int
    reason: str

    @property
    def flops(self) -> int:
        """Floating-point operations of forward and backward."""
        n, d, v = self.shape
        return self.row.flops * n * d * v

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose logits fit the workspace; at least one."""
        return _fit(self.workspace_bytes, self.shape[2] * self.itemsize, self.shape[0])

    @property
    def vocab_per_slice(self) -> int:
        """Vocabulary entries whose logits, for all N rows, fit the workspace; at least one."""
        return _fit(self.workspace_bytes, self.shape[0] * self.itemsize, self.shape[2])


def _fit(budget: int, unit: int, most: int) -> int:
    fits = max(1, min(most, budget // max(1, unit)))
    # Library products like full tiles; where the whole fits, nothing is gained.
    return fits if fits < _TILE or fits == most else fits // _TILE * _TILE


def plan(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    grad_hidden: bool,
    grad_head: bool,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> Plan:
    """Choose a row of the table.

    Args:
        shape: (N, D, V).
        dtype, device: of hidden and weight.
        grad_hidden: whether hidden needs a gradient.
        grad_head: whether weight or bias does.
        impl: "auto", or the name of a body.
        workspace_bytes: bytes for a block of logits; None: `default_workspace(device)`.
    Raises:
        ValueError: unknown impl, or workspace_bytes below 1.
        RuntimeError: impl="cut" where Triton cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} must be one of {', '.join(IMPLS)}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes={workspace_bytes!r} must be at least 1")
    needs = (
        "the head needs a gradient" if grad_head else "only hidden needs a gradient" if grad_hidden else "no gradient"
    )
    if impl == "cut":
        require_triton(device, dtype)
    row = BODIES["chunked" if impl == "auto" else impl][2 if grad_head else 1 if grad_hidden else 0]
    how = (
        "asked for"
        if impl != "auto"
        else "fewest FLOPs of the table; row work by " + ("Triton" if uses_triton(device, dtype) else "torch")
    )
    workspace = default_workspace(device) if workspace_bytes is None else workspace_bytes
    return Plan(row, shape, workspace, dtype.itemsize, f"{needs}; {row.body} body: {how}")


def explain(
    n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", **options
) -> str:
    """What would run for N rows, D hidden, V vocabulary entries, its FLOPs and memory, and why; options as `plan`'s."""
    options = {"grad_hidden": True, "grad_head": True, **options}
    p = plan((n, d, v), dtype, torch.device(device), **options)
    passes = f"{p.row.flops_forward}NDV forward + {p.row.flops_backward}NDV backward"
    return (
        f"{p.row.name} ({p.row.body} body): {p.row.how}\n"
        f"  why: {p.reason}\n"
        f"  FLOPs: {passes} = {p.flops:.3e}\n"
        f"  memory beside the outputs: {p.row.memory}, workspace {p.workspace_bytes / 2**20:.0f} MiB\n"
        f"  {p.rows_per_chunk} rows a chunk in forward, {p.vocab_per_slice} vocabulary entries a slice in backward"
    )


def default_workspace(device: torch.device) -> int:
    """Bytes for one block of logits: 128 MiB on a CPU; on a GPU 1/256 of all its memory, at most 512 MiB.

    Of all and not of what is free: the size of a block may change rounding, and equal inputs shall give equal bits.
    """
    if device.type != "cuda":
        return 128 << 20
    return min(512 << 20, torch.cuda.get_device_properties(device).total_memory // 256)


def has_triton() -> bool:
    """Whether the triton package is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks Triton to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_obstacle(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why Triton kernels cannot run on tensors of this device and dtype, in words; None where they can."""
    if not has_triton():
        return "the triton package is not installed (pip install triton; Linux only)"
    if dtype == torch.float64:
        return "the kernels compute in fp32 and take no float64 tensors"
    if device.type != "cuda" and not interpreting():
        return f"tensors are on {device.type}; Triton needs a GPU, or TRITON_INTERPRET=1 to run slowly on the CPU"
    return None


def require_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Raise RuntimeError with the mend where Triton kernels cannot run on such tensors."""
    obstacle = triton_obstacle(device, dtype)
    if obstacle:
        raise RuntimeError(f"a Triton body was asked for, but {obstacle}; impl='auto' picks one that runs here")


def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether impl="auto" runs Triton kernels on such tensors: on a GPU, but not in float64, which they lack."""
    return device.type == "cuda" and dtype != torch.float64 and has_triton()
