"""A quick look: providers in turn at one shape in one process, no memory, no gate, nothing written.

python -m bench.once --suite dpo --dtype bf16 --passes frozen,trained --rounds 1 [--shape 1024,1024,128256]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from bench.shapes import DEVICE, Shape
from bench.suite import Suite
from bench.suites import SUITES


def timed(suite: Suite, provider: str, kind: str, inputs) -> float:
    """Seconds of one run."""
    prepared = suite.prepare(provider, kind, inputs)
    start = time.perf_counter()
    suite.step(provider, kind, prepared)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    listed = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="dpo", choices=SUITES)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--passes", type=listed, default=["frozen", "trained"])
    parser.add_argument("--providers", type=listed)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=lambda text: Shape(*map(int, text.split(","))), default=Shape())
    args = parser.parse_args()
    suite, shape = SUITES[args.suite], args.shape
    inputs = suite.inputs(shape, args.dtype)
    for kind in args.passes:
        names = []
        for p in (*suite.roofs.values(), *suite.providers.values()):
            if args.providers and p.name not in args.providers and p.name not in suite.roofs:
                continue
            why = p.obstacle(shape, args.dtype) or ("only by name" if p.optional and not args.providers else None)
            if why:
                print(f"{kind:8} {p.name:18} left out: {why}")
                continue
            for _ in range(2 if p.compiles else 0):
                suite.step(p.name, kind, inputs)
            suite.step(p.name, kind, suite.inputs(Shape(64, 32, 257), args.dtype))
            names.append(p.name)
        times = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                times[name].append(timed(suite, name, kind, inputs))
        roof = min(statistics.median(times[name]) for name in suite.roofs if name in times)
        floor = roof * suite.flops[kind] / 2
        for name in names:
            median = statistics.median(times[name])
            share = "" if name in suite.roofs else f"  {floor / median:5.0%} of the {suite.flops[kind]}NDV floor"
            print(f"{kind:8} {name:18} {1000 * median:9.1f} ms{share}", flush=True)


if __name__ == "__main__":
    main()
