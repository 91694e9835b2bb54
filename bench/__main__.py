"""Run the benchmarks and print their table: `python -m bench [--shape N,D,V] [--rounds R] [--providers a,b]`."""

import datetime
import subprocess
import sys
from pathlib import Path

from bench import report

FOLDER = Path(__file__).parent


def main() -> int:
    """Exit status of pytest; the table holds every case that was measured, also when another failed."""
    results = FOLDER / "results" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
    results.parent.mkdir(exist_ok=True)
    options = [str(FOLDER), "-p", "no:cacheprovider", f"--benchmark-json={results}", "--benchmark-quiet", *sys.argv[1:]]
    status = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=FOLDER.parent).returncode
    if results.exists() and results.stat().st_size:
        report.main(results)
    return status


if __name__ == "__main__":
    sys.exit(main())
