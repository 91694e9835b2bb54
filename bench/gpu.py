"""What matters most first, on one GPU, within minutes: `python -m bench.gpu [--minutes 9] [--dry-run]`.

Needs torch, triton and transformers, pytest for the tests, and whichever peers are importable; nothing is installed.
First the tests of the kernels, on the GPU; no figure if one is red. Then blocks of measurements, each in a process of
its own, so that a peer that breaks the device breaks no other block. Every provider is checked against float64 before
it is timed. Records are written as they come, and what the time does not allow is cut and said to be.

--dry-run runs all of it at toy sizes in Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bench import record, report
from bench.conftest import listed
from bench.meter import Meter
from bench.shapes import MODELS, Shape
from bench.suite import Suite
from bench.suites import SUITES

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
TEST_SECONDS = 200  # of a whole run of `MINUTES`
MINUTES = 9.0
MODEL_TOKENS = (2048, 8192, 512, 32_768, 131_072)


@dataclass(frozen=True)
class Block:
    """Measurements of one suite, in the order of importance."""

    suite: str
    passes: tuple[str, ...]
    compiled: bool = False  # the peers that torch.compile makes, which takes long, beside plain torch and ours
    large: tuple[tuple[int, int, int], ...] = ()  # N, D, V; the suite's own shapes where empty

    @property
    def name(self) -> str:
        return self.suite + "-compiled" * self.compiled


HEADS = ((8192, 4096, 128_256), (1024, 4096, 128_256))
LOGITS = tuple((n, 1, v) for v in (128_256, 32_768, 262_144, 65_536) for n in (8192, 64, 1024, 256))
BLOCKS = (
    Block("dpo", ("frozen", "trained"), large=HEADS),
    Block("logits", ("forward", "backward"), large=LOGITS),
    Block("head", ("forward",), large=HEADS),
    Block("dpo", ("frozen", "trained"), compiled=True, large=HEADS),
    Block("models", ("frozen", "trained")),
    Block("scaling", ("frozen", "forward", "trained")),
)
TOY = {
    "dpo": ((64, 32, 300),),
    "logits": ((24, 1, 300), (5, 1, 1100)),
    "head": ((24, 32, 300),),
    "models": ((24, 32, 300),),
    "scaling": ((16, 16, 200), (32, 16, 200)),
}


def main() -> int:
    """Exit status: 0 only if the tests are green and nothing of ours was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything, tests included")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    known = [block.name for block in BLOCKS]
    parser.add_argument("--blocks", type=listed(known), help=f"of {', '.join(known)}; all unless set")
    parser.add_argument("--out", type=Path, help="JSON lines to append to; a new file under bench/results unless set")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes; in Triton's interpreter without a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--date", help=argparse.SUPPRESS)  # of the run, which all blocks are of
    args = parser.parse_args()
    if args.worker:
        block = next(b for b in BLOCKS if b.name == args.worker)
        return run_block(block, time.monotonic() + 60 * args.minutes, args.out, args.dry_run, args.date)
    return supervise(args)


def supervise(args: argparse.Namespace) -> int:
    """Tests, then a process for each block, then the table."""
    start = time.monotonic()
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}
    if args.dry_run and not _has_gpu():
        environment |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    elif not _has_gpu():
        print("no GPU here: --dry-run shows that everything runs")
        return 1
    if not args.no_tests and not tests_are_green(environment, args.dry_run):
        print("no figures: the tests are red")
        return 1
    out = args.out or ROOT / "bench" / "results" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-gpu.jsonl"
    status, cut, date = 0, [], record.provenance()["date"]
    for block in BLOCKS:
        if args.blocks and block.name not in args.blocks:
            continue
        left = 60 * args.minutes - (time.monotonic() - start)
        if left < 15:
            cut.append(block.name)
            continue
        print(f"\n{block.name}: {left:.0f} s left", flush=True)
        command = [sys.executable, "-m", "bench.gpu", "--worker", block.name, "--minutes", str((left - 10) / 60)]
        command += ["--out", str(out), "--date", date, *["--dry-run"] * args.dry_run]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=left)
            status = max(status, abs(done.returncode))
        except subprocess.TimeoutExpired:
            cut.append(f"the end of {block.name}")
    if out.exists():
        print(f"\n{report.text(record.read([out]))}\n\nas JSON lines: {out}; {time.monotonic() - start:.0f} s in all")
        print(f"as pictures: {sys.executable} -m bench.report {out} --plots {out.parent}")
    else:
        print("nothing was measured")
        status = status or 1
    if cut:
        print(f"cut, out of time: {', '.join(cut)}")
    return status


