"""A quick look: providers in turn at one shape in one process, no memory, no gate, nothing written.

python -m bench.once [--suite dpo] [--dtype bf16] [--passes frozen,trained] [--rounds 3] [--shape 1024,1024,128256]

For work on the code: results are not compared with anything, and the first runs of a machine may be slow.
"""

from __future__ import annotations

import argparse
import statistics
import time

from bench.conftest import shape as parse_shape
from bench.fresh import Case, warm_up
from bench.shapes import DTYPES, Shape, synchronize
from bench.suite import Suite
from bench.suites import SUITES


def timed(suite: Suite, provider: str, kind: str, inputs) -> float:
    """Seconds of one run."""
    prepared = suite.prepare(provider, kind, inputs)
    synchronize()
    start = time.perf_counter()
    suite.step(provider, kind, prepared)
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    listed = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.once", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="dpo", choices=SUITES)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--passes", type=listed, default=[], help="the suite's own unless set")
    parser.add_argument("--providers", type=listed)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=parse_shape, default=Shape(), metavar="N,D,V")
    args = parser.parse_args()
    suite, shape = SUITES[args.suite], args.shape
    inputs = suite.inputs(shape, args.dtype)
    for kind in suite.passes(args.passes):
        names = []
        for p in (*suite.roofs.values(), *suite.providers.values()):
            if args.providers and p.name not in args.providers and p.name not in suite.roofs:
                continue
            why = p.obstacle(shape, args.dtype) or ("only by name" if p.optional and not args.providers else None)
            if why:
                print(f"{kind:8} {p.name:18} left out: {why}")
                continue
            warm_up(Case(suite.name, p.name, args.dtype, kind, shape), inputs)
            names.append(p.name)
        times = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                times[name].append(timed(suite, name, kind, inputs))
        medians = {name: statistics.median(values) for name, values in times.items()}
        amount = getattr(suite.work(kind, shape, args.dtype), suite.bound)
        per_roof = getattr(suite.roof_work(shape, args.dtype), suite.bound) if suite.roofs else 0
        floor = min((medians[name] / per_roof * amount for name in suite.roofs if name in medians), default=None)
        for name in names:
            share = "" if floor is None or name in suite.roofs else f"  {floor / medians[name]:5.0%} of the roof"
            print(f"{kind:8} {name:18} {1000 * medians[name]:9.1f} ms{share}", flush=True)


if __name__ == "__main__":
    main()
