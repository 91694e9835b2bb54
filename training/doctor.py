"""What is installed, and what it runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence

import torch

from prefkern import __version__
from prefkern.planner import explain, triton_obstacle

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


def report() -> str:
    """Versions, devices, and the head's body for trained head, frozen head and no gradient, with the reason."""
    lines = [f"prefkern {__version__}", "", "Versions", *_indent(_versions()), "", "Devices", *_indent(_devices())]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = triton_obstacle(device)
    lines += ["", "Triton kernels", f"  {'run here' if obstacle is None else f'do not run: {obstacle}'}"]
    n, d, v = _EXAMPLE
    lines += ["", f"Head, for N {n} D {d} V {v} in bfloat16 on {device}"]
    cases = {"all weights trained": (True, True), "head frozen (LoRA)": (True, False), "no gradient": (False, False)}
    for case, (hidden, head) in cases.items():
        text = explain(n, d, v, torch.bfloat16, device, grad_hidden=hidden, grad_head=head)
        lines += [f"  {case}: {text.splitlines()[0]}", *_indent(text.splitlines()[1:])]
    return "\n".join(lines)


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
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, {bf16}"
    if torch.cuda.device_count() == 0:
        yield "no GPU"


def _indent(lines: Iterator[str] | Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
