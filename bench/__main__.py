"""Check, measure and report: `python -m bench [--suite dpo,head] [--dtype bf16] [--providers a,b] ...` (see --help).

First the tests of what is about to be timed; no figure if one is red. Then memory and error of every case, then the
times, then tables, and JSON lines under bench/results. Real models' heads run when asked for, as they take long on a
CPU: `--suite models --model qwen3-0.6b --tokens 512,2048`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import record, report, trainer_step
from bench.conftest import add_options

FOLDER = Path(__file__).parent
GATE = tuple(
    f"tests/test_{name}.py" for name in ("products", "token_logps", "group_local", "tail", "preference", "bench")
)  # fmt: skip


def gate() -> int:
    """Exit status of the tests of the bodies that are timed, without the slow ones."""
    print("gate: the tests of what is about to be timed", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *GATE]
    return subprocess.run(command, cwd=FOLDER.parent).returncode


def main() -> int:
    """Exit status: 0 only if nothing of ours was wrong."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--no-gate", action="store_true", help="leave the tests out")
    own.add_argument("--out", type=Path, help="JSON lines to append to; a new file under bench/results unless set")
    mine, options = own.parse_known_args()
    every = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0], parents=[own])
    add_options(every.add_argument)
    asked = every.parse_args()

    if not mine.no_gate and gate() != 0:
        print("no figures: the gate is red")
        return 1
    out = mine.out or record.RESULTS / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.jsonl"
    status, records = 0, []
    if set(asked.suite) - {"trainer"}:
        with tempfile.TemporaryDirectory() as folder:
            found = suites(Path(folder), options)
        if found is None:
            print("no figures: a case of ours is wrong, or failed")
            return 1
        record.write(out, found)  # at once: what follows may fail
        records += found
    if "trainer" in asked.suite:
        try:
            found = trainer_step.compare_trainers()
        except (AssertionError, RuntimeError) as error:
            print(f"no figures of the trainers: {error}")
            status = 1
        else:
            record.write(out, found)
            records += found
    if not any("p50_s" in r for r in records):
        print("nothing was timed" + "".join(f"\n  {line}" for line in report.left_out(records)))
        return 1
    print(report.text(records))
    print(f"\nas JSON lines: {out}\nas pictures: {sys.executable} -m bench.report {out} --plots {out.parent}")
    return status


def suites(folder: Path, options: list[str]) -> list[record.Record] | None:
    """Records of what pytest measured under the options, None where a test was red."""
    results, left_out = folder / "benchmark.json", folder / "left_out.jsonl"
    command = [
        sys.executable, "-m", "pytest", str(FOLDER), "-x", "-q", "-p", "no:cacheprovider", "-r", "f",
        f"--benchmark-json={results}", "--benchmark-quiet", "--left-out", str(left_out), *options,
    ]  # fmt: skip
    status = subprocess.run(command, cwd=FOLDER.parent).returncode
    if status != 0:
        return None
    written = results.read_text() if results.exists() else ""  # nothing if all was left out
    return record.from_benchmark(json.loads(written or '{"benchmarks": []}'), record.lines(left_out))


if __name__ == "__main__":
    sys.exit(main())
