"""Which way through the head costs the fewest FLOPs and fits the workspace: one readable table.

One pass of the head, `hidden @ weight.T`, is 2NDV FLOPs. No row changes a result beyond rounding.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace

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
    "a block of logits at a time, reduced and overwritten by the next",
    2, 0, "workspace",
)  # fmt: skip
FROZEN = Row(
    "frozen_head", "chunked", "only hidden needs a gradient",
    "forward keeps u_n = weight[y_n] - p_n @ weight from the same block of logits; backward is dhidden_n = g_n u_n",
    4, 0, "N*D + workspace",
)  # fmt: skip
GROUP_LOCAL = Row(
    "group_local", "chunked", "weight needs a gradient, the loss is a sum over groups that fit the workspace",
    "whole groups a chunk: logits, log-probabilities, loss, g and both products while the logits are there",
    6, 0, "N*D + V*D in fp32 + workspace",
)  # fmt: skip
GROUP_LOCAL_ADAPTER = Row(
    "group_local_adapter", "chunked", "as group_local, but of the head only bias or adapter need a gradient",
    "as group_local, without the product for dweight",
    4, 0, "N*D + workspace",
)  # fmt: skip
RECOMPUTE = Row(
    "recompute", "chunked", "weight needs a gradient",
    "forward leaves the logits of up to D rows where dweight will be; backward walks the vocabulary in slices: logits"
    " of the other rows again, gradient in place, a product each for dhidden and dweight",
    2, 6, "N*D in fp32 + V*D for dweight + workspace",
)  # fmt: skip
RECOMPUTE_ADAPTER = Row(
    "recompute_adapter", "chunked", "of the head only bias or adapter need a gradient",
    "as recompute, without the product for dweight",
    2, 4, "N*D in fp32 + workspace",
)  # fmt: skip
CUT_NO_GRAD = Row(
    "cut_no_grad", "cut", "impl='cut', no gradient is needed",
    "Triton matmul with an online log-sum-exp: no logits in memory",
    2, 0, "a few floats a row",
)  # fmt: skip
CUT_FROZEN = Row(
    "cut_frozen_head", "cut", "impl='cut', weight needs no gradient",
    "as above; backward recomputes tiles and stores only their gradient, a slice of the vocabulary at a time",
    2, 4, "N*D in fp32 + workspace",
)  # fmt: skip
CUT_TRAINED = Row(
    "cut_trained_head", "cut", "impl='cut', weight needs a gradient",
    "as above, with one more product for dweight",
    2, 6, "N*D in fp32 + V*D for dweight + workspace",
)  # fmt: skip
EAGER_NO_GRAD = Row(
    "eager_no_grad", "eager", "impl='eager', no gradient is needed",
    "plain torch with all logits in memory: the definition",
    2, 0, "several N*V",
)  # fmt: skip
EAGER_FROZEN = Row(
    "eager_frozen_head", "eager", "impl='eager', weight needs no gradient",
    "the same under autograd; the one body with second derivatives",
    2, 2, "several N*V",
)  # fmt: skip
EAGER_TRAINED = Row(
    "eager_trained_head", "eager", "impl='eager', weight needs a gradient",
    "the same under autograd",
    2, 4, "several N*V + V*D for dweight",
)  # fmt: skip

# One line a body; columns: no gradient, only rows (hidden), rows and adapter or bias, weight.
BODIES: dict[str, tuple[Row, Row, Row, Row]] = {
    "chunked": (NO_GRAD, FROZEN, RECOMPUTE_ADAPTER, RECOMPUTE),
    "cut": (CUT_NO_GRAD, CUT_FROZEN, CUT_FROZEN, CUT_TRAINED),
    "eager": (EAGER_NO_GRAD, EAGER_FROZEN, EAGER_FROZEN, EAGER_TRAINED),
}
# What the chunked body does where the loss is known to be local to groups that fit.
LOCAL = {RECOMPUTE: GROUP_LOCAL, RECOMPUTE_ADAPTER: GROUP_LOCAL_ADAPTER}
TABLE: tuple[Row, ...] = tuple(dict.fromkeys(row for rows in (*BODIES.values(), LOCAL.values()) for row in rows))

# Rows of a chunk from which on adding its share to an fp32 dweight (12 to 16 bytes of traffic for each of V*D sums)
# costs less than its logits a second time (2 FLOPs a row for each): a processor's FLOPs per byte, times six.
_LOCAL_ROWS = {"cpu": 256}
_LOCAL_ROWS_ON_DEVICE = 1024
# Rows of a CPU's tile. More of them widen the fp32 sums of forward beyond the cache, fewer narrow the products.
_TILE_ROWS = 1024
# Bytes of a CPU's tile, however large the workspace: it stays in the last cache from one product to the next.
_TILE_BYTES = 8 << 20


@dataclass(frozen=True)
class Plan:
    """A row of the table with the sizes filled in."""

    row: Row
    shape: tuple[int, int, int]  # N, D, V
    workspace_bytes: int
    itemsize: int
    reason: str
    grad_hidden: bool = True
    rank: int = 0  # of the adapter on the head
    grad_low: tuple[bool, bool] = (False, False)  # of its two sides: rows (N, rank), vocabulary (V, rank)
    device_type: str = "cpu"
    kept_rows: int = 0  # whose logits forward leaves in the memory of dweight, and backward does not compute again

    @property
    def flops(self) -> int:
        """Floating-point operations of forward and backward, an adapter's included."""
        n, d, v = self.shape
        passes = self.row.flops - 2 * (self._has_backward and not self.grad_hidden)
        low = self.logits_passes + sum(self.grad_low)
        return (passes * d + 2 * low * self.rank) * n * v - 2 * self.kept_rows * (d + self.rank) * v

    @property
    def logits_passes(self) -> int:
        """How often a logit is computed, unless its row is kept."""
        return 2 if self.row in (RECOMPUTE, RECOMPUTE_ADAPTER, CUT_FROZEN, CUT_TRAINED) else 1

    @property
    def _has_backward(self) -> bool:
        return self.row not in (NO_GRAD, CUT_NO_GRAD, EAGER_NO_GRAD)

    @property
    def bytes(self) -> int:
        """Bytes that have to move: operands and result of every product once; the cut body stores no logits."""
        n, d, v = self.shape
        products = self.row.flops // 2 - (self._has_backward and not self.grad_hidden)
        low = 0 if self.rank == 0 else self.logits_passes + sum(self.grad_low)
        moved = products * (n * d + v * d + n * v) + low * (n * self.rank + v * self.rank + n * v)
        if self.row.body == "cut":  # forward leaves nothing, and an adapter's share joins in registers
            moved -= n * v * (1 + (self.logits_passes if self.rank else 0))
        if self.kept_rows:
            for inner in (d, self.rank) if self.rank else (d,):
                moved -= self.kept_rows * (inner + v) + (v * inner if self.kept_rows == n else 0)
        return self.itemsize * moved

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose logits fit the workspace; at least one."""
        return _fit(self.workspace_bytes, self.shape[2] * self.itemsize, self.shape[0])

    @property
    def vocab_per_slice(self) -> int:
        """Vocabulary entries whose logits, for all N rows, fit the workspace; at least one."""
        return _fit(self.workspace_bytes, self.shape[0] * self.itemsize, self.shape[2])

    @property
    def slab(self) -> tuple[int, int]:
        """Rows and vocabulary entries of a tile of the walk over the vocabulary: all rows, but on a CPU up to 2,048."""
        n = max(1, self.shape[0])
        if self.device_type != "cpu":
            return n, self._tile_width(n, self._tile_elements)
        # Of more rows, tiles of half the size: the fp32 sums of dhidden and of a slice's dweight lie beside them.
        is_long = n > 2 * _TILE_ROWS
        rows, elements = (_TILE_ROWS, self._tile_elements // 2) if is_long else (n, self._tile_elements)
        return rows, self._tile_width(rows, elements)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and vocabulary entries of a tile of logits that fits the workspace, where rows need not be whole."""
        n, _, v = self.shape
        rows = max(1, min(n, _TILE_ROWS, self._tile_elements))
        return rows, self._tile_width(rows, self._tile_elements)

    def _tile_width(self, rows: int, elements: int) -> int:
        vocab = self.shape[2]
        width = _fit(elements, rows, vocab)
        # Rows of a tile that lie a multiple of 4 KiB apart meet in the same few sets of a CPU's cache.
        aliases = self.device_type == "cpu" and width < vocab and width * self.itemsize % 4096 == 0
        return width - _TILE if aliases and width > _TILE else width

    @property
    def _tile_elements(self) -> int:
        room = self.workspace_bytes if self.device_type != "cpu" else min(self.workspace_bytes, _TILE_BYTES)
        return max(1, room // self.itemsize)


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
    grad_weight: bool | None = None,
    rank: int = 0,
    grad_low: tuple[bool, bool] = (False, False),
    group_rows: int | None = None,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    keep_logits: bool = True,
) -> Plan:
    """Choose a row of the table.

    Args:
        shape: (N, D, V).
        dtype, device: of hidden and weight.
        grad_hidden: whether hidden needs a gradient.
        grad_head: whether anything of the head does: weight, bias or an adapter's (V, rank) side.
        grad_weight: whether weight does; None: as grad_head.
        rank: of an adapter on the head, 0 for none; grad_low: whether its (N, rank) and (V, rank) sides need gradients.
        group_rows: rows of the largest group, where the loss is known and local to groups; None: it is not.
        impl: "auto", or the name of a body.
        workspace_bytes: bytes for a block of logits; None: `default_workspace(device)`.
        keep_logits: whether dweight's memory may hold logits from forward on; not where backward has to make it.
    Raises:
        ValueError: unknown impl, or workspace_bytes below 1.
        RuntimeError: impl="cut" where Triton cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} must be one of {', '.join(IMPLS)}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes={workspace_bytes!r} must be at least 1")
    if impl == "cut":
        require_triton(device, dtype)
    grad_head = grad_head or grad_low[1]
    grad_weight = grad_head if grad_weight is None else grad_weight
    if grad_head:
        needs = "weight needs a gradient" if grad_weight else "of the head only bias or adapter need a gradient"
    else:
        needs = "only hidden needs a gradient" if grad_hidden or grad_low[0] else "no gradient"
    case = 3 if grad_weight else 2 if grad_head else 1 if grad_hidden or grad_low[0] else 0
    row = BODIES["chunked" if impl == "auto" else impl][case]
    workspace = default_workspace(device) if workspace_bytes is None else workspace_bytes
    how = "asked for" if impl != "auto" else "fewest FLOPs of the table; row work by " + _row_work(device, dtype)
    kept = _rows_that_fit_dweight(shape) if row is RECOMPUTE and keep_logits else 0
    chosen = Plan(row, shape, workspace, dtype.itemsize, "", grad_hidden, rank, grad_low, device.type, kept)
    if kept:
        how += f"; the logits of {kept} of {shape[0]} rows fit dweight's memory"
    if group_rows is not None and row in LOCAL and not kept == shape[0] > 0:
        rows, least = chosen.rows_per_chunk, _LOCAL_ROWS.get(device.type, _LOCAL_ROWS_ON_DEVICE)
        if dtype == torch.float16:
            how += "; fp16 gradients are rounded after the loss is scaled, so not with its value"
        elif group_rows > rows:
            how += f"; the largest group, {group_rows} rows, exceeds a chunk of {rows}"
        elif grad_weight and rows < min(shape[0], least):
            how += f"; chunks of {rows} rows are too small to add to dweight for each ({least} are not)"
        else:
            how = f"{how}; the loss is local to groups, which fit a chunk"
            chosen = replace(chosen, row=LOCAL[row], kept_rows=0)
    return replace(chosen, reason=f"{needs}; {row.body} body: {how}")


def _row_work(device: torch.device, dtype: torch.dtype) -> str:
    if uses_triton(device, dtype):
        return "Triton"
    return "compiled code" if uses_compiled(device, dtype) else "torch"


def _rows_that_fit_dweight(shape: tuple[int, int, int]) -> int:
    return min(shape[:2])  # V logits each, in V x D numbers


def explain(
    n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", **options
) -> str:
    """What would run for N rows, D hidden, V vocabulary entries, its FLOPs and memory, and why; options as `plan`'s."""
    options = {"grad_hidden": True, "grad_head": True, **options}
    p = plan((n, d, v), dtype, torch.device(device), **options)
    passes = f"{p.row.flops_forward}NDV forward + {p.row.flops_backward}NDV backward"
    if p.kept_rows:
        passes += f" - 2DV for each of {p.kept_rows} rows kept"
    if p.rank:
        passes += f" + adapter of rank {p.rank}"
    return (
        f"{p.row.name} ({p.row.body} body): {p.row.how}\n"
        f"  why: {p.reason}\n"
        f"  FLOPs: {passes} = {p.flops:.3e}\n"
        f"  bytes: {p.bytes:.3e}, operands and results of every product once\n"
        f"  memory beside the outputs: {p.row.memory}, workspace {p.workspace_bytes / 2**20:.0f} MiB\n"
        f"  {p.rows_per_chunk} whole rows fit, or {p.vocab_per_slice} vocabulary entries of all rows,"
        f" or a tile of {p.tile[0]} x {p.tile[1]}"
    )


def default_workspace(device: torch.device) -> int:
    """Bytes for one block of logits: 16 MiB on a CPU; on a GPU 1/256 of all its memory, at most 512 MiB.

    Of all and not of what is free: the size of a block may change rounding, and equal inputs shall give equal bits.
    """
    if device.type != "cuda":
        return 16 << 20
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


def uses_compiled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether impl="auto" runs compiled row functions on such tensors: bf16 and fp32 on a CPU, where they are built."""
    if device.type != "cpu":
        return False
    from prefkern.kernels import row_softmax_cpu

    return dtype in row_softmax_cpu.DTYPES and row_softmax_cpu.library() is not None