def _has_gpu() -> bool:
    return torch.cuda.is_available()


# --- Tests ---------------------------------------------------------------------------------------------------------


def tests_are_green(environment: dict[str, str], dry_run: bool) -> bool:
    """Run the tests that a GPU changes; a dry run only collects them. What time does not allow is said."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed, so no test was run; providers are still checked against float64", flush=True)
        return True
    files = kernel_tests()
    options = ["--collect-only", "-q"] if dry_run else ["-x"]  # quieter still: files and how many tests they hold
    if not dry_run and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time goes to compiling kernels
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-r", "f", *options]
    print(f"tests: {', '.join(path.stem for path in files)}", flush=True)
    try:
        done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=environment, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the tests were cut after {TEST_SECONDS} s: none had failed until then", flush=True)
        return True
    return done.returncode == 0


FIRST = ("test_row_softmax", "test_fused_logits", "test_tail", "test_lm_head", "test_token_logps", "test_preference")


def kernel_tests() -> list[Path]:
    """Tests that place tensors on the device and import nothing that is missing here, kernels' own first."""
    files = [path for path in sorted(TESTS.glob("test_*.py")) if path.stem != "test_bench" and _uses_device(path)]
    files = [path for path in files if not missing_imports(path)]
    return sorted(files, key=lambda path: FIRST.index(path.stem) if path.stem in FIRST else len(FIRST))


def _uses_device(path: Path) -> bool:
    return bool({"conftest", "numerics"} & _imports(path))


def missing_imports(path: Path) -> set[str]:
    """Packages that a test, or what of the tests' folder it imports, needs and that are not here."""
    missing, seen, todo = set(), set(), [path]
    while todo:
        current = todo.pop()
        seen.add(current)
        for module in _imports(current):
            own = TESTS / f"{module}.py"
            if own.exists():
                todo += [own] * (own not in seen)
            elif importlib.util.find_spec(module) is None:
                missing.add(module)
    return missing


@cache
def _imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


# --- A block, in a process of its own ------------------------------------------------------------------------------


def run_block(block: Block, deadline: float, out: Path, dry_run: bool, date: str) -> int:
    """Measure a block and append its records; exit status 1 where something of ours was wrong or failed."""
    suite, origin = SUITES[block.suite], {**record.provenance(), "date": date}
    meter, status, longest = Meter(suite, rounds=1 if dry_run else suite.rounds("bf16")), 0, 0.0
    for shape, kind in groups(block, dry_run):
        start = time.monotonic()
        if start + longest > deadline:
            case = record.case_record(suite.name, shape, meter.dtype, kind, "")
            record.write(out, [{**origin, **case, "left_out": "cut: out of time"}])
            print(f"cut: {shape} {kind}", flush=True)
            continue
        records = meter.group(shape, kind, names(block, suite))
        record.write(out, [{**origin, **r} for r in records])
        status |= any(r["ours"] and ("left_out" in r or r.get("contract") != "met") for r in records if _ran(r))
        longest = max(longest, time.monotonic() - start)
        timed = [f"{r['provider']} {1000 * r['p50_s']:.3g}" for r in records if "p50_s" in r]
        print(f"{shape} {kind}: {', '.join(timed)} ms", flush=True)
    return int(status)


def _ran(r: record.Record) -> bool:
    """Whether a record is of something that was run: left out beforehand is no fault."""
    return r.get("contract") is not None or str(r.get("left_out")).startswith(("failed", "wrong"))


def names(block: Block, suite: Suite) -> list[str]:
    """Providers of a block."""
    compiled = [name for name, p in suite.providers.items() if p.compiles]
    if block.compiled:
        return ["torch", *compiled, "prefkern"]
    return [name for name in suite.usual_providers if name not in compiled]


def groups(block: Block, dry_run: bool) -> Iterator[tuple[Shape, str]]:
    """Shapes and passes, the most important first."""
    if dry_run:
        shapes = [Shape(*sizes, softcap=5.0 if block.suite == "models" else None) for sizes in TOY[block.suite]]
    else:
        shapes = [Shape(*sizes) for sizes in block.large]
        shapes = shapes or SUITES[block.suite].shapes([], list(MODELS), list(MODEL_TOKENS))
    for shape in shapes:
        for kind in block.passes:
            yield shape, kind


if __name__ == "__main__":
    sys.exit(main())
