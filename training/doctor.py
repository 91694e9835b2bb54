"""What is installed, what it runs on, and how the head would be run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prefkern import __version__
from prefkern.kernels import product_cpu, row_softmax_cpu
from prefkern.planner import explain, triton_obstacle
from prefkern.training.errors import ConfigError

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "tokenizers",
    "tensorboard",
    "matplotlib",
)
_EXAMPLE = (1024, 4096, 128_256)  # N, D, V: a micro-batch of a Llama-3 8B


def report(
    shape: Sequence[int] = _EXAMPLE,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rank: int | None = None,
    group_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> str:
    """Versions, devices, and what would run the head, by what needs a gradient: FLOPs, bytes, workspace, and why.

    Args:
        shape: N response tokens, D hidden, V vocabulary entries.
        dtype: of hidden states and head.
        rank: of an adapter on the head; None: leave that case out.
        group_rows: response tokens of the largest group of a loss (a pair: chosen and rejected together); None: a
            few.
        workspace_bytes: as in `prefkern.token_logps`.
    Raises:
        ConfigError: a number below 1.
    """
    for name, number in zip(("N", "D", "V"), shape):
        _check(f"--shape: {name}", number)
    for name, number in (("--rank", rank), ("--group-rows", group_rows), ("--workspace-bytes", workspace_bytes)):
        _check(name, 1 if number is None else number)
    lines = [f"prefkern {__version__}", "", "Versions", *_indent(_versions()), "", "Devices", *_indent(_devices())]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = triton_obstacle(device)
    lines += ["", "Triton kernels", f"  {'run here' if obstacle is None else f'do not run: {obstacle}'}"]
    n, d, v = shape
    lines += ["", f"Head, for N {n} D {d} V {v} in {str(dtype).removeprefix('torch.')} on {device}"]
    for case, options in _cases(rank, group_rows):
        text = explain(n, d, v, dtype, device, workspace_bytes=workspace_bytes, **options).splitlines()
        lines += [f"  {case}: {text[0]}", *_indent(text[1:])]
    return "\n".join(lines)


def _cases(rank: int | None, group_rows: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may need a gradient, in words and as options of `prefkern.explain`."""
    groups = "small groups" if group_rows is None else f"groups of at most {group_rows} rows"
    local = {"group_rows": group_rows or 1}
    yield "no gradient", {"grad_hidden": False, "grad_head": False}
    yield "head frozen (LoRA elsewhere)", {"grad_head": False}
    yield "all weights trained, any loss", {}
    yield f"all weights trained, a loss local to {groups}", local
    if rank is not None:
        adapter = {"grad_weight": False, "rank": rank, "grad_low": (True, True)}
        yield f"head adapted by LoRA of rank {rank}, any loss", adapter
        yield f"head adapted by LoRA of rank {rank}, a loss local to {groups}", {**adapter, **local}


def _check(name: str, number: int) -> None:
    if number < 1:
        raise ConfigError(f"{name}={number} should be at least 1")


def _versions() -> Iterator[str]:
    yield f"{'python':<13} {platform.python_version()} ({platform.system()} {platform.machine()})"
    for name in _PACKAGES:
        try:
            yield f"{name:<13} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name:<13} not installed"


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cpu: {cores} cores, {torch.get_num_threads()} torch threads"
    rows = "by torch (not compiled)" if row_softmax_cpu.library() is None else "compiled"
    products = "by torch" if product_cpu.library() is None else "compiled"
    yield f"     row functions {rows}, bf16 products {products}"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, {bf16}"
    if torch.cuda.device_count() == 0:
        yield "no GPU"


def _indent(lines: Iterator[str] | Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
