"""Which sizes are measured: real models' heads, the standard shape, and what of that a machine allows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Shape(NamedTuple):
    """N response tokens, D hidden, V vocabulary; the head's softcap, and the model that it is of."""

    n: int = 1024
    d: int = 1024
    v: int = 128_256
    softcap: float | None = None
    model: str = ""

    @property
    def ndv(self) -> int:
        return self.n * self.d * self.v

    def __str__(self) -> str:
        return f"{self.model or f'D{self.d}-V{self.v}'}-N{self.n}"


# D, V and softcap as in the models' published configurations.
MODELS = {
    "llama3-8b": Shape(d=4096, v=128_256),
    "qwen3-0.6b": Shape(d=1024, v=151_936),
    "qwen3-8b": Shape(d=4096, v=151_936),
    "gemma2-2b": Shape(d=2304, v=256_000, softcap=30.0),
    "gemma3-1b": Shape(d=1152, v=262_144),
    "gemma3-4b": Shape(d=2560, v=262_208),
    "gpt-oss-20b": Shape(d=2880, v=201_088),
}
TOKENS = (512, 2048, 8192, 32_768, 131_072)

# Time and memory against N and against V, one of them at a time from the standard shape.
SCALING_N = (256, 1024, 4096, 8192)
SCALING_V = (32_768, 65_536, 128_256, 262_144)

# A case runs if it is expected to take at most this share of the free memory, and one run of it so many seconds.
MEMORY_SHARE = 0.6
SECONDS = {"cpu": 20.0, "cuda": 2.0}


def model_shapes(models: list[str], tokens: list[int]) -> list[Shape]:
    """The heads of named models at numbers of tokens."""
    return [MODELS[model]._replace(model=model, n=n) for n in tokens for model in models]


def scaling_shapes() -> list[Shape]:
    """The standard shape with another N, or another V."""
    shapes = [Shape(n=n) for n in SCALING_N] + [Shape(v=v) for v in SCALING_V]
    return list(dict.fromkeys(shapes))


def free_bytes() -> int:
    """Memory of the device that can be had now."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return 8 << 30  # elsewhere the system does not say; small machines have that


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a matrix product that takes milliseconds: to foresee how long a case takes, never to report."""
    n, d, v = (1024, 512, 2048) if DEVICE.type == "cpu" else (4096, 4096, 4096)
    a, b = torch.ones(n, d, dtype=DTYPES[dtype], device=DEVICE), torch.ones(v, d, dtype=DTYPES[dtype], device=DEVICE)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ b.T
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n * d * v / best


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def too_large(shape: Shape, dtype: str, flops: int, logits_bytes: float, trained: bool, rate: float) -> str | None:
    """Why a case is left out on this machine, or None.

    Args:
        flops: of the pass, in multiples of N * D * V.
        logits_bytes: what the provider holds at its peak for every element of the logits.
        trained: whether there is a gradient of the weight: once in its dtype and, in most providers, once in fp32.
        rate: FLOP/s of the matrix product here.
    """
    item = DTYPES[dtype].itemsize
    weights = shape.d * shape.v * (2 * item + (item + 4 if trained else 0))  # twice: the parent process has it too
    need = weights + shape.n * shape.v * logits_bytes + shape.n * shape.d * (3 * item + 4)
    have = free_bytes()
    if need > MEMORY_SHARE * have:
        return f"needs about {need / 2**30:.1f} GiB, of which {have / 2**30:.1f} are free"
    seconds = flops * shape.ndv / rate
    if seconds > SECONDS[DEVICE.type]:
        return f"would take {seconds:.0f} s at {rate / 1e12:.2f} TFLOP/s, allowed are {SECONDS[DEVICE.type]:.0f} s"
    return None
